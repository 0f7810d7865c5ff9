"""A LightningModule from a checkpoint, without the callback that wrote it."""

import io
import warnings
from pathlib import Path
from typing import Any, TypeVar

import lightning
import torch
from lightning.pytorch import LightningModule

from lightning_oft.formats import checkpoint as adapter_checkpoint
from lightning_oft.formats.checkpoint_file import read
from lightning_oft.model.fingerprint import refresh_fingerprints
from lightning_oft.model.traversal import walk

T = TypeVar("T", bound=LightningModule)


def load_from_checkpoint(cls: type[T], path: str | Path, **kwargs: Any) -> T:
    """A LightningModule with its adapters, from an adapter-only, full, merged or plain checkpoint.

    The module is made as `cls.load_from_checkpoint` makes it: from the hyperparameters in the file and `kwargs`; for
    an adapter-only checkpoint that must give it the base it was trained on.

    Args:
        cls: the LightningModule's class.
        path: a checkpoint file.
        **kwargs: arguments of the class that are not in the checkpoint, or that replace those that are; and
            `map_location`.

    Returns:
        The module in eval mode, its adapters active and not merged.

    Raises:
        CheckpointError: the base or the model is another one than the adapter was trained on.
        FileNotFoundError: there is no such file.
    """
    location = kwargs.pop("map_location", "cpu")
    checkpoint = read(path, location)
    # Lightning makes the module and calls its hooks; the tensors come when the adapters have their places. A file that
    # was put together by hand lacks the version that it asks for.
    buffer = io.BytesIO()
    torch.save({"pytorch-lightning_version": lightning.__version__, **checkpoint, "state_dict": {}}, buffer)
    buffer.seek(0)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Found keys that are in the model state dict but not in|The state dict in")
        model = cls.load_from_checkpoint(buffer, map_location=location, strict=False, weights_only=True, **kwargs)
    content = adapter_checkpoint.content_of(checkpoint)
    if content in ("adapter", "full"):
        adapter_checkpoint.put_adapters(model, checkpoint)
        adapter_checkpoint.complete(model, checkpoint)
    # A hook of the class's own, such as one that gives tensors their names back, has seen the file without them so far.
    cls.on_load_checkpoint(model, checkpoint)
    adapter_checkpoint.load_state(model, checkpoint["state_dict"], path)
    if content == "full":
        refresh_fingerprints(walk(model))
    devices = [value.device for value in checkpoint["state_dict"].values() if isinstance(value, torch.Tensor)]
    return model.to(devices[0] if devices else "cpu").eval()
