"""Optimizers and schedules of the tasks: what is trainable at that moment, rotations without weight decay."""

from collections.abc import Callable
from typing import Any, Literal

from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import nn
from torch.optim.lr_scheduler import CyclicLR, OneCycleLR


def parameter_groups(module: nn.Module) -> list[dict[str, Any]]:
    """The trainable parameters of a module as torch.optim takes them, rotations in a group with weight_decay 0.

    The optimizer's own weight decay applies to the other group. Decay pulls a parameter to zero, and a generator of
    zero is the identity: decayed rotations drift back to the model one started from.

    Raises:
        ValueError: When nothing is trainable.
    """
    decayed: list[nn.Parameter] = []
    rotations: list[nn.Parameter] = []
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            (decayed if {"oft_R", "oft_embedding_R"}.isdisjoint(name.split(".")) else rotations).append(parameter)
    if not decayed and not rotations:
        raise ValueError(f"{type(module).__name__}: every parameter is frozen; adapt some layers or unfreeze some")
    groups: list[dict[str, Any]] = [{"params": decayed}, {"params": rotations, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def configure(
    module: nn.Module,
    optimizer: OptimizerCallable,
    lr_scheduler: LRSchedulerCallable | None = None,
    lr_interval: Literal["auto", "step", "epoch"] = "auto",
) -> OptimizerLRScheduler:
    """What configure_optimizers returns for the trainable parameters of a module; raises ValueError where it cannot.

    A schedule advances by `lr_interval`; "auto" is every step for OneCycleLR and CyclicLR, which count steps, and every
    epoch for all others.
    """
    groups = parameter_groups(module)
    try:
        made = _made("optimizer", optimizer, groups)
    except ValueError:
        if len(groups) == 1:
            raise
        # L-BFGS, for one, takes no groups, and decays nothing.
        made = _made("optimizer", optimizer, [parameter for group in groups for parameter in group["params"]])
    if lr_scheduler is None:
        return made  # type: ignore[no-any-return]
    schedule = _made("lr_scheduler", lr_scheduler, made)
    if lr_interval == "auto":
        lr_interval = "step" if isinstance(schedule, OneCycleLR | CyclicLR) else "epoch"
    # LightningCLI's ReduceLROnPlateau says what it watches, torch's own cannot; no other schedule watches anything.
    settings = {"scheduler": schedule, "interval": lr_interval, "monitor": getattr(schedule, "monitor", "val/loss")}
    return {"optimizer": made, "lr_scheduler": settings}  # type: ignore[return-value]


def _made(what: str, make: Callable[[Any], Any], given: Any) -> Any:
    try:
        return make(given)
    except (ValueError, TypeError, ArithmeticError) as error:
        raise ValueError(f"{what}: {error}; change its arguments") from error
