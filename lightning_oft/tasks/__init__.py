"""Ordinary LightningModules, with or without OFT; the library of a task's model is imported when one is made."""

from lightning_oft.tasks.base import Task as Task
from lightning_oft.tasks.diffusion import ControlledTextToImage, TextToImage
from lightning_oft.tasks.text import (
    CausalLM,
    PolicyOptimization,
    PreferenceOptimization,
    Seq2SeqLM,
    SequenceClassification,
    TokenClassification,
)
from lightning_oft.tasks.vision import ImageClassification

__all__ = [
    "CausalLM",
    "ControlledTextToImage",
    "ImageClassification",
    "PolicyOptimization",
    "PreferenceOptimization",
    "Seq2SeqLM",
    "SequenceClassification",
    "TextToImage",
    "TokenClassification",
]
