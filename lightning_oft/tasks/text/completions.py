"""Completions that a model wrote itself, and what is known of them. N completions, T tokens after P of their prompts."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass
class Sampled:
    """Completions of a batch's prompts, N of P tokens and T more, and what is known of them."""

    input_ids: Tensor
    """(N, P + T) int64."""
    attention_mask: Tensor
    """(N, P + T) int64: not padding, before and after."""
    mask: Tensor
    """(N, T) bool: the tokens of a completion, the one that ends it among them."""
    rewards: Tensor
    """(F, N) float32, by function; NaN where it has nothing to say."""
    advantages: Tensor
    """(N,) float32."""
    reference: Tensor | None = None
    """(N, T) log-probabilities by the reference, where it counts."""
    old: Tensor | None = None
    """(N, T) log-probabilities by the model that wrote them, once they are known."""
    uses: int = 0


def ends_of(model: Any, tokenizer: Any) -> list[int]:
    """The tokens that end a completion."""
    found = getattr(model.generation_config, "eos_token_id", None)
    found = tokenizer.eos_token_id if found is None else found
    return [] if found is None else [found] if isinstance(found, int) else list(found)


def is_end(written_nt: Tensor, ends: list[int]) -> Tensor:
    """Which of (N, T) tokens end a completion; bool."""
    return torch.isin(written_nt, torch.tensor(ends, device=written_nt.device, dtype=written_nt.dtype))


def own_tokens(written_nt: Tensor, ends: list[int]) -> Tensor:
    """Which of (N, T) tokens are a completion's, up to its first end and with it; the rest is padding. bool."""
    end = is_end(written_nt, ends)
    return torch.as_tensor(end.cumsum(-1) - end.int() == 0)


def check_batch(batch: Any) -> None:
    """Raise ValueError, one line, when a batch is not what the task can take."""
    wanted = {"input_ids", "attention_mask", "columns"}
    if not isinstance(batch, dict) or not wanted <= set(batch):
        found = sorted(batch) if isinstance(batch, dict) else type(batch).__name__
        raise ValueError(f"batch: found {found}; a batch is PromptDataModule's: {', '.join(sorted(wanted))}")
