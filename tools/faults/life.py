"""A fit with checkpoints, an export and a merge, that can be told at which moment of its life to die."""

from __future__ import annotations

import mmap
import os
import random
import signal
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from small import Small, inputs, loader, oft, state, trainer
from torch import Tensor, nn

import lightning_oft.callback.export  # noqa: F401 - `watch` looks for names in modules that are there
from lightning_oft.callback.checkpoint_io import AtomicCheckpointIO
from lightning_oft.callback.random_state import RandomState
from lightning_oft.formats.peft import write_peft
from lightning_oft.formats.pretrained import write_pretrained
from lightning_oft.model.merging import merge_layers

PHASES = ("training", "checkpoint", "adapter", "merge", "export")
_WIDTH = 96


class Wide(Small):
    """Large enough that its files are written in several pieces."""

    def build(self) -> None:
        if not hasattr(self, "net"):
            torch.manual_seed(1)
            first, second, head = nn.Linear(8, _WIDTH), nn.Linear(_WIDTH, _WIDTH), nn.Linear(_WIDTH, 2)
            parts = [first, nn.ReLU(), nn.Dropout(0.1), second, nn.BatchNorm1d(_WIDTH), nn.ReLU(), head]
            self.net = nn.Sequential(*parts)


class Stateful:
    """Shuffled batches from a loader that knows where it is, so that a run can resume within an epoch."""

    def __init__(self) -> None:
        self.epoch, self.position = 0, 0

    def __len__(self) -> int:
        return 8

    def __iter__(self) -> Iterator[Any]:
        if self.position == len(self):
            self.epoch, self.position = self.epoch + 1, 0
        order = torch.randperm(64, generator=torch.Generator().manual_seed(self.epoch)).reshape(8, 8)
        x, y = inputs()
        while self.position < len(order):
            rows = order[self.position]
            self.position += 1
            yield x[rows], y[rows]

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.epoch, self.position = state["epoch"], state["position"]


class Death(NamedTuple):
    """Dies by its own hand at the `count`-th event within a phase: at any call or return, or at one of the file system."""

    phase: str
    only_files: bool
    count: int


def _is_file_event(event: str, function: Any) -> bool:
    if event not in ("c_call", "c_return"):
        return False
    owner = type(getattr(function, "__self__", None)).__module__
    return owner == "_io" or getattr(function, "__module__", None) in ("posix", "_io")


class Phases:
    """What a life is doing, told to the parent through shared memory, and counted; and a death at the right moment."""

    def __init__(self, death: Death | None = None, count: bool = False) -> None:
        self._now = mmap.mmap(-1, 1)
        self.death, self._all = death, count
        self.counts: Counter[tuple[str, bool]] = Counter()

    @property
    def now(self) -> str:
        return PHASES[self._now[0]]

    def during(self, phase: str, action: Callable[..., Any]) -> Callable[..., Any]:
        """`action`, announced and counted."""

        def watched(*args: Any, **kwargs: Any) -> Any:
            before, self._now[0] = self._now[0], PHASES.index(phase)
            if self._all or (self.death is not None and self.death.phase == phase):
                sys.setprofile(lambda _, event, function: self._happens(phase, event, function))
            try:
                return action(*args, **kwargs)
            finally:
                sys.setprofile(None)
                self._now[0] = before

        return watched

    def _happens(self, phase: str, event: str, function: Any) -> None:
        for only_files in (False, True) if _is_file_event(event, function) else (False,):
            self.counts[phase, only_files] += 1
            if self.death == (phase, only_files, self.counts[phase, only_files]):
                os.kill(os.getpid(), signal.SIGKILL)

    def watch(self) -> None:
        """Stand around every phase but training. The names must exist, or nothing would be watched."""
        Trainer.save_checkpoint = self.during("checkpoint", Trainer.save_checkpoint)  # type: ignore[method-assign]
        for function, phase in ((write_peft, "adapter"), (merge_layers, "merge"), (write_pretrained, "export")):
            places = [
                (module, name)
                for module in list(sys.modules.values())
                if module.__name__.startswith("lightning_oft")
                for name, value in vars(module).items()
                if value is function
            ]
            assert places, function
            for module, name in places:
                setattr(module, name, self.during(phase, function))


def live(place: Path, steps: bool, seed: int, epochs: int = 3) -> dict[str, Tensor]:
    """Fit, from the last checkpoint if there is one, export and merge; returns the merged weights.

    Args:
        place: holds `ckpt/` and `export/`.
        steps: checkpoints every three steps, within epochs too; at the end of each otherwise.
        seed: of this process; where a checkpoint is found, its random state must take over.
        epochs: how many.
    """
    warnings.simplefilter("ignore")
    torch.manual_seed(seed)
    model = Wide()
    options: dict[str, Any] = {"every_n_train_steps": 3} if steps else {"monitor": "val"}
    keeper = ModelCheckpoint(place / "ckpt", save_last=True, save_top_k=-1 if steps else 2, **options)
    adapter = oft(export_dir=str(place / "export"), oft_block_size=8)
    plugins = [AtomicCheckpointIO()]
    run = trainer(place, adapter, RandomState(), keeper, plugins=plugins, max_epochs=epochs, num_sanity_val_steps=0)
    data: Any = Stateful() if steps else loader()
    run.fit(model, data, loader(False), ckpt_path="last")
    return state(model)


def spawn(action: Callable[[], None], log: Path) -> int:
    """Fork a child that acts and exits; its traceback, if any, is in `log`. Returns its process id."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        with log.open("w") as stream:
            os.dup2(stream.fileno(), 1)
            os.dup2(stream.fileno(), 2)
            random.seed(0)
            try:
                action()
                code = 0
            except BaseException:
                import traceback

                traceback.print_exc()
    finally:
        os._exit(code)
