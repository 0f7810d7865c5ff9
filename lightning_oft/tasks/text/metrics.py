"""NextToken: loss, perplexity and accuracy over tokens, whatever their batches and processes."""

import torch
from torch import Tensor
from torchmetrics import Metric


class NextToken(Metric):
    """Mean negative log-likelihood of the targets, its exponential, and the share of targets that are the likeliest word."""

    full_state_update = False
    loss_sum: Tensor
    right: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("loss_sum", torch.tensor(0.0), dist_reduce_fx="sum")
        self.add_state("right", torch.tensor(0), dist_reduce_fx="sum")
        self.add_state("count", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, losses: Tensor, right: Tensor, targets: Tensor) -> None:
        """losses: (B, L) floating, 0 where there is no target; right, targets: (B, L) bool."""
        self.loss_sum += losses.detach().sum()
        self.right += right.sum()
        self.count += targets.sum()

    def compute(self) -> dict[str, Tensor]:
        """-> "loss", "perplexity" and "accuracy", scalars; NaN where there was no target."""
        loss = self.loss_sum / self.count
        return {"loss": loss, "perplexity": loss.exp(), "accuracy": self.right / self.count}
