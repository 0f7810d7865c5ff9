"""Classification: what the classifiers of images, texts and tokens share: their head, loss, scores and predictions."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassConfusionMatrix, MulticlassF1Score
from typing_extensions import override

from lightning_oft.tasks.base import IGNORED, Task


class Classification(Task):
    """Base of the classifiers. A subclass calls `load_classifier` in its `__init__` and writes `forward`, which takes the
    `inputs` of a batch and gives logits (..., C) float32 for labels (...) int64."""

    model: Any

    inputs: ClassVar[Mapping[str, str]] = {}
    """Columns of a batch that `forward` takes, and their shapes."""
    optional_inputs: ClassVar[tuple[str, ...]] = ()
    """Columns that it takes where there are some."""
    label_shape: ClassVar[str] = "(B,)"

    def load_classifier(
        self,
        auto_class: Any,
        num_classes: int | None = None,
        label_smoothing: float = 0.0,
        class_weights: list[float] | None = None,
    ) -> None:
        """Load the library model, with a new head where `num_classes` asks for one, and make its metrics.

        Raises OSError when there is no such model, ValueError when an argument is out of its range.
        """
        if num_classes is not None and num_classes < 2:
            raise ValueError(f"num_classes={num_classes}: classification needs at least 2")
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"label_smoothing={label_smoothing}: must lie in [0, 1)")
        self.load_model(auto_class, num_labels=num_classes)
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

    @override
    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss, count = self._score(batch, self.train_metrics)
        self.log("train/loss", loss, batch_size=count, prog_bar=True)
        return loss

    @override
    def on_train_epoch_end(self) -> None:
        self._log_metrics("train", self.train_metrics)

    @override
    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        loss, count = self._score(batch, self.val_metrics)
        self.log("val/loss", loss, batch_size=count, prog_bar=True, sync_dist=True)

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
        loss, count = self._score(batch, metrics)
        self.log(f"{split}/loss", loss, batch_size=count, add_dataloader_idx=False, sync_dist=True)

    @override
    def on_test_epoch_end(self) -> None:
        for split, metrics in self.test_metrics.items():
            self._log_metrics(split, metrics)

    @override
    def predict_step(self, batch: dict[str, Tensor], batch_idx: int, dataloader_idx: int = 0) -> dict[str, Tensor]:
        """-> logits (..., C) float32, probabilities of the same shape, and the predicted labels (...) int64."""
        logits = self(**self._inputs(batch))
        return {"logits": logits, "probabilities": logits.softmax(-1), "labels": logits.argmax(-1)}

    def _inputs(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: batch[name] for name in (*self.inputs, *self.optional_inputs) if name in batch}

    def _score(self, batch: dict[str, Tensor], metrics: MetricCollection) -> tuple[Tensor, int]:
        """The mean loss of a batch, and of how many labels; the metrics have seen them."""
        # Waits for the device once a batch; torchmetrics' own check, turned off below, would do so four times, and a
        # wrong label that reached the loss on a GPU would end the process with an unreadable assertion.
        check_batch(batch, self.inputs, self.label_shape, self.num_classes)
        logits, labels = self(**self._inputs(batch)), batch["labels"]
        if labels.dim() > 1:
            scored = labels != IGNORED
            logits, labels = logits[scored], labels[scored]
        metrics.update(logits.detach(), labels)
        weights: Tensor | None = self.class_weights  # type: ignore[assignment]
        return cross_entropy(logits, labels, weight=weights, label_smoothing=self.label_smoothing), len(labels)

    def _log_metrics(self, split: str, metrics: MetricCollection) -> None:
        values = metrics.compute()
        metrics.reset()
        self.confusion[split] = values.pop("confusion").cpu()
        self.log_dict({f"{split}/{name}": value for name, value in values.items()}, prog_bar=split != "train")


def classification_metrics(num_classes: int) -> MetricCollection:
    """Accuracy over all that is classified, F1 averaged over classes, and the confusion matrix."""
    return MetricCollection(
        {
            "accuracy": MulticlassAccuracy(num_classes, average="micro", validate_args=False),
            "f1": MulticlassF1Score(num_classes, average="macro", validate_args=False),
            "confusion": MulticlassConfusionMatrix(num_classes, validate_args=False),
        }
    )


def check_batch(batch: Any, inputs: Mapping[str, str], label_shape: str, num_classes: int) -> None:
    """Raise ValueError, one line, when a batch is not what the task can take or a label is none of its classes."""
    if not isinstance(batch, dict) or not {*inputs, "labels"} <= set(batch):
        found = sorted(batch) if isinstance(batch, dict) else type(batch).__name__
        wanted = ", ".join(f"{name} {shape}" for name, shape in inputs.items())
        raise ValueError(f"batch: found {found}; a batch is a dict of {wanted} and labels {label_shape}")
    labels: Tensor = batch["labels"]
    if labels.dim() > 1:
        labels = labels[labels != IGNORED]
        if not len(labels):
            raise ValueError(f"labels: all are {IGNORED}, which is not scored; leave such batches out")
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < num_classes:
        wrong = labels[(labels < 0) | (labels >= num_classes)][0]
        raise ValueError(f"labels: found class {int(wrong)}, the model has 0 to {num_classes - 1}; set num_classes")
