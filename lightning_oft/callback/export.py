"""What a fit leaves on disk: the adapter in PEFT's format, and the merged model as plain libraries load it."""

from __future__ import annotations

import contextlib
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_oft.callback.strategies import strategy_adapter
from lightning_oft.formats.checkpoint_file import CheckpointError, is_rotation_key, read
from lightning_oft.formats.peft import write_peft
from lightning_oft.formats.pretrained import check_replaceable, root_of, write_pretrained
from lightning_oft.model import saved_modules
from lightning_oft.model.adapter_state import take
from lightning_oft.model.merging import merge, unmerge
from lightning_oft.model.traversal import walk


def check_place(trainer: Any, directory: str) -> None:
    """Raise OSError, on every process, where a fit's results could not be written; asked before it begins.

    A directory `merged` that holds anything but a model stays as it is, which is an error too.
    """
    problem: str | None = None
    if trainer.is_global_zero:
        try:
            Path(directory).mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=directory):
                pass
            check_replaceable(Path(directory) / "merged")
            if (Path(directory) / "adapter").is_file():
                raise FileExistsError(
                    f"{directory}/adapter: is a file where a directory is wanted: give another directory"
                )
        except OSError as error:  # ours say all by themselves, and have no number
            said = f"export_dir={directory!r}: cannot be written ({error.strerror}): give another directory"
            problem = str(error) if error.errno is None else said
    problem = trainer.strategy.broadcast(problem)
    if problem is not None:
        raise OSError(problem)


class Exporter:
    """Writes `adapter/` and `merged/` at the end of a fit. Every process takes part, rank zero writes.

    Args:
        trainer: the Trainer whose fit ends.
        pl_module: its LightningModule.
        root: the part of it that is adapted.
        adapter_name: the adapter to write.
        directory: where to write.
        source: the "last" state of the fit, or ModelCheckpoint's "best".
        merges: whether the fit ends with a merged model.
    """

    def __init__(
        self,
        trainer: Any,
        pl_module: nn.Module,
        root: nn.Module,
        adapter_name: str,
        directory: str,
        source: str,
        merges: bool,
    ) -> None:
        self._trainer, self._pl_module, self._root = trainer, pl_module, root
        self._adapter_name, self._directory, self._merges = adapter_name, Path(directory), merges
        self._best = _best_checkpoint(trainer) if source == "best" else None

    def write_unmerged(self) -> dict[str, str]:
        """Write `adapter/`; and `merged/` too, where it is another state than the fit ends with.

        Returns:
            Where each was written. The model is unmerged afterwards, as it was before.
        """
        written = {"adapter": str(self._directory / "adapter")}
        with _state_of_checkpoint(self._pl_module, self._best):
            state = take(self._root, self._adapter_name)
            if self._trainer.is_global_zero:
                write_peft(state, written["adapter"])
            if self._best is not None or not self._merges:
                device = strategy_adapter(self._trainer).merge_device(self._trainer)
                merge(self._root, keep_base="always", device=device)
                try:
                    written |= self._write_merged()
                finally:
                    unmerge(self._root)
        self._trainer.strategy.barrier("export")
        return written

    def write_merged(self) -> dict[str, str]:
        """Write `merged/` from the model that the fit ends with, now that it is merged; nothing if it is not."""
        if not self._merges or self._best is not None:
            return {}
        written = self._write_merged()
        self._trainer.strategy.barrier("export")
        return written

    def _write_merged(self) -> dict[str, str]:
        place = str(self._directory / "merged")
        state = strategy_adapter(self._trainer).whole_state(self._trainer, root_of(self._root))
        if self._trainer.is_global_zero:
            write_pretrained(self._root, place, _companions(self._trainer, self._pl_module), state)
        return {"merged model": place}


def _companions(trainer: Any, pl_module: Any) -> list[Any]:
    """Processors and tokenizers that a plain reader of the merged model needs beside it."""
    owners = (pl_module, getattr(trainer, "datamodule", None))
    names = ("image_processor", "processor", "tokenizer", "feature_extractor")
    found = (getattr(owner, name, None) for owner in owners if owner is not None for name in names)
    return [item for item in found if hasattr(item, "save_pretrained")]


def _best_checkpoint(trainer: Any) -> str | None:
    """The checkpoint to export from instead of the model as it is."""
    best: str = getattr(trainer.checkpoint_callback, "best_model_path", "")
    if not best:
        warnings.warn(
            "export_from='best': no ModelCheckpoint has a best model (give it a monitor); the last state is exported",
            stacklevel=2,
        )
    return best or None


@contextlib.contextmanager
def _state_of_checkpoint(pl_module: nn.Module, best: str | None) -> Iterator[None]:
    """Within this context the model has the trained tensors of a checkpoint; its own return afterwards."""
    if best is None:
        yield
        return
    theirs = read(best)["state_dict"]
    mine = _trained_tensors(pl_module)
    missing = [name for name in mine if name not in theirs]
    if missing:
        raise CheckpointError(
            f"{best}: lacks {missing[0]}, which this run trained; nothing was exported: set export_from='last'"
        )
    last = {name: tensor.detach().clone() for name, tensor in mine.items()}
    try:
        _copy(mine, theirs)
        yield
    finally:
        _copy(mine, last)


@torch.no_grad()
def _copy(into: dict[str, Tensor], values: dict[str, Tensor]) -> None:
    for name, tensor in into.items():
        tensor.copy_(values[name])


def _trained_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Everything of a model that an adapter trains, by state-dict name."""
    saved = saved_modules.saved_tensors(walk(model))
    owned = {id(tensor) for _, tensor, slot in saved if slot.live != saved_modules.BASE}
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {name: tensor for name, tensor in tensors.items() if is_rotation_key(name) or id(tensor) in owned}
