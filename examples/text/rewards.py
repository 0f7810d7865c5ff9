"""Reward functions that configs/recipes/text-grpo.yaml and grpo.yaml name; yours may stand in any module, the working directory's too."""

import re
from typing import Any


def right_number(completions: list[Any], answer: list[Any], **_: Any) -> list[float]:
    """1 for a completion whose last number is that of the column `answer`, as in GSM8K, else 0."""
    pairs = zip(map(_text, completions), map(str, answer), strict=True)
    return [
        float(_last_number(text) is not None and _last_number(text) == _last_number(wanted)) for text, wanted in pairs
    ]


def brevity(completion_ids: list[list[int]], **_: Any) -> list[float]:
    """From 1 for no tokens down to 0 for 512 or more."""
    return [max(0.0, 1 - len(ids) / 512) for ids in completion_ids]


def letter_e(completions: list[Any], **_: Any) -> list[float]:
    """The share of letters e."""
    return [text.count("e") / max(len(text), 1) for text in map(_text, completions)]


def _text(completion: Any) -> str:
    """Of a chat, the assistant's turn."""
    return completion if isinstance(completion, str) else str(completion[-1]["content"])


def _last_number(text: str) -> float | None:
    found = re.findall(r"-?\d[\d,]*\.?\d*", text)
    return float(found[-1].replace(",", "")) if found else None
