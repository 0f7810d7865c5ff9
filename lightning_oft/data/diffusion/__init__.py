"""Pictures with prompts, pictures of one subject beside those of its class, and pictures with control images."""

from lightning_oft.data.diffusion.controls import ControlDataModule
from lightning_oft.data.diffusion.dreambooth import DreamBoothDataModule
from lightning_oft.data.diffusion.pictures import PictureDataModule

__all__ = ["ControlDataModule", "DreamBoothDataModule", "PictureDataModule"]
