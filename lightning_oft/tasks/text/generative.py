"""GenerativeTask: what the language models that write share: scores by split, samples and predictions."""

from abc import ABC, abstractmethod
from typing import Any, ClassVar

from torch import Tensor
from torchmetrics import Metric
from typing_extensions import override

from lightning_oft.tasks.text.generation import generate, say
from lightning_oft.tasks.text.language_model import LanguageModel


class GenerativeTask(LanguageModel, ABC):
    """Base of the language models that write. A subclass names transformers' class that loads the model and the metric
    of its scores, calls `load_generator` in its `__init__`, and writes `score`."""

    auto_class: ClassVar[str]
    """transformers' class that loads the model."""
    metric_class: ClassVar[type[Metric]]
    """Computes a dict of scores by name."""

    def load_generator(self, prompts: list[str] | None, generation: dict[str, Any] | None) -> None:
        """Load model and tokenizer, and make the metrics. Raises as `load_language_model`."""
        import transformers

        self.prompts, self.generation = prompts or [], {"max_new_tokens": 40, **(generation or {})}
        self.load_language_model(getattr(transformers, self.auto_class))
        self.val_metrics = self.metric_class()
        self.test_metrics: dict[str, Metric] = {}

    @abstractmethod
    def score(self, batch: dict[str, Tensor], metric: Any, split: str) -> None:
        """Show a batch of one of the data's splits to a metric."""

    @override
    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.score(batch, self.val_metrics, "val")

    @override
    def on_validation_epoch_end(self) -> None:
        self._log("val", self.val_metrics)

    @override
    def on_test_start(self) -> None:
        self.test_metrics = {split: self.metric_class().to(self.device) for split in self.test_splits()}

    @override
    def test_step(self, batch: dict[str, Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        names = [*getattr(getattr(self.trainer, "datamodule", None), "test_names", ())]
        split = names[dataloader_idx] if dataloader_idx < len(names) else "test"
        self.score(batch, list(self.test_metrics.values())[dataloader_idx], split)

    @override
    def on_test_epoch_end(self) -> None:
        for split, metric in self.test_metrics.items():
            self._log(split, metric)

    @override
    def predict_step(self, batch: dict[str, Tensor], batch_idx: int, dataloader_idx: int = 0) -> list[str]:
        """-> what the model writes after each prompt, which are padded on the left."""
        return generate(self.model, self.tokenizer, batch["input_ids"], batch["attention_mask"], **self.generation)

    @override
    def samples(self) -> dict[str, str]:
        return say(self.model, self.tokenizer, self.prompts, **self.generation)

    def _log(self, split: str, metric: Metric) -> None:
        self.log_dict({f"{split}/{name}": value for name, value in metric.compute().items()}, prog_bar=split == "val")
        metric.reset()
