"""Losses over tokens: pure functions. B rows, L tokens, V words of the vocabulary."""

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

IGNORED = -100
"""The label of a token that is not learned."""


def token_losses(logits_blv: Tensor, labels_bl: Tensor) -> Tensor:
    """Negative log-likelihood of each label given the tokens before it, (B, L - 1) float32; 0 where it is ignored.

    logits: (B, L, V) floating; labels: (B, L) int64, the tokens themselves or -100: they are shifted here.
    """
    targets = labels_bl[:, 1:]
    return cross_entropy(logits_blv[:, :-1].transpose(1, 2).float(), targets, ignore_index=IGNORED, reduction="none")


def targets_of(labels_bl: Tensor) -> Tensor:
    """Which of (B, L - 1) predictions are learned; bool."""
    return labels_bl[:, 1:] != IGNORED


def right_tokens(logits_blv: Tensor, labels_bl: Tensor) -> Tensor:
    """Which of (B, L - 1) predictions have their target as the likeliest word; bool, false where it is ignored."""
    return torch.as_tensor(logits_blv[:, :-1].argmax(-1) == labels_bl[:, 1:])
