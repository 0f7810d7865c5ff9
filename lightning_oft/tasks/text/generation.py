"""Text that a language model writes: prompts padded on the left, continued by transformers' generate."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_oft.tasks.modes import evaluating


def generate(
    model: Any, tokenizer: Any, input_ids_bl: Tensor, attention_mask_bl: Tensor, seed: int = 0, **options: Any
) -> list[str]:
    """What a model writes after each of B prompts, without special tokens.

    The model's mode and the process's random numbers are as before; `seed` decides what is drawn with do_sample.
    """
    devices = [model.device] if model.device.type == "cuda" else []
    options.setdefault(
        "pad_token_id", tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    )
    with evaluating(model), torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        made = model.generate(
            input_ids=input_ids_bl.to(model.device), attention_mask=attention_mask_bl.to(model.device), **options
        )
    start = 0 if model.config.is_encoder_decoder else input_ids_bl.shape[1]  # a decoder's answer has no prompt in it
    return list(tokenizer.batch_decode(made[:, start:], skip_special_tokens=True))


def say(model: Any, tokenizer: Any, prompts: Sequence[str], **options: Any) -> dict[str, str]:
    """By prompt, what a model writes after it. One at a time: padding moves a model's last digits."""
    said = {}
    for prompt in prompts:
        encoded = tokenizer(prompt, return_tensors="pt")
        (said[prompt],) = generate(model, tokenizer, encoded["input_ids"], encoded["attention_mask"], **options)
    return said


def check_packing(model: Any) -> None:
    """Raise ValueError, one line, when a model lets the documents of a packed row see each other.

    Compares what the first of two documents does to the second with what it does where the two are one: sixteen tokens,
    once a run, and no tolerance that small weights would pass.
    """
    rows = torch.tensor([[0, 1, 2, 3], [1, 0, 2, 3]], device=model.device)

    def reach(places: list[int]) -> float:
        at = torch.tensor([places] * 2, device=model.device)
        one, other = model(input_ids=rows, position_ids=at, use_cache=False).logits[:, 2:].float()
        return float((one - other).abs().max())

    with evaluating(model):
        apart, together = reach([0, 1, 0, 1]), reach([0, 1, 2, 3])
    if apart > 0.01 * together:
        raise ValueError(
            f"packing: {type(model).__name__} lets the documents of a row see each other; set packing: false"
        )
