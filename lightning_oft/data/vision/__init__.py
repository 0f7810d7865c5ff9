"""Images: a folder or a data set of them, and the handwritten digits in a new domain."""

from lightning_oft.data.vision.digits import DigitsDataModule
from lightning_oft.data.vision.images import ImageDataModule

__all__ = ["DigitsDataModule", "ImageDataModule"]
