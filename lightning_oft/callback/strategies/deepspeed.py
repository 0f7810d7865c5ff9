"""DeepSpeed stages 1 and 2: parameters are whole everywhere, what the optimizer trains is a float32 copy in parts.

Its optimizers step on those parts and then write the parameters, so no hook of an optimizer comes late enough, and a
parameter changed by itself would be overwritten at the next step.
"""

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from lightning_oft.callback import checks
from lightning_oft.callback.strategies.base import StrategyAdapter
from lightning_oft.callback.strategies.steps import Steps
from lightning_oft.layers.rotation import Rotation


@torch.no_grad()
def _change(rotations: list[Rotation], act: Callable[[list[Rotation]], None]) -> None:
    """Change rotations, and the float32 copies that the optimizer trains too; on all processes."""
    from deepspeed.utils import safe_set_full_fp32_param

    before = [rotation.weight.clone() for rotation in rotations]
    act(rotations)
    for rotation, old in zip(rotations, before, strict=True):
        if not torch.equal(old, rotation.weight):
            safe_set_full_fp32_param(rotation.weight, rotation.weight.detach().clone())


class DeepSpeedAdapter(StrategyAdapter):
    """DeepSpeed stages 1 and 2."""

    adapter_only = False

    def __init__(self, trainer: Any) -> None:
        super().__init__(trainer)
        if trainer.strategy.zero_stage_3:
            raise ValueError(
                "OFTFinetuning does not support DeepSpeed stage 3, which partitions the weights that a merge folds: "
                "use stage 1 or 2, or ModelParallelStrategy (FSDP2)"
            )

    @override
    def optimized(self) -> list[Tensor]:
        groups = [group for optimizer in self.trainer.optimizers for group in getattr(optimizer, "bit16_groups", ())]
        return super().optimized() + [tensor for group in groups for tensor in group]

    @override
    def watch_steps(self, rotations: dict[str, Rotation], undo: ExitStack) -> Steps:
        """Watch the engine, which counts the steps that were real."""
        engine, idle = self.trainer.strategy.model, set(rotations)
        for name, rotation in rotations.items():
            hook: Any = rotation.trained()[0].register_hook
            undo.callback(hook(lambda _, name=name: idle.discard(name)).remove)
        steps = Steps([], rotations, undo, change=_change)

        def step(*args: Any, **kwargs: Any) -> Any:
            before = engine.global_steps
            result = type(engine).step(engine, *args, **kwargs)
            if engine.global_steps != before:
                checks.check_gradients([name for name in rotations if name in idle])
                steps.stepped(rotations)
            return result

        engine.step = step
        undo.callback(engine.__dict__.pop, "step", None)
        return steps
