"""ImageClassification: a transformers image classifier."""

from typing import Any

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor
from torch.nn.functional import cross_entropy
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassConfusionMatrix, MulticlassF1Score
from typing_extensions import override

from lightning_oft.tasks.base import Dtype, LRInterval, Task


class ImageClassification(Task):
    """Image classification with any model of transformers' AutoModelForImageClassification; the model is `self.model`.

    Batches are {"pixel_values": (B, C, H, W) float32, "labels": (B,) int64}.
    Logs `train/`, `val/` and `test/` `loss`, `accuracy` and `f1` (the mean over classes); with several test sets
    `test/<name>/...`, by the data module's `test_names`, else by number. The counts of what was taken for
    what are in `confusion`.

    Args:
        pretrained: The model to start from: a folder written by save_pretrained, or a hub id.
        num_classes: Number of classes. Where it differs from the model's a new head is made, which starts from random
            values: train it too, with oft.modules_to_save. None keeps the model's head.
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

    model: Any

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
        if num_classes is not None and num_classes < 2:
            raise ValueError(f"num_classes={num_classes}: classification needs at least 2")
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"label_smoothing={label_smoothing}: must lie in [0, 1)")
        self.new_head = self.load_model(AutoModelForImageClassification, num_labels=num_classes)
        """Names of the modules of the head, where that is new and untrained."""
        self.num_classes = int(self.model.config.num_labels or 0)
        if class_weights is not None and len(class_weights) != self.num_classes:
            raise ValueError(f"class_weights has {len(class_weights)} values; the model has {self.num_classes} classes")
        self.label_smoothing = label_smoothing
        self.register_buffer("class_weights", None if class_weights is None else torch.tensor(class_weights), False)
        self.train_metrics = classification_metrics(self.num_classes)
        self.val_metrics = classification_metrics(self.num_classes)
        self.test_metrics: dict[str, MetricCollection] = {}
        self.confusion: dict[str, Tensor] = {}
        """By split ("val", "test/new"): (num_classes, num_classes) int64 counts, a row a true class."""

    @override
    def setup(self, stage: str) -> None:
        """Called when the data is known: its classes must be the model's. A new head takes their names."""
        data = getattr(self.trainer, "datamodule", None)
        names = getattr(data, "class_names", [])
        if names and len(names) != self.num_classes:
            raise ValueError(
                f"the data has {len(names)} classes, the model {self.num_classes}; set model.init_args.num_classes: "
                f"{len(names)} to give the model a new head"
            )
        if self.new_head and names:
            self.model.config.id2label = dict(enumerate(names))
            self.model.config.label2id = {name: i for i, name in enumerate(names)}

    def forward(self, pixel_values: Tensor) -> Tensor:
        """pixel_values: (B, C, H, W) floating -> logits (B, num_classes) float32, whatever the model computes in."""
        logits: Tensor = self.model(pixel_values=pixel_values.to(self.model.dtype)).logits
        return logits.float()

    @override
    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss = self._score(batch, self.train_metrics)
        self.log("train/loss", loss, prog_bar=True)
        return loss

    @override
    def on_train_epoch_end(self) -> None:
        self._log_metrics("train", self.train_metrics)

    @override
    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        loss = self._score(batch, self.val_metrics)
        self.log("val/loss", loss, batch_size=len(batch["labels"]), prog_bar=True, sync_dist=True)

    @override
    def on_validation_epoch_end(self) -> None:
        self._log_metrics("val", self.val_metrics)

    @override
    def on_test_start(self) -> None:
        metrics = classification_metrics(self.num_classes).to(self.device)
        self.test_metrics = {split: metrics.clone() for split in self.test_splits()}

    @override
    def test_step(self, batch: dict[str, Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        split, metrics = list(self.test_metrics.items())[dataloader_idx]
        loss = self._score(batch, metrics)
        self.log(f"{split}/loss", loss, batch_size=len(batch["labels"]), add_dataloader_idx=False, sync_dist=True)

    @override
    def on_test_epoch_end(self) -> None:
        for split, metrics in self.test_metrics.items():
            self._log_metrics(split, metrics)

    @override
    def predict_step(self, batch: dict[str, Tensor], batch_idx: int, dataloader_idx: int = 0) -> dict[str, Tensor]:
        """-> logits (B, num_classes) float32, probabilities of the same shape, and the predicted labels (B,) int64."""
        logits = self(batch["pixel_values"])
        return {"logits": logits, "probabilities": logits.softmax(-1), "labels": logits.argmax(-1)}

    def _score(self, batch: dict[str, Tensor], metrics: MetricCollection) -> Tensor:
        """The loss of a batch, a scalar; the metrics have seen it."""
        # Waits for the device once a batch; torchmetrics' own check, turned off below, would do so four times, and a
        # wrong label that reached the loss on a GPU would end the process with an unreadable assertion.
        check_batch(batch, self.num_classes)
        logits, labels = self(batch["pixel_values"]), batch["labels"]
        metrics.update(logits.detach(), labels)
        weights: Tensor | None = self.class_weights  # type: ignore[assignment]
        return cross_entropy(logits, labels, weight=weights, label_smoothing=self.label_smoothing)

    def _log_metrics(self, split: str, metrics: MetricCollection) -> None:
        values = metrics.compute()
        metrics.reset()
        self.confusion[split] = values.pop("confusion").cpu()
        self.log_dict({f"{split}/{name}": value for name, value in values.items()}, prog_bar=split != "train")


def classification_metrics(num_classes: int) -> MetricCollection:
    """Accuracy over images, F1 averaged over classes, and the confusion matrix."""
    return MetricCollection(
        {
            "accuracy": MulticlassAccuracy(num_classes, average="micro", validate_args=False),
            "f1": MulticlassF1Score(num_classes, average="macro", validate_args=False),
            "confusion": MulticlassConfusionMatrix(num_classes, validate_args=False),
        }
    )


def check_batch(batch: Any, num_classes: int) -> None:
    """Raise ValueError, one line, when a batch is not what the task can take or a label is none of its classes."""
    if not isinstance(batch, dict) or not {"pixel_values", "labels"} <= set(batch):
        found = sorted(batch) if isinstance(batch, dict) else type(batch).__name__
        raise ValueError(f"batch: found {found}; a batch is a dict of pixel_values (B, C, H, W) and labels (B,)")
    labels: Tensor = batch["labels"]
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < num_classes:
        wrong = labels[(labels < 0) | (labels >= num_classes)][0]
        raise ValueError(f"labels: found class {int(wrong)}, the model has 0 to {num_classes - 1}; set num_classes")
