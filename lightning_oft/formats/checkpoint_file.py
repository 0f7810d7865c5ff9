"""Reading a checkpoint file that anybody may have written: nothing in it runs, and what it says of adapters is checked."""

from __future__ import annotations

import contextlib
import pickle
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_oft.config import OFTConfig
from lightning_oft.formats.errors import first_line

ENTRY = "lightning_oft"
VERSION = 1
_FIELDS: dict[str, type] = {
    "version": int, "adapters": dict, "active": list, "merged": bool, "adapter_only": bool, "waiting": dict,
}  # fmt: skip
_ADAPTER_FIELDS: dict[str, type] = {"config": dict, "layers": dict, "fingerprints": dict, "owned": list}
_MAKERS = (None, "lightning.pytorch.cli.instantiate_module", "pytorch_lightning.cli.instantiate_module")
"""What may stand under the `_instantiator` of the hyperparameters, which Lightning imports and calls."""


class CheckpointError(ValueError):
    """A checkpoint that does not fit the model: where, what, remedy. Nothing has been loaded."""


def read(path: str | Path, map_location: Any = "cpu") -> dict[str, Any]:
    """The content of a checkpoint file; nothing in it can run code.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: it is no checkpoint, is damaged, or holds more than tensors and primitives.
    """
    if not Path(path).is_file():
        what = "is a directory, not a checkpoint file" if Path(path).is_dir() else "no such checkpoint file"
        raise FileNotFoundError(f"{path}: {what}; give one that ModelCheckpoint wrote")
    with refusing_damage(path):
        _check_unpacked_size(Path(path))
        checkpoint = torch.load(path, map_location=map_location, weights_only=True)
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("state_dict"), dict):
        raise CheckpointError(f"{path}: has no state_dict; give a file that Lightning's ModelCheckpoint wrote")
    _check_entry(path, checkpoint)
    _check_maker(path, checkpoint)
    return checkpoint


@contextlib.contextmanager
def refusing_damage(path: str | Path, trusted: bool = False) -> Iterator[None]:
    """Within this context, what torch raises over a file is one CheckpointError. Where objects are `trusted` (read
    without weights_only), what they raise is theirs."""
    try:
        yield
    except (CheckpointError, FileNotFoundError, PermissionError, ImportError, MemoryError):
        raise
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path}: is no checkpoint, is damaged, or holds more than tensors and plain values ({first_line(error)}); copy "
            "it again, or save it without objects of your own"
        ) from None
    except Exception as error:  # a damaged pickle raises anything
        if trusted and isinstance(error, AttributeError):  # a class that is gone
            raise
        raise CheckpointError(f"{path}: is no checkpoint or is damaged ({first_line(error)}); copy it again") from None


def is_rotation_key(name: str) -> bool:
    """Whether a state-dict name is a generator's."""
    return ".oft_R." in f".{name}"


def _check_unpacked_size(path: Path) -> None:
    """torch.save compresses nothing; a file that does could grow a thousandfold in memory."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            unpacked, size = sum(item.file_size for item in archive.infolist()), path.stat().st_size
        if unpacked > size:
            raise ValueError(f"declares {unpacked} bytes in a file of {size}")


def _check_entry(path: str | Path, checkpoint: Mapping[str, Any]) -> None:
    """Raise CheckpointError where what this library wrote beside the tensors is not what it writes."""
    entry = checkpoint.get(ENTRY, {})
    version = entry.get("version", VERSION) if isinstance(entry, dict) else None
    if isinstance(version, int) and version > VERSION:
        raise CheckpointError(f"{path}: written by a newer lightning_oft; upgrade it to read this checkpoint")
    rotations = [value for name, value in checkpoint["state_dict"].items() if is_rotation_key(name)]
    right = (
        _has(entry, _FIELDS, required=False)
        and all(isinstance(values, dict) for values in entry.get("waiting", {}).values())
        and all(_is_adapter(content) for content in entry.get("adapters", {}).values())
        and all(isinstance(value, Tensor) for value in rotations)
    )
    if not right:
        raise CheckpointError(f"{path}: what it says of its adapters is damaged; copy it again")


def _has(found: Any, fields: Mapping[str, type], required: bool) -> bool:
    if not isinstance(found, dict):
        return False
    return all(isinstance(found[key], kind) if key in found else not required for key, kind in fields.items())


def _is_adapter(content: Any) -> bool:
    if not _has(content, _ADAPTER_FIELDS, required=True):
        return False
    if not all(isinstance(parts, dict) for parts in content["layers"].values()):
        return False
    sizes = [size for parts in content["layers"].values() for size in parts.values()]
    prints = [value for value in content["fingerprints"].values() if value is not None]
    names = [*content["layers"], *content["fingerprints"], *content["owned"]]
    try:
        OFTConfig(**content["config"])
    except (TypeError, ValueError):
        return False
    return (
        all(type(size) is int and size > 1 for size in sizes)
        and all(isinstance(value, str) and ":" in value for value in prints)
        and all(isinstance(name, str) for name in names)
    )


def _check_maker(path: str | Path, checkpoint: Mapping[str, Any]) -> None:
    hyper_parameters = checkpoint.get("hyper_parameters", {})
    maker = hyper_parameters.get("_instantiator") if isinstance(hyper_parameters, Mapping) else None
    if maker not in _MAKERS:
        raise CheckpointError(
            f"{path}: asks for {str(maker)[:100]!r} to be called, which is not Lightning's own; load it where you trust it, "
            "and save it again without"
        )
