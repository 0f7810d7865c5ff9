"""Data for the tasks, as LightningDataModules; what only some of them need is imported when they are set up."""

from lightning_oft.data.base import SplitDataModule as SplitDataModule
from lightning_oft.data.diffusion import ControlDataModule, DreamBoothDataModule, PictureDataModule
from lightning_oft.data.text.classification import TextClassificationDataModule, TokenClassificationDataModule
from lightning_oft.data.text.module import TextDataModule
from lightning_oft.data.text.preferences import PreferenceDataModule
from lightning_oft.data.text.prompts import PromptDataModule
from lightning_oft.data.text.seq2seq import Seq2SeqDataModule
from lightning_oft.data.vision.digits import DigitsDataModule
from lightning_oft.data.vision.images import ImageDataModule

# What a configuration can name; not `SplitDataModule`, the base of them all.
__all__ = [
    "ControlDataModule",
    "DigitsDataModule",
    "DreamBoothDataModule",
    "ImageDataModule",
    "PictureDataModule",
    "PreferenceDataModule",
    "PromptDataModule",
    "Seq2SeqDataModule",
    "TextClassificationDataModule",
    "TextDataModule",
    "TokenClassificationDataModule",
]
