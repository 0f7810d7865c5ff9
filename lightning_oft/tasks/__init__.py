"""Ordinary LightningModules, with or without OFT. Names resolve on first use: one task does not import another's packages."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lightning_oft.tasks.base import Task as Task
    from lightning_oft.tasks.vision import ImageClassification

# What a configuration can name. `Task`, the base of them all, resolves too but trains nothing by itself.
__all__ = ["ImageClassification"]

_HOME = {"ImageClassification": "vision", "Task": "base"}


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
