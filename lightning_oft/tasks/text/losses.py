"""Losses over tokens: pure functions. B rows, L tokens, V words of the vocabulary; a label
stands `shift` places after its prediction: 1, or 0 in a decoder that gets the labels shifted."""

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, logsigmoid

from lightning_oft.tasks.base import IGNORED

PREFERENCE_LOSSES = ("sigmoid", "robust", "ipo", "hinge")
POLICY_LOSSES = ("grpo", "dr_grpo", "dapo")


def token_losses(logits_blv: Tensor, labels_bl: Tensor, shift: int = 1) -> Tensor:
    """Negative log-likelihood of each label given the tokens before it, (B, L - shift) float32; 0 where it is ignored.

    logits: (B, L, V) floating; labels: (B, L) int64, the tokens themselves or -100: they are shifted here.
    """
    targets = labels_bl[:, shift:]
    logits = logits_blv[:, : targets.shape[1]].transpose(1, 2).float()
    return cross_entropy(logits, targets, ignore_index=IGNORED, reduction="none")


def targets_of(labels_bl: Tensor, shift: int = 1) -> Tensor:
    """Which of (B, L - shift) predictions are learned; bool."""
    return labels_bl[:, shift:] != IGNORED


def right_tokens(logits_blv: Tensor, labels_bl: Tensor, shift: int = 1) -> Tensor:
    """Which of (B, L - shift) predictions have their target as the likeliest word; bool, false where it is ignored."""
    targets = labels_bl[:, shift:]
    return torch.as_tensor(logits_blv[:, : targets.shape[1]].argmax(-1) == targets)


def log_probs(logits_blv: Tensor, labels_bl: Tensor) -> tuple[Tensor, Tensor]:
    """Of each row the log-probability of its targets, (B,) float32, and how many there are, (B,) int64."""
    return -token_losses(logits_blv, labels_bl).sum(-1), targets_of(labels_bl).sum(-1)


def token_log_probs(logits_btv: Tensor, ids_bt: Tensor) -> Tensor:
    """The log-probability of each token, (B, T) float32. logits: (B, T, V), of the token itself; ids: (B, T) int64."""
    return -cross_entropy(logits_btv.transpose(1, 2).float(), ids_bt, reduction="none")


def preference_losses(
    policy_2b: Tensor,
    reference_2b: Tensor,
    lengths_2b: Tensor,
    loss: str = "sigmoid",
    beta: float = 0.1,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Losses of B pairs, (B,), from the log-probabilities of completions, chosen and rejected.

    With h the chosen completion's log(policy / reference) less the rejected one's, and e = label_smoothing:

    - sigmoid: -log s(beta h) (Rafailov et al. 2023, eq. 7)
    - robust: (-(1 - e) log s(beta h) + e log s(-beta h)) / (1 - 2 e) (Chowdhury et al. 2024, eq. 9)
    - ipo: (h - 1 / (2 beta))^2, with log-probabilities a token (Azar et al. 2023, eq. 17)
    - hinge: max(0, 1 - beta h) (Zhao et al. 2023, SLiC)

    policy, reference: (2, B) floating; lengths: (2, B) tokens of the completions. Raises ValueError for another loss.
    """
    ratios = policy_2b - reference_2b
    if loss == "ipo":
        ratios = ratios / lengths_2b
    difference = ratios[0] - ratios[1]
    if loss == "ipo":
        return (difference - 1 / (2 * beta)) ** 2
    if loss == "hinge":
        return torch.relu(1 - beta * difference)
    if loss == "sigmoid":
        return -logsigmoid(beta * difference)
    if loss == "robust":
        right, wrong = -logsigmoid(beta * difference), -logsigmoid(-beta * difference)
        return ((1 - label_smoothing) * right - label_smoothing * wrong) / (1 - 2 * label_smoothing)
    raise ValueError(f"loss={loss!r}: must be one of {', '.join(PREFERENCE_LOSSES)}")


def group_advantages(rewards_bg: Tensor, scale_rewards: str = "group", everyone: Tensor | None = None) -> Tensor:
    """Rewards less the mean of their group, over a standard deviation + 1e-4 (Shao et al. 2024, section 4.1.2), (B, G).

    rewards: (B, G) floating, G completions of each of B prompts. The deviation is that of the group, or with "batch" that
    of the rewards of `everyone`, all processes; with "none" there is none (Liu et al. 2025).
    """
    centred = rewards_bg - rewards_bg.mean(1, keepdim=True)
    if scale_rewards == "none":
        return centred
    spread = (
        rewards_bg.std(1, keepdim=True)
        if scale_rewards == "group"
        else (rewards_bg if everyone is None else everyone).std()
    )
    return centred / (spread + 1e-4)


def policy_losses(
    policy_nt: Tensor, old_nt: Tensor, advantages_n: Tensor, low: float = 0.2, high: float = 0.2
) -> tuple[Tensor, Tensor]:
    """Clipped losses of the tokens of N completions, (N, T), and which of them the clip holds, (N, T) bool:
    -min(r A, clip(r, 1 - low, 1 + high) A), r = policy / old (Schulman et al. 2017, eq. 7; high: Yu et al. 2025, eq. 10).

    policy, old: (N, T) log-probabilities; advantages: (N,).
    """
    ratios, advantages = (policy_nt - old_nt).exp(), advantages_n[:, None]
    losses = -torch.min(ratios * advantages, ratios.clamp(1 - low, 1 + high) * advantages)
    is_held = ((ratios < 1 - low) & (advantages < 0)) | ((ratios > 1 + high) & (advantages > 0))
    return losses, is_held


def divergences(policy_nt: Tensor, reference_nt: Tensor, old_nt: Tensor) -> Tensor:
    """An estimate of KL(policy || reference) from each token, (N, T), never negative, whose mean and gradient are right:
    (q / p - log(q / p) - 1) p / old, with p the policy and q the reference (Schulman 2020, k3; the last factor corrects
    the gradient). All (N, T) log-probabilities.
    """
    ratios = reference_nt - policy_nt
    return (ratios.exp() - ratios - 1) * (policy_nt - old_nt).exp()
