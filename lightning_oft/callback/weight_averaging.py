"""Callbacks that average weights: a frozen base must come out of them as it went in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lightning_oft.model.freezing import is_frozen_norm
from lightning_oft.model.traversal import class_names, some, walk

_AVERAGES = {"WeightAveraging", "StochasticWeightAveraging"}


def check_order(trainer: Any, callback: Any) -> None:
    """Raise ValueError where a callback that copies the model stands before the one that changes it."""
    for other in trainer.callbacks[: trainer.callbacks.index(callback) if callback in trainer.callbacks else None]:
        if class_names(other) & _AVERAGES:
            raise ValueError(
                f"{type(other).__name__} stands before OFTFinetuning in Trainer(callbacks=...) and would average a model "
                "without rotations: put OFTFinetuning first"
            )


def check_averages(trainer: Any, pl_module: nn.Module) -> None:
    """Check callbacks that average weights, and let an average of equal numbers be that number.

    Raises:
        ValueError: StochasticWeightAveraging would reset the statistics of frozen norms, which no batch fills again, or
            a callback copied the model before it was built and would average next to nothing.
    """
    parameters = len(list(pl_module.parameters()))
    for callback in trainer.callbacks:
        names = class_names(callback)
        average = getattr(callback, "_average_model", None)
        if not names & _AVERAGES or average is None:
            continue
        if len(list(average.parameters())) != parameters:
            raise ValueError(
                f"{type(callback).__name__} has copied the model before all of it was built: build it in __init__ or "
                "configure_model"
            )
        resting = [name for name, module in walk(pl_module).items() if is_frozen_norm(module)]
        if resting and "StochasticWeightAveraging" in names:
            raise ValueError(
                f"StochasticWeightAveraging resets the statistics of {some(resting)}, which OFT keeps frozen: use "
                "EMAWeightAveraging or WeightAveraging, or train these norms by modules_to_save"
            )
        if getattr(average, "avg_fn", None) is not None:
            average.avg_fn = _exact(average.avg_fn)


def _exact(average: Callable[[Tensor, Tensor, Any], Tensor]) -> Callable[[Tensor, Tensor, Any], Tensor]:
    """The average of two equal numbers is that number. torch's exponential one, d x + (1 - d) x, rounds: the frozen base
    drifted by 3e-8 in 32 steps, other than after a resume, which starts from the base itself (measured)."""

    def exact(mine: Tensor, theirs: Tensor, count: Any) -> Tensor:
        return torch.where(mine == theirs, theirs, average(mine, theirs, count))

    return exact
