"""Text to image with the pipelines of diffusers, as an ordinary LightningModule."""

from lightning_oft.tasks.diffusion.controlled import ControlledTextToImage
from lightning_oft.tasks.diffusion.text_to_image import TextToImage

__all__ = ["ControlledTextToImage", "TextToImage"]
