"""Scores over tokens, pairs and completions, whatever their batches and processes."""

from typing import ClassVar

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


class Means(Metric):
    """Base of the metrics that are means, over what was shown, of numbers by `names`. A subclass writes `update`, which
    calls `add`."""

    full_state_update = False
    names: ClassVar[tuple[str, ...]]
    sums: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("sums", torch.zeros(len(self.names)), dist_reduce_fx="sum")
        self.add_state("count", torch.tensor(0), dist_reduce_fx="sum")

    def add(self, *numbers: Tensor) -> None:
        """Numbers (N,) of each name."""
        self.sums += torch.stack([one.detach().sum() for one in numbers])
        self.count += len(numbers[0])

    def compute(self) -> dict[str, Tensor]:
        """-> a scalar by name; NaN where nothing was shown."""
        return dict(zip(self.names, self.sums / self.count, strict=True))


class Preferences(Means):
    """Mean loss over pairs, the share whose chosen completion has the higher reward, and the mean difference of the two."""

    names = ("loss", "accuracy", "margin")

    def update(self, losses: Tensor, rewards: Tensor) -> None:
        """losses: (B,) floating; rewards: (2, B) floating, chosen and rejected."""
        margins = rewards[0] - rewards[1]
        self.add(losses, margins > 0, margins)


class Rewards(Means):
    """Mean reward of completions, and their mean length."""

    names = ("reward", "length")

    def update(self, rewards: Tensor, lengths: Tensor) -> None:
        """rewards: (N,) floating; lengths: (N,) tokens."""
        self.add(rewards, lengths)
