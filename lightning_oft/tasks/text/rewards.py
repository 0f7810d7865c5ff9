"""Reward functions: named by import path, called with prompts and completions, and checked."""

import math
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

Reward = Callable[..., Sequence[float | None]]
"""Called with prompts, completions and completion_ids, N of each, and every other column of the data, N values each, all by
name; returns N numbers, or None for a completion that it has nothing to say of. As in TRL, so its functions work here."""


def import_reward(path: str) -> Reward:
    """The function at an import path, such as `package.module.function`.

    Raises ValueError, one line, when there is none.
    """
    module, _, name = path.rpartition(".")
    try:
        found = getattr(import_module(module), name, None) if module else None
    except ImportError as error:
        raise ValueError(f"rewards: {path}: {error}; give package.module.function") from error
    if not callable(found):
        raise ValueError(f"rewards: {path}: no such function; give package.module.function")
    reward: Reward = found
    return reward


def path_of(reward: str | Reward) -> str:
    """The import path of a function, by which a checkpoint finds it again."""
    if isinstance(reward, str):
        return reward
    return f"{getattr(reward, '__module__', '')}.{getattr(reward, '__qualname__', type(reward).__qualname__)}"


def rewards_of(
    rewards: Mapping[str, Reward],
    prompts: Sequence[Any],
    completions: Sequence[Any],
    completion_ids: Sequence[list[int]],
    columns: Mapping[str, Sequence[Any]],
    names: Sequence[str],
) -> Tensor:
    """What each of F functions gives each of N completions, (F, N) float32; NaN where it has nothing to say.

    Raises ValueError, one line that names the function and one of `names`, those of the rows, where a function raises,
    gives something else than N numbers, or no function gives a completion anything.
    """
    given = torch.full((len(rewards), len(completions)), math.nan)
    for number, (path, reward) in enumerate(rewards.items()):
        what = f"reward {path}, {', '.join(dict.fromkeys(names))}"
        try:
            found = list(reward(prompts=prompts, completions=completions, completion_ids=completion_ids, **columns))
        except Exception as error:
            reason = str(error).strip().split("\n")[0][:300]
            raise ValueError(f"{what}: raised {type(error).__name__}: {reason}") from error
        if len(found) != len(completions):
            raise ValueError(f"{what}: gave {len(found)} numbers for {len(completions)} completions")
        for place, value in enumerate(found):
            if value is None:
                continue
            try:
                given[number, place] = float(value)
            except (TypeError, ValueError):
                given[number, place] = math.nan
            if not given[number, place].isfinite():
                raise ValueError(
                    f"reward {path}, {names[place]}: gave {value!r} (for {str(completions[place])[:80]!r}); a reward is a "
                    "finite number, or None to leave the completion to other functions"
                )
    silent = given.isnan().all(0).nonzero()
    if len(silent):
        raise ValueError(f"rewards, {names[int(silent[0])]}: every function gave None; one must give a number")
    return given
