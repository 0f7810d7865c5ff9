"""Pictures with prompts, and pictures of one subject beside those of its class."""

from lightning_oft.data.diffusion.dreambooth import DreamBoothDataModule
from lightning_oft.data.diffusion.pictures import PictureDataModule

__all__ = ["DreamBoothDataModule", "PictureDataModule"]
