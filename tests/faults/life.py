"""A fit with checkpoints, an export and a merge, that can be told at which moment of its life to die."""

from __future__ import annotations

import mmap
import os
import random
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from small import Small, inputs, loader, oft, state, trainer
from torch import Tensor, nn

from lightning_oft.callback import export, finetuning

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
        order = torch.randperm(64, generator=torch.Generator().manual_seed(self.epoch)).reshape(8, 8)
        x, y = inputs()
        while self.position < len(order):
            rows = order[self.position]
            self.position += 1
            yield x[rows], y[rows]
        self.epoch, self.position = self.epoch + 1, 0

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.epoch, self.position = state["epoch"], state["position"]


class Death(NamedTuple):
    """Dies by its own hand at the `event`-th call or return of Python or C within a phase."""

    phase: str
    event: int


class Phases:
    """What a life is doing, told to the parent through shared memory, and counted; and a death at the right moment."""

    def __init__(self, death: Death | None = None) -> None:
        self._now = mmap.mmap(-1, 1)
        self.death = death
        self.counts = dict.fromkeys(PHASES, 0)

    @property
    def now(self) -> str:
        return PHASES[self._now[0]]

    def during(self, phase: str, action: Callable[..., Any]) -> Callable[..., Any]:
        """`action`, announced and counted."""

        def watched(*args: Any, **kwargs: Any) -> Any:
            before, self._now[0] = self._now[0], PHASES.index(phase)
            sys.setprofile(lambda *_: self._event(phase))
            try:
                return action(*args, **kwargs)
            finally:
                sys.setprofile(None)
                self._now[0] = before

        return watched

    def _event(self, phase: str) -> None:
        self.counts[phase] += 1
        if self.death == (phase, self.counts[phase]):
            os.kill(os.getpid(), signal.SIGKILL)

    def watch(self) -> None:
        """Stand around every phase but training. The names must exist, or nothing would be watched."""
        for owner, name, phase in (
            (Trainer, "save_checkpoint", "checkpoint"),
            (export, "write_contents", "adapter"),
            (finetuning, "merge", "merge"),
            (export, "save_merged", "export"),
        ):
            setattr(owner, name, self.during(phase, getattr(owner, name)))


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
    run = trainer(place, adapter, keeper, max_epochs=epochs, num_sanity_val_steps=0)
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
