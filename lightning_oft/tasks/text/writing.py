"""WritingTask: what the language models that learn each token of a text share: their loss, gradient and scores."""

from typing import Any, ClassVar

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor
from typing_extensions import override

from lightning_oft.tasks.base import Dtype, LRInterval
from lightning_oft.tasks.text.generative import GenerativeTask
from lightning_oft.tasks.text.losses import right_tokens, targets_of, token_losses
from lightning_oft.tasks.text.metrics import NextToken
from lightning_oft.tasks.text.token_mean import TokenMean


class WritingTask(TokenMean, GenerativeTask):
    """Base of the language models that learn each token of a text. A subclass names transformers' class that loads the model, and
    writes `forward`, which takes a batch and gives logits (B, L, V) for its labels (B, L).

    A gradient is the mean over all tokens that are learned in one step of the optimizer, over accumulated batches and
    processes. Logs `train/`, `val/` and `test/` `loss`, `perplexity` and `accuracy`, all means over tokens; with
    several test sets `test/<name>/...`.
    """

    shown_scores = ("perplexity",)
    metric_class = NextToken

    shift: ClassVar[int] = 1
    """How many places after a prediction its label stands."""

    def __init__(
        self,
        pretrained: str,
        prompts: list[str] | None = None,
        generation: dict[str, Any] | None = None,
        activation_checkpointing: bool = False,
        neftune_alpha: float = 0.0,
        new_tokens: list[str] | None = None,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        lr_scheduler: LRSchedulerCallable | None = None,
        lr_interval: LRInterval = "auto",
        dtype: Dtype = "float32",
        quantization_config: Any = None,
    ) -> None:
        super().__init__(
            pretrained, dtype, quantization_config, activation_checkpointing, neftune_alpha, new_tokens,
            optimizer, lr_scheduler, lr_interval,
        )  # fmt: skip
        self.save_hyperparameters(ignore=["optimizer", "lr_scheduler"])
        self.load_generator(prompts, generation)

    @override
    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        check_batch(batch)
        labels = batch["labels"]
        losses, targets = token_losses(self(batch), labels, self.shift), targets_of(labels, self.shift)
        count = targets.sum()
        mean = losses.detach().sum() / count
        self.log("train/loss", mean, batch_size=len(targets), prog_bar=True)
        self.log("train/perplexity", mean.exp(), batch_size=len(targets))
        return self.token_mean(losses.sum(), count)

    @override
    def score(self, batch: dict[str, Tensor], metric: NextToken, split: str) -> None:
        check_batch(batch)
        logits, labels, shift = self(batch), batch["labels"], self.shift
        metric.update(
            token_losses(logits, labels, shift), right_tokens(logits, labels, shift), targets_of(labels, shift)
        )


def check_batch(batch: Any) -> None:
    """Raise ValueError, one line, when a batch is not what the task can take."""
    if not isinstance(batch, dict) or not {"input_ids", "labels"} <= set(batch):
        found = sorted(batch) if isinstance(batch, dict) else type(batch).__name__
        raise ValueError(f"batch: found {found}; a batch is a dict of input_ids (B, L) and labels (B, L)")
