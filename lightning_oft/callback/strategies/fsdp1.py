"""FSDP1 (FSDPStrategy): parameters are views of flat shards, whole only where they are summoned.

A process sees any part of a block, so the projection and the merge summon what they work on, unit by unit. Lightning
loads FSDP1 checkpoints before any hook and wants every key in them: they are full, and the adapter is exported beside.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_oft.callback import checks
from lightning_oft.callback.strategies.base import Gathered, StrategyAdapter
from lightning_oft.callback.strategies.steps import Steps
from lightning_oft.layers.rotation import Rotation
from lightning_oft.model.traversal import class_names, oft_layers


def _is_unit(module: nn.Module) -> bool:
    return "FullyShardedDataParallel" in class_names(module)


def _rotation_units(root: nn.Module) -> list[nn.Module]:
    return [m for m in root.modules() if _is_unit(m) and isinstance(m.module, Rotation)]


@contextlib.contextmanager
def _summon(units: list[nn.Module], writeback: bool = True) -> Iterator[None]:
    """The whole parameters of these units, and of nothing below them."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    with contextlib.ExitStack() as stack:
        for unit in units:
            stack.enter_context(FullyShardedDataParallel.summon_full_params(unit, recurse=False, writeback=writeback))
        yield


class _SummonedSteps(Steps):
    """Projects a rotation while its whole generators are summoned; a process may hold half a block."""

    @override
    def project(self, rotation: Any) -> None:
        if rotation.radius is not None:
            with _summon([rotation]):
                rotation.module.project()

    @override
    def check_series(self) -> None:
        with _summon(list(self._rotations.values())):
            super().check_series()


class FSDP1Adapter(StrategyAdapter):
    """FSDP1: rotations are units of their own through the wrap policy."""

    @override
    def before_inject(self, trainer: Any, pl_module: nn.Module) -> None:
        super().before_inject(trainer, pl_module)
        kwargs = trainer.strategy.kwargs
        kwargs["auto_wrap_policy"] = with_rotations(kwargs.get("auto_wrap_policy"))

    @override
    def watch_steps(self, trainer: Any, root: nn.Module, adapter_name: str) -> Steps:
        return _SummonedSteps(trainer.optimizers, checks.trainable_rotations(root, adapter_name))

    @override
    def merge_device(self, trainer: Any) -> torch.device | None:
        return None

    @override
    def project(self, trainer: Any, root: nn.Module) -> None:
        with _summon([trainer.strategy.model]):  # the first unit that is summoned becomes the root
            for unit in _rotation_units(root):
                with _summon([unit]):
                    unit.module.project()  # type: ignore[union-attr, operator]

    @override
    def adapter_only(self, wanted: bool) -> bool:
        return False

    @override
    def gathered(self, trainer: Any) -> Gathered:
        """A layer's tensors lie in the flat parameter of the unit around it, its rotations in units of their own."""
        with _summon([trainer.strategy.model], writeback=False):
            around: dict[int, nn.Module] = {}
        _units_around(trainer.strategy.model, None, around)

        def gather(layer: nn.Module) -> Any:
            oft_r: Any = layer.oft_R
            below = _rotation_units(oft_r)
            unit = around.get(id(layer))
            return _summon([*([unit] if unit is not None else []), *below])

        return gather

    @override
    def whole_state(self, trainer: Any, root: nn.Module) -> dict[str, Tensor] | None:
        """The whole model is summoned at once, on rank zero's CPU: FSDP1 has no other way to name it."""
        from torch.distributed.fsdp import FullyShardedDataParallel

        offload = {"offload_to_cpu": trainer.strategy.root_device.type != "cpu", "rank0_only": False}
        with FullyShardedDataParallel.summon_full_params(trainer.strategy.model, writeback=False, **offload):
            return {
                ".".join(part for part in name.split(".") if part != "_fsdp_wrapped_module"): value.detach()
                .cpu()
                .clone()
                for name, value in {**dict(root.named_parameters()), **dict(root.named_buffers())}.items()
            }


def _units_around(module: nn.Module, unit: nn.Module | None, around: dict[int, nn.Module]) -> None:
    unit = module if _is_unit(module) else unit
    if unit is not None:
        around.setdefault(id(module), unit)
    for child in module.children():
        _units_around(child, unit, around)


def with_rotations(policy: Any) -> Any:
    """A wrap policy that also makes every rotation a unit of its own, in float32 whatever the mixed precision."""
    from torch.distributed.fsdp.wrap import _Policy

    class WithRotations(_Policy):
        def __init__(self, inner: Any) -> None:
            self.inner = inner

        def _run_policy(self, root_module: nn.Module, ignored_modules: Any, root_kwargs: Any) -> Any:
            found = self.inner._run_policy(root_module, ignored_modules, root_kwargs) if self.inner is not None else {}
            for layer in oft_layers(root_module).values():
                for module in layer.oft_R.modules():  # type: ignore[union-attr]
                    if isinstance(module, Rotation):
                        found[module] = {**root_kwargs, "mixed_precision": None}
            return found

    if policy is None or isinstance(policy, _Policy):
        return policy if type(policy).__name__ == "WithRotations" else WithRotations(policy)
    return functools.partial(_function_with_rotations, policy)


def _function_with_rotations(policy: Any, module: nn.Module, recurse: bool, nonwrapped_numel: int) -> bool:
    inner = policy(module=module, recurse=recurse, nonwrapped_numel=nonwrapped_numel)
    return True if recurse else isinstance(module, Rotation) or bool(inner)
