"""Ordinary LightningModules, with or without OFT. Names are resolved on first use, so that one does not import another's packages."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lightning_oft.tasks.base import Task as Task
    from lightning_oft.tasks.vision import ImageClassification

# The tasks that a configuration can name. `Task`, their base, resolves too but trains nothing by itself.
__all__ = ["ImageClassification"]

_HOME = {"ImageClassification": "vision", "Task": "base"}


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'lightning_oft.tasks' has no attribute {name!r}")
    value: object = getattr(import_module(f"lightning_oft.tasks.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
