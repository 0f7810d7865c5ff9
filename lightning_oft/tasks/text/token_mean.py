"""TokenMean: losses whose gradient is a mean over all tokens of one step of the optimizer."""

from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

_UNIT = 1024
"""Tokens whose losses sum to what the backward pass starts from; keeps gradients in float16's range until they are scaled."""


class TokenMean(LightningModule):
    """Base of the tasks that divide by tokens: over accumulated batches and processes, whatever part of them each has. A
    step in which `token_mean` was not called keeps its gradients."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.tokens = torch.zeros(())
        """How many were learned since the optimizer's last step, on this process."""

    def token_mean(self, total: Tensor, count: Tensor) -> Tensor:
        """What a training step returns for the sum of its losses over `count` tokens."""
        self.tokens = self.tokens.to(count.device) + count
        return total / _UNIT if self._scales_gradients() else total / count

    @override
    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Called with the gradients of a step, before they are clipped: make them a mean over its tokens.

        Lightning has divided them by the batches of a step, and by the processes.
        """
        if not self._scales_gradients():
            return
        tokens = float(self.trainer.strategy.reduce(self.tokens.to(self.device), reduce_op="sum"))
        if not tokens:
            return
        batches = self.trainer.accumulate_grad_batches * self.trainer.world_size
        for parameter in self.parameters():
            if parameter.grad is not None:
                parameter.grad.mul_(_UNIT * batches / tokens)
        self.tokens = torch.zeros_like(self.tokens)

    def _scales_gradients(self) -> bool:
        """Not under DeepSpeed, which keeps gradients to itself: there each batch's loss is a mean over its own tokens."""
        return "DeepSpeed" not in type(self.trainer.strategy).__name__
