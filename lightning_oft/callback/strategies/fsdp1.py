"""FSDP1 (FSDPStrategy): parameters are views of flat shards, whole only where they are summoned.

A process sees any part of a block, so the projection and the merge summon what they work on, unit by unit. Lightning
loads FSDP1 checkpoints before any hook and wants every key in them: they are full, and the adapter is exported beside.
"""

import contextlib
import functools
from collections.abc import Collection, Iterator
from contextlib import AbstractContextManager, ExitStack
from typing import Any

from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.fsdp.wrap import CustomPolicy, _or_policy, _Policy, lambda_auto_wrap_policy
from typing_extensions import override

from lightning_oft.callback.strategies.base import StrategyAdapter
from lightning_oft.callback.strategies.steps import Steps
from lightning_oft.layers.rotation import Rotation
from lightning_oft.layers.state import every_rotation
from lightning_oft.model.merging import KeepBase, merge_layers
from lightning_oft.model.traversal import walk


@contextlib.contextmanager
def _summon(units: list[Any], writeback: bool = True) -> Iterator[None]:
    """The whole parameters of those that are FSDP1 units, and of nothing below them."""
    with ExitStack() as stack:
        for unit in (unit for unit in units if isinstance(unit, FullyShardedDataParallel)):
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

    adapter_only = False

    @override
    def before_inject(self, pl_module: nn.Module) -> None:
        super().before_inject(pl_module)
        kwargs = self.trainer.strategy.kwargs
        kwargs["auto_wrap_policy"] = with_rotations(kwargs.get("auto_wrap_policy"))

    @override
    def watch_steps(self, rotations: dict[str, Rotation], undo: ExitStack) -> Steps:
        with _summon([self.trainer.strategy.model]):  # the first unit that is summoned becomes the root
            return _SummonedSteps(self.trainer.optimizers, rotations, undo)

    @override
    def merge(self, root: nn.Module, keep_base: KeepBase, only: Collection[str]) -> None:
        """A layer's tensors lie in the flat parameter of the unit around it, its rotations in units of their own."""
        model = self.trainer.strategy.model
        with _summon([model], writeback=False):
            around: dict[nn.Module, nn.Module] = {}
        for unit in FullyShardedDataParallel.fsdp_modules(model):  # from the outermost to the innermost
            around |= dict.fromkeys(unit.modules(), unit)

        def gathered(layer: nn.Module) -> AbstractContextManager[None]:
            return _summon([around.get(layer), *every_rotation(layer)])

        merge_layers(walk(root), keep_base=keep_base, gathered=gathered, only=only)

    @override
    def whole(self) -> AbstractContextManager[Any]:
        offload = self.trainer.strategy.root_device.type != "cpu"
        return FullyShardedDataParallel.summon_full_params(self.trainer.strategy.model, offload_to_cpu=offload)

    @override
    def whole_state(self, root: nn.Module) -> dict[str, Tensor] | None:
        tensors = {**dict(root.named_parameters()), **dict(root.named_buffers())}
        return {
            ".".join(part for part in name.split(".") if part != "_fsdp_wrapped_module"): tensor.detach().cpu().clone()
            for name, tensor in tensors.items()
        }


_ROTATIONS = CustomPolicy(lambda module: {"mixed_precision": None} if isinstance(module, Rotation) else False)
"""Every rotation is a unit of its own, in float32 whatever the mixed precision."""


class _Both(_Policy):
    """What either of two policies makes a unit."""

    def __init__(self, one: _Policy, other: _Policy) -> None:
        self._policies = one, other

    def _run_policy(self, *args: Any) -> Any:
        first, second = (policy._run_policy(*args) for policy in self._policies)
        return {**first, **second}


def with_rotations(policy: Any) -> Any:
    """A wrap policy that makes every rotation a unit too."""
    if policy is None or policy is _ROTATIONS:
        return _ROTATIONS
    if isinstance(policy, _Policy):
        return policy if isinstance(policy, _Both) else _Both(policy, _ROTATIONS)
    rotations = functools.partial(lambda_auto_wrap_policy, lambda_fn=lambda module: isinstance(module, Rotation))
    return functools.partial(_or_policy, policies=[policy, rotations])
