"""What a fit leaves on disk: the adapter in PEFT's format, and the merged model as plain libraries load it."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .. import checkpoints
from ..adapters import save_adapter
from ..merged import save_merged
from ..surgery import merge, trained, unmerge

if TYPE_CHECKING:
    from .finetuning import OFTFinetuning


def export(
    trainer: Any, pl_module: nn.Module, root: nn.Module, callback: OFTFinetuning, device: torch.device | None
) -> dict[str, str]:
    """Write `adapter/` and `merged/` below the callback's export_dir; rank zero writes.

    Returns:
        Where each was written. The model is unmerged afterwards, as it was before.
    """
    assert callback.export_dir is not None
    directory = Path(callback.export_dir)
    places = {"adapter": str(directory / "adapter"), "merged model": str(directory / "merged")}
    with _state_to_export(trainer, pl_module, callback.export_from):
        if trainer.is_global_zero:
            save_adapter(root, places["adapter"], callback.adapter_name)
        merge(root, keep_base="always", device=device)
        if trainer.is_global_zero:
            save_merged(root, places["merged model"], companions=_companions(trainer, pl_module))
        trainer.strategy.barrier("export")
        unmerge(root)
    return places


def _companions(trainer: Any, pl_module: Any) -> list[Any]:
    """Processors and tokenizers that a plain reader of the merged model needs beside it."""
    owners = (pl_module, getattr(trainer, "datamodule", None))
    names = ("image_processor", "processor", "tokenizer", "feature_extractor")
    found = (getattr(owner, name, None) for owner in owners if owner is not None for name in names)
    return [item for item in found if hasattr(item, "save_pretrained")]


@contextlib.contextmanager
def _state_to_export(trainer: Any, pl_module: nn.Module, export_from: str) -> Iterator[None]:
    """Within this context the model is what is to be exported: the last state, or ModelCheckpoint's best."""
    best = getattr(trainer.checkpoint_callback, "best_model_path", "") if export_from == "best" else ""
    if export_from == "best" and not best:
        warnings.warn(
            "export_from='best': no ModelCheckpoint has a best model (give it a monitor); the last state is exported",
            stacklevel=2,
        )
    if not best:
        yield
        return
    theirs = torch.load(best, map_location="cpu", weights_only=True)["state_dict"]
    mine = _trained_tensors(pl_module)
    missing = [name for name in mine if name not in theirs]
    if missing:
        raise checkpoints.CheckpointError(f"{best}: lacks {missing[0]}, which this run trained; nothing was exported")
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
