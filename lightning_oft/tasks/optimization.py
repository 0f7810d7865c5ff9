"""Optimizers and schedules of the tasks: what is trainable at that moment, rotations without weight decay."""

from collections.abc import Callable
from typing import Any, Literal

from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import nn
from torch.optim.lr_scheduler import CyclicLR, OneCycleLR, ReduceLROnPlateau

GENERATORS = frozenset({"oft_R", "oft_embedding_R"})
"""The name that holds an adapted layer's rotations, in parameter names and in files."""


def parameter_groups(module: nn.Module) -> list[dict[str, Any]]:
    """The trainable parameters of a module as torch.optim takes them, rotations in a group with weight_decay 0.

    The optimizer's own weight decay applies to the other group. Decay pulls a parameter to zero, and a generator of
    zero is the identity: decayed rotations drift back to the model one started from.

    Raises:
        ValueError: When nothing is trainable.
    """
    trainable = {name: p for name, p in module.named_parameters() if p.requires_grad}
    if not trainable:
        raise ValueError(f"{type(module).__name__}: every parameter is frozen; adapt some layers or unfreeze some")
    generators = {name for name in trainable if not GENERATORS.isdisjoint(name.split("."))}
    groups: list[dict[str, Any]] = [
        {"params": [p for name, p in trainable.items() if name not in generators]},
        {"params": [p for name, p in trainable.items() if name in generators], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def configure(
    module: nn.Module,
    optimizer: OptimizerCallable,
    lr_scheduler: LRSchedulerCallable | None = None,
    lr_interval: Literal["auto", "step", "epoch"] = "auto",
) -> OptimizerLRScheduler:
    """What configure_optimizers returns.

    Args:
        module: Whose trainable parameters are optimized.
        optimizer: Makes the optimizer from parameter groups.
        lr_scheduler: Makes the schedule from the optimizer.
        lr_interval: When the schedule advances. "auto" is every step for OneCycleLR and CyclicLR, which count steps,
            and every epoch for all others.

    Raises:
        ValueError: When the optimizer or the schedule refuses its arguments.
    """
    made = _made("optimizer", optimizer, parameter_groups(module))
    if lr_scheduler is None:
        return made  # type: ignore[no-any-return]
    schedule = _made("lr_scheduler", lr_scheduler, made)
    if lr_interval == "auto":
        lr_interval = "step" if isinstance(schedule, OneCycleLR | CyclicLR) else "epoch"
    settings: dict[str, Any] = {"scheduler": schedule, "interval": lr_interval}
    if isinstance(schedule, ReduceLROnPlateau):
        # LightningCLI's subclass says what it watches; torch's own cannot.
        settings["monitor"] = getattr(schedule, "monitor", "val/loss")
    return {"optimizer": made, "lr_scheduler": settings}  # type: ignore[return-value]


def _made(what: str, make: Callable[[Any], Any], given: Any) -> Any:
    try:
        return make(given)
    except (ValueError, TypeError, ArithmeticError) as error:
        raise ValueError(f"{what}: {error}; change its arguments") from error
