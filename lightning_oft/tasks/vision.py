"""ImageClassification: a transformers image classifier."""

from collections.abc import Mapping
from typing import ClassVar

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor

from lightning_oft.tasks.base import Dtype, LRInterval
from lightning_oft.tasks.classification import Classification


class ImageClassification(Classification):
    """Image classification with any model of transformers' AutoModelForImageClassification; the model is `self.model`.

    Batches are {"pixel_values": (B, C, H, W) float32, "labels": (B,) int64}.
    Logs `train/`, `val/` and `test/` `loss`, `accuracy` and `f1` (the mean over classes); with several test sets
    `test/<name>/...`, by the data module's `test_names`, else by number. The counts of what was taken for
    what are in `confusion`.

    Args:
        pretrained: The model to start from: a folder written by save_pretrained, or a hub id.
        num_classes: Number of classes. Where it differs from the model's a new head is made, which starts from random
            values and is trained whole. None keeps the model's head.
        optimizer: Gets what is trainable when the run starts; rotations are never decayed.
        lr_scheduler: Gets the optimizer. None keeps the learning rate.
        lr_interval: When the schedule advances; auto is every step for OneCycleLR and CyclicLR, else every epoch.
        label_smoothing: Share of the target that is spread over all classes, in [0, 1).
        class_weights: Weight of each class in the loss, in the order of the class ids.
        dtype: Data type that the weights are loaded in; "auto" for the checkpoint's.

    Raises:
        OSError: When there is no image classifier at `pretrained`.
        ValueError: When an argument is out of its range.
    """

    inputs: ClassVar[Mapping[str, str]] = {"pixel_values": "(B, C, H, W)"}

    def __init__(
        self,
        pretrained: str,
        num_classes: int | None = None,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        lr_scheduler: LRSchedulerCallable | None = None,
        lr_interval: LRInterval = "auto",
        label_smoothing: float = 0.0,
        class_weights: list[float] | None = None,
        dtype: Dtype = "float32",
    ) -> None:
        from transformers import AutoModelForImageClassification

        super().__init__(pretrained, dtype, optimizer=optimizer, lr_scheduler=lr_scheduler, lr_interval=lr_interval)
        self.save_hyperparameters(ignore=["optimizer", "lr_scheduler"])
        self.load_classifier(AutoModelForImageClassification, num_classes, label_smoothing, class_weights)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """pixel_values: (B, C, H, W) floating -> logits (B, num_classes) float32, whatever the model computes in."""
        logits: Tensor = self.model(pixel_values=pixel_values.to(self.model.dtype)).logits
        return logits.float()
