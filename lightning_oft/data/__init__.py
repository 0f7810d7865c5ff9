"""Data for the tasks, as LightningDataModules. Names resolve on first use: one does not import another's packages."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lightning_oft.data.base import SplitDataModule as SplitDataModule
    from lightning_oft.data.vision.digits import DigitsDataModule
    from lightning_oft.data.vision.images import ImageDataModule

# What a configuration can name. `SplitDataModule`, the base of them all, resolves too.
__all__ = ["DigitsDataModule", "ImageDataModule"]

_HOME = {"DigitsDataModule": "vision.digits", "ImageDataModule": "vision.images", "SplitDataModule": "base"}


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
