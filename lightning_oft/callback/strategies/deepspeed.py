"""DeepSpeed stages 1 and 2: parameters are whole everywhere, what the optimizer trains is a float32 copy in parts.

Its optimizers step on those parts and then write the parameters, so no hook of an optimizer comes late enough, and a
parameter changed by itself would be overwritten at the next step.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_oft import functional
from lightning_oft.callback import checks
from lightning_oft.callback.strategies.base import StrategyAdapter
from lightning_oft.callback.strategies.steps import Steps
from lightning_oft.layers.rotation import Rotation


class _EngineSteps(Steps):
    """Acts after every step of DeepSpeed's engine, which counts those that were real."""

    def __init__(self, trainer: Any, rotations: dict[str, Rotation]) -> None:
        super().__init__([], rotations)
        self._engine = trainer.strategy.model
        self._idle = set(rotations)
        self._gradients = [
            rotation.weight.register_hook(lambda _, name=name: self._idle.discard(name))  # type: ignore[no-untyped-call]
            for name, rotation in rotations.items()
        ]
        self._engine.step = self._step

    def _step(self, *args: Any, **kwargs: Any) -> Any:
        before = self._engine.global_steps
        result = type(self._engine).step(self._engine, *args, **kwargs)
        if self._engine.global_steps != before:
            checks.refuse_idle([name for name in self._rotations if name in self._idle])
            self.stepped(self._rotations)
        return result

    @override
    def project(self, rotation: Rotation) -> None:
        project(rotation)

    @override
    def remove(self) -> None:
        self._engine.__dict__.pop("step", None)
        for handle in self._gradients:
            handle.remove()


@torch.no_grad()
def project(rotation: Rotation) -> None:
    """Pull a rotation into its ball, and the float32 copy that the optimizer trains with it; on all processes."""
    if rotation.radius is None or not bool((functional.frobenius_norm(rotation.weight) > rotation.radius).any()):
        return
    from deepspeed.utils import safe_get_full_fp32_param, safe_set_full_fp32_param

    whole = safe_get_full_fp32_param(rotation.weight)
    functional.project(whole, rotation.radius)
    safe_set_full_fp32_param(rotation.weight, whole)
    rotation.weight.copy_(whole)


class DeepSpeedAdapter(StrategyAdapter):
    """DeepSpeed stages 1 and 2."""

    @override
    def optimized(self, trainer: Any) -> list[Tensor]:
        optimized = super().optimized(trainer)
        for optimizer in trainer.optimizers:
            optimized += [tensor for group in getattr(optimizer, "bit16_groups", ()) for tensor in group]
        return optimized

    @override
    def watch_steps(self, trainer: Any, root: nn.Module, adapter_name: str) -> Steps:
        return _EngineSteps(trainer, checks.trainable_rotations(root, adapter_name))

    @override
    def project(self, trainer: Any, root: nn.Module) -> None:
        for module in root.modules():
            if isinstance(module, Rotation):
                project(module)

    @override
    def adapter_only(self, wanted: bool) -> bool:
        return False
