"""Data for the tasks, as LightningDataModules. Names are resolved on first use, so that one does not import another's packages."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lightning_oft.data.vision.digits import DigitsDataModule
    from lightning_oft.data.vision.images import ImageDataModule

__all__ = ["DigitsDataModule", "ImageDataModule"]

_HOME = {"DigitsDataModule": "vision.digits", "ImageDataModule": "vision.images"}


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'lightning_oft.data' has no attribute {name!r}")
    value: object = getattr(import_module(f"lightning_oft.data.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
