"""Scores over tokens, pairs and completions, whatever their batches and processes."""

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


class Preferences(Metric):
    """Mean loss over pairs, the share whose chosen completion has the higher reward, and the mean difference of the two."""

    full_state_update = False
    sums: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("sums", torch.zeros(3), dist_reduce_fx="sum")
        self.add_state("count", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, losses: Tensor, rewards: Tensor) -> None:
        """losses: (B,) floating; rewards: (2, B) floating, chosen and rejected."""
        margins = rewards[0] - rewards[1]
        self.sums += torch.stack([losses.detach().sum(), (margins > 0).sum(), margins.sum()])
        self.count += len(losses)

    def compute(self) -> dict[str, Tensor]:
        """-> "loss", "accuracy" and "margin", scalars; NaN where there was no pair."""
        return dict(zip(("loss", "accuracy", "margin"), self.sums / self.count, strict=True))


class Rewards(Metric):
    """Mean reward of completions, and their mean length."""

    full_state_update = False
    sums: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("sums", torch.zeros(2), dist_reduce_fx="sum")
        self.add_state("count", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, rewards: Tensor, lengths: Tensor) -> None:
        """rewards: (N,) floating; lengths: (N,) tokens."""
        self.sums += torch.stack([rewards.sum(), lengths.sum()])
        self.count += len(rewards)

    def compute(self) -> dict[str, Tensor]:
        """-> "reward" and "length", scalars; NaN where there was no completion."""
        return dict(zip(("reward", "length"), self.sums / self.count, strict=True))
