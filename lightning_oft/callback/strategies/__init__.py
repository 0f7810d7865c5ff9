"""What differs between Lightning's strategies, an adapter for each: where rotations live, real steps, checkpoints, merge."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from lightning_oft.callback.strategies.base import StrategyAdapter
from lightning_oft.model.traversal import class_names

__all__ = ["StrategyAdapter", "strategy_adapter"]

_ADAPTERS = {
    "DeepSpeedStrategy": ("deepspeed", "DeepSpeedAdapter"),
    "ModelParallelStrategy": ("fsdp2", "FSDP2Adapter"),
    "FSDPStrategy": ("fsdp1", "FSDP1Adapter"),
}
"""By the name of Lightning's class: the file and the class of ours, imported where that strategy is in use."""


def strategy_adapter(trainer: Any) -> StrategyAdapter:
    """The adapter for a Trainer's strategy. Raises ValueError for one that cannot work."""
    for name in class_names(trainer.strategy) & _ADAPTERS.keys():
        file, cls = _ADAPTERS[name]
        found: StrategyAdapter = getattr(import_module(f"{__name__}.{file}"), cls)(trainer)
        return found
    return StrategyAdapter(trainer)
