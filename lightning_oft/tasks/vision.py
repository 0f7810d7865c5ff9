"""ImageClassification: a transformers image classifier as an ordinary LightningModule."""

import copy
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torch.nn.functional import cross_entropy
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassConfusionMatrix, MulticlassF1Score
from transformers import AutoConfig, AutoModelForImageClassification, PreTrainedModel
from transformers.utils import logging as transformers_logging
from typing_extensions import override

from lightning_oft.formats.pretrained import Companions
from lightning_oft.tasks.optimization import configure
from lightning_oft.tasks.sharding import shard_blocks

Batch = dict[str, Tensor]
"""pixel_values (B, C, H, W) float32 and labels (B,) int64."""


class ImageClassification(LightningModule):
    """Image classification with any model of transformers' AutoModelForImageClassification; the model is `self.model`.

    Logs `train/`, `val/` and `test/` `loss`, `accuracy` and `f1` (the mean over classes); with several test sets
    `test/<name>/...`, by the data module's `test_names`. The counts of what was taken for what are in `confusion`.

    Args:
        pretrained: The model to start from: a folder written by save_pretrained, or a hub id.
        num_classes: Number of classes. Where it differs from the model's a new head is made, which starts from random
            values: train it too, with oft.modules_to_save. None keeps the model's head.
        optimizer: Gets what is trainable when the run starts; rotations are never decayed.
        lr_scheduler: Gets the optimizer. None keeps the learning rate.
        lr_interval: When the schedule advances; auto is every step for OneCycleLR and CyclicLR, else every epoch.
        label_smoothing: Share of the target that is spread over all classes, in [0, 1).
        class_weights: Weight of each class in the loss, in the order of the class ids.

    Raises:
        OSError: When there is no image classifier at `pretrained`.
        ValueError: When an argument is out of its range.
    """

    def __init__(
        self,
        pretrained: str,
        num_classes: int | None = None,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        lr_scheduler: LRSchedulerCallable | None = None,
        lr_interval: Literal["auto", "step", "epoch"] = "auto",
        label_smoothing: float = 0.0,
        class_weights: list[float] | None = None,
    ) -> None:
        super().__init__()
        # Callables cannot travel in a checkpoint that is read with weights_only.
        self.save_hyperparameters(ignore=["optimizer", "lr_scheduler"])
        if num_classes is not None and num_classes < 2:
            raise ValueError(f"num_classes={num_classes}: classification needs at least 2")
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"label_smoothing={label_smoothing}: must lie in [0, 1)")
        self.model, self.head_names, self.has_new_head = load_classifier(pretrained, num_classes)
        """The transformers model; the modules whose shape depends on the number of classes; whether they are untrained."""
        self.image_processor = Companions(pretrained)
        """Written beside the merged model, so that pipelines find it."""
        self.num_classes = int(self.model.config.num_labels or 0)
        if class_weights is not None and len(class_weights) != self.num_classes:
            raise ValueError(f"class_weights has {len(class_weights)} values; the model has {self.num_classes} classes")
        self.label_smoothing = label_smoothing
        self.register_buffer("class_weights", None if class_weights is None else torch.tensor(class_weights), False)
        self.optimizer, self.lr_scheduler, self.lr_interval = optimizer, lr_scheduler, lr_interval
        self.train_metrics = classification_metrics(self.num_classes)
        self.val_metrics = classification_metrics(self.num_classes)
        self.test_metrics: dict[str, MetricCollection] = {}
        self.confusion: dict[str, Tensor] = {}
        """By split ("val", "test/new"): (num_classes, num_classes) int64 counts, a row a true class."""

    @override
    def setup(self, stage: str) -> None:
        """Called when the data is known: its classes must be the model's. A new head takes their names."""
        data = getattr(self.trainer, "datamodule", None)
        found = getattr(data, "num_classes", None) or self.num_classes
        if found != self.num_classes:
            raise ValueError(
                f"the data has {found} classes, the model {self.num_classes}; set model.init_args.num_classes: {found}"
                " to give the model a new head"
            )
        names = getattr(data, "class_names", None)
        if self.has_new_head and names:
            self.model.config.id2label = dict(enumerate(names))
            self.model.config.label2id = {name: i for i, name in enumerate(names)}

    @override
    def configure_model(self) -> None:
        """Called for every run: under ModelParallelStrategy (FSDP2) the model is sharded block by block."""
        if self.device_mesh is not None:
            shard_blocks(self.model, self.device_mesh)

    @override
    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Called when the run starts: optimize what is trainable by now, generators of rotations without weight decay."""
        return configure(self, self.optimizer, self.lr_scheduler, self.lr_interval)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """pixel_values: (B, C, H, W) float32 -> logits (B, num_classes) float32, whatever the model computes in."""
        logits: Tensor = self.model(pixel_values=pixel_values).logits
        return logits.float()

    @override
    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss = self._score(batch, self.train_metrics)
        self.log("train/loss", loss, prog_bar=True)
        return loss

    @override
    def on_train_epoch_end(self) -> None:
        """Called after the last batch of an epoch."""
        self._log_metrics("train", self.train_metrics)

    @override
    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        loss = self._score(batch, self.val_metrics)
        self.log("val/loss", loss, batch_size=len(batch["labels"]), prog_bar=True, sync_dist=True)

    @override
    def on_validation_epoch_end(self) -> None:
        """Called after the last batch of a validation run."""
        self._log_metrics("val", self.val_metrics)

    @override
    def on_test_start(self) -> None:
        """Called when the number of test sets is known."""
        count = len(self.trainer.num_test_batches)
        names = list(getattr(getattr(self.trainer, "datamodule", None), "test_names", None) or [])
        if len(names) != count:
            names = [str(i) for i in range(count)]
        splits = ["test"] if count == 1 else [f"test/{name}" for name in names]
        self.test_metrics = {split: classification_metrics(self.num_classes).to(self.device) for split in splits}

    @override
    def test_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        split, metrics = list(self.test_metrics.items())[dataloader_idx]
        loss = self._score(batch, metrics)
        self.log(f"{split}/loss", loss, batch_size=len(batch["labels"]), add_dataloader_idx=False, sync_dist=True)

    @override
    def on_test_epoch_end(self) -> None:
        """Called after the last batch of the last test set."""
        for split, metrics in self.test_metrics.items():
            self._log_metrics(split, metrics)

    @override
    def predict_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> dict[str, Tensor]:
        """-> logits (B, num_classes) float32, probabilities of the same shape, and the predicted labels (B,) int64."""
        logits = self(batch["pixel_values"])
        return {"logits": logits, "probabilities": logits.softmax(-1), "labels": logits.argmax(-1)}

    def _score(self, batch: Batch, metrics: MetricCollection) -> Tensor:
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
    if not isinstance(batch, dict) or "pixel_values" not in batch:
        found = sorted(batch) if isinstance(batch, dict) else type(batch).__name__
        raise ValueError(f"batch: found {found}; a batch is a dict of pixel_values (B, C, H, W) and labels (B,)")
    labels: Tensor | None = batch.get("labels")
    if labels is None:
        raise ValueError("batch: has no labels; only predict goes without")
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < num_classes:
        wrong = labels[(labels < 0) | (labels >= num_classes)][0]
        raise ValueError(f"labels: found class {int(wrong)}, the model has 0 to {num_classes - 1}; set num_classes")


def load_classifier(pretrained: str, num_classes: int | None = None) -> tuple[PreTrainedModel, list[str], bool]:
    """Load an image classifier, with a new head where the number of classes differs or the checkpoint has none.

    Returns:
        The model (float32, in train mode), the names of its head's modules, and whether the head is new.

    Raises:
        OSError: When there is no image classifier at `pretrained`; one line.
    """
    looks_local = pretrained.startswith(("/", ".", "~")) or pretrained.count("/") > 1
    if looks_local and not Path(pretrained).expanduser().is_dir():  # a typing error should not go and ask the hub
        raise FileNotFoundError(
            f"{pretrained}: no such folder; pretrained is one written by save_pretrained, or a hub id"
        )
    path = str(Path(pretrained).expanduser()) if looks_local else pretrained
    try:
        # False rather than its default, which asks at the terminal whether to run the Python files beside the weights.
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
        if num_classes is not None and num_classes != config.num_labels:
            config.num_labels = num_classes
        with quiet_transformers():
            model, info = AutoModelForImageClassification.from_pretrained(
                path, config=config, dtype=torch.float32, ignore_mismatched_sizes=True, output_loading_info=True
            )
    except Exception as error:  # transformers raises OSError, ValueError, KeyError and others for the same mistakes
        reason = str(error).strip().split("\n")[0][:300]
        raise OSError(
            f"{pretrained}: no image classifier could be loaded ({reason}); give a folder or a hub id"
        ) from error
    heads = find_heads(model)
    fresh = {str(key) for key in info["missing_keys"]} | {str(key[0]) for key in info["mismatched_keys"]}
    of_head = {key for key in fresh if key.startswith(tuple(f"{head}." for head in heads))}
    if fresh - of_head:
        named = ", ".join(sorted(fresh - of_head)[:3])
        rank_zero_warn(
            f"{pretrained}: {len(fresh - of_head)} weights are not in the checkpoint and start random: {named}"
        )
    if of_head:
        rank_zero_info(
            f"{pretrained}: a new head {', '.join(heads)} for {config.num_labels} classes; with OFT, train it too:"
            f" oft.modules_to_save: [{', '.join(heads)}]"
        )
    # Lightning leaves modes as they are, and from_pretrained leaves eval: dropout would stay off all through training.
    return model.train(), heads, bool(of_head)


def find_heads(model: PreTrainedModel) -> list[str]:
    """The modules whose parameters change shape with the number of classes: compared with the same model, one more."""
    config = copy.deepcopy(model.config)
    config.num_labels = int(model.config.num_labels or 0) + 1
    with torch.device("meta"):
        other = type(model)(config)
    shapes = {name: p.shape for name, p in other.named_parameters()}
    changed = (name for name, p in model.named_parameters() if shapes.get(name) != p.shape)
    return list(dict.fromkeys(name.rpartition(".")[0] for name in changed))


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Without the loading report's table: what it says, the lines above say."""
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity(logging.ERROR)
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
