"""What a fit leaves on disk: the adapter in PEFT's format, and the merged model as plain libraries load it."""

from __future__ import annotations

import contextlib
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lightning_oft import checkpoints
from lightning_oft.adapters import contents_of, write_contents
from lightning_oft.merged import check_replaceable, root_of, save_merged
from lightning_oft.surgery import merge, trained, unmerge

from .strategies import strategy_of

if TYPE_CHECKING:
    from .finetuning import OFTFinetuning


def check_place(trainer: Any, directory: str | None) -> None:
    """Raise OSError, on every process, where a fit's results could not be written; asked before it begins.

    A directory `merged` that holds anything but a model stays as it is, which is an error too.
    """
    problem: str | None = None
    if directory is not None and trainer.is_global_zero:
        try:
            Path(directory).mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=directory):
                pass
            check_replaceable(Path(directory) / "merged")
            if (Path(directory) / "adapter").is_file():
                raise FileExistsError(
                    f"{directory}/adapter: is a file where a directory is wanted: give another directory"
                )
        except FileExistsError as error:
            problem = str(error) if error.errno is None else _unwritable(directory, error)
        except OSError as error:
            problem = _unwritable(directory, error)
    problem = trainer.strategy.broadcast(problem)
    if problem is not None:
        raise OSError(problem)


def _unwritable(directory: str, error: OSError) -> str:
    return f"export_dir={directory!r}: cannot be written ({error.strerror or error}): give another directory"


def export(trainer: Any, pl_module: nn.Module, root: nn.Module, callback: OFTFinetuning) -> dict[str, str]:
    """Write `adapter/` below the callback's export_dir; and `merged/` too, where it is another state than the fit ends
    with. Every process takes part, rank zero writes.

    Returns:
        Where each was written. The model is unmerged afterwards, as it was before.
    """
    if callback.export_dir is None:
        return {}
    written = {"adapter": str(Path(callback.export_dir) / "adapter")}
    best = _best(trainer, callback.export_from)
    with _state_of_checkpoint(pl_module, best):
        contents = contents_of(root, callback.adapter_name)
        if trainer.is_global_zero:
            write_contents(contents, written["adapter"])
        if best is not None or not callback.merge_on_fit_end:
            merge(root, keep_base="always", device=strategy_of(trainer).device(trainer))
            try:
                written |= _write_merged(trainer, pl_module, root, callback.export_dir)
            finally:
                unmerge(root)
    trainer.strategy.barrier("export")
    return written


def export_merged(trainer: Any, pl_module: nn.Module, root: nn.Module, callback: OFTFinetuning) -> dict[str, str]:
    """Write `merged/` below the callback's export_dir from the model that the fit ends with, now that it is merged."""
    if callback.export_dir is None or not callback.merge_on_fit_end or _best(trainer, callback.export_from) is not None:
        return {}
    written = _write_merged(trainer, pl_module, root, callback.export_dir)
    trainer.strategy.barrier("export")
    return written


def _write_merged(trainer: Any, pl_module: nn.Module, root: nn.Module, directory: str) -> dict[str, str]:
    place = str(Path(directory) / "merged")
    state = strategy_of(trainer).whole_state(trainer, root_of(root))
    if trainer.is_global_zero:
        save_merged(root, place, companions=_companions(trainer, pl_module), state=state)
    return {"merged model": place}


def _companions(trainer: Any, pl_module: Any) -> list[Any]:
    """Processors and tokenizers that a plain reader of the merged model needs beside it."""
    owners = (pl_module, getattr(trainer, "datamodule", None))
    names = ("image_processor", "processor", "tokenizer", "feature_extractor")
    found = (getattr(owner, name, None) for owner in owners if owner is not None for name in names)
    return [item for item in found if hasattr(item, "save_pretrained")]


def _best(trainer: Any, export_from: str) -> str | None:
    """The checkpoint to export from instead of the model as it is."""
    if export_from != "best":
        return None
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
    theirs = checkpoints.read(best)["state_dict"]
    mine = _trained_tensors(pl_module)
    missing = [name for name in mine if name not in theirs]
    if missing:
        raise checkpoints.CheckpointError(
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
    owned = {id(tensor) for _, tensor, slot in trained.slots(model) if slot.live != trained.BASE}
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {name: t for name, t in tensors.items() if checkpoints.is_rotation_key(name) or id(t) in owned}
