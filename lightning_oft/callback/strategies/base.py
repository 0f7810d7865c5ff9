"""One process, or DDP: what a strategy is asked, and the answers where every process has all parameters."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lightning_oft.callback import checks
from lightning_oft.model.activation import project
from lightning_oft.model.traversal import class_names

if TYPE_CHECKING:
    from lightning_oft.callback.strategies.steps import Steps

Gathered = Callable[[nn.Module], AbstractContextManager[Any]]


class StrategyAdapter:
    """One process, or DDP: every process has all parameters."""

    def before_inject(self, trainer: Any, pl_module: nn.Module) -> None:
        """Replace layers now that would otherwise be replaced after the injection, rotations and all."""
        plugin = trainer.precision_plugin
        if "BitsandbytesPrecision" in class_names(plugin):
            plugin.convert_module(pl_module)

    def injects_early(self, trainer: Any) -> bool:
        """Whether rotations may be put into what is built before configure_model."""
        return True

    def after_inject(self, trainer: Any, root: nn.Module) -> None:
        """Give new rotations the place that the strategy wants them to have."""

    def optimized(self, trainer: Any) -> list[Tensor]:
        """The parameters that the optimizers train."""
        groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
        return [tensor for group in groups for tensor in group["params"]]

    def watch_steps(self, trainer: Any, root: nn.Module, adapter_name: str) -> Steps:
        """Act after every real step from now on."""
        from lightning_oft.callback.strategies.steps import Steps

        return Steps(trainer.optimizers, checks.trainable_rotations(root, adapter_name))

    def merge_device(self, trainer: Any) -> torch.device | None:
        """Where to merge: Lightning has moved the model to the CPU by the end of a fit."""
        device = trainer.strategy.root_device
        return device if device.type != "cpu" else None

    def project(self, trainer: Any, root: nn.Module) -> None:
        """Pull every rotation back into its ball, outside of any step."""
        project(root)

    def adapter_only(self, wanted: bool) -> bool:
        """Whether checkpoints can leave the base out."""
        return wanted

    def gathered(self, trainer: Any) -> Gathered:
        """For a layer, a context in which its tensors are at hand."""
        return contextlib.nullcontext

    def prepare_checkpoints(self, pl_module: Any, adapter_only: bool) -> list[Any]:
        """Prepare the module for a strategy that reads and writes checkpoints without asking anybody; handles to undo."""
        return []

    def reshard(self, pl_module: nn.Module) -> None:
        """Called when the fit has ended, before anything is merged or exported: give back what was gathered."""

    def whole_state(self, trainer: Any, root: nn.Module) -> dict[str, Tensor] | None:
        """The whole tensors of a model by name, on rank zero; None where every process has them anyway."""
        return None
