"""What differs between strategies, in one place: where rotations live, real steps, checkpoints, merge and export."""

from __future__ import annotations

from typing import Any

from lightning_oft.surgery.walk import class_names

from .base import Steps, Strategy
from .fsdp1 import FlatShards
from .fsdp2 import FullyShard
from .zero import Zero

__all__ = ["Steps", "Strategy", "strategy_of"]


def strategy_of(trainer: Any) -> Strategy:
    """The strategy's ways. Raises ValueError for one that cannot work."""
    names = class_names(trainer.strategy)
    if "DeepSpeedStrategy" in names:
        if getattr(trainer.strategy, "zero_stage_3", False):
            raise ValueError(
                "OFTFinetuning does not support DeepSpeed stage 3, which partitions the weights that a merge folds: "
                "use stage 1 or 2, or ModelParallelStrategy (FSDP2)"
            )
        return Zero()
    if "ModelParallelStrategy" in names:
        return FullyShard()
    if "FSDPStrategy" in names:
        return FlatShards()
    return Strategy()
