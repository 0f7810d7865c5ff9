"""WritingTask: what the language models that learn each token of a text share: their loss, gradient and scores."""

from typing import Any, ClassVar

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_oft.tasks.base import Dtype, LRInterval
from lightning_oft.tasks.text.generative import GenerativeTask
from lightning_oft.tasks.text.losses import right_tokens, targets_of, token_losses
from lightning_oft.tasks.text.metrics import NextToken

_UNIT = 1024
"""Tokens whose losses sum to what the backward pass starts from; keeps gradients in float16's range until they are scaled."""


class WritingTask(GenerativeTask):
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
        self.tokens = torch.zeros(())
        """How many were learned since the optimizer's last step, on this process."""

    @override
    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        check_batch(batch)
        labels = batch["labels"]
        losses, targets = token_losses(self(batch), labels, self.shift), targets_of(labels, self.shift)
        count = targets.sum()
        self.tokens = self.tokens.to(count.device) + count
        mean = losses.detach().sum() / count
        self.log("train/loss", mean, batch_size=len(targets), prog_bar=True)
        self.log("train/perplexity", mean.exp(), batch_size=len(targets))
        return losses.sum() / _UNIT if self._scales_gradients() else losses.sum() / count

    @override
    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Called with the gradients of a step, before they are clipped: make them a mean over its tokens.

        Lightning has divided them by the batches of a step, and by the processes.
        """
        if not self._scales_gradients():
            return
        tokens = float(self.trainer.strategy.reduce(self.tokens, reduce_op="sum"))
        batches = self.trainer.accumulate_grad_batches * self.trainer.world_size
        for parameter in self.parameters():
            if parameter.grad is not None:
                parameter.grad.mul_(_UNIT * batches / max(tokens, 1.0))
        self.tokens = torch.zeros_like(self.tokens)

    def _scales_gradients(self) -> bool:
        """Not under DeepSpeed, which keeps gradients to itself: there each batch's loss is a mean over its own tokens."""
        return "DeepSpeed" not in type(self.trainer.strategy).__name__

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
