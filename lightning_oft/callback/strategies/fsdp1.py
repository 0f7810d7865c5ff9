"""FSDP1 (FSDPStrategy): parameters are views of flat shards, whole only where they are summoned.

A process sees any part of a block, so the projection and the merge summon what they work on, unit by unit. Lightning
loads FSDP1 checkpoints before any hook and wants every key in them: they are full, and the adapter is exported beside.
"""

import functools
from collections.abc import Collection, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.fsdp.wrap import _or_policy, _Policy, lambda_auto_wrap_policy
from typing_extensions import override

from lightning_oft.callback.strategies.base import StrategyAdapter, check_cut
from lightning_oft.callback.strategies.steps import Steps
from lightning_oft.codecs import packed_codec
from lightning_oft.layers.rotation import Rotation
from lightning_oft.layers.state import every_rotation
from lightning_oft.model.merging import KeepBase, merge_layers
from lightning_oft.model.packed import packed_names
from lightning_oft.model.traversal import Modules, walk


@contextmanager
def _summon(units: Iterable[Any]) -> Iterator[None]:
    """The whole parameters of those that are FSDP1 units, and of nothing below them."""
    with ExitStack() as stack:
        for unit in (unit for unit in units if isinstance(unit, FullyShardedDataParallel)):
            stack.enter_context(FullyShardedDataParallel.summon_full_params(unit, recurse=False))
        yield


class FSDP1Adapter(StrategyAdapter):
    """FSDP1: rotations are units of their own through the wrap policy."""

    adapter_only = False
    can_unload = False  # the next run finds the units of this one, and wraps no new ones

    @override
    def prepare(self, pl_module: Any, adapter_only: bool, undo: ExitStack) -> None:
        super().prepare(pl_module, adapter_only, undo)
        kwargs = self.trainer.strategy.kwargs
        kwargs["auto_wrap_policy"] = with_rotations(kwargs.get("auto_wrap_policy"))
        undo.callback(pl_module.register_state_dict_post_hook(_without_quant_states).remove)

    @override
    def check_packed(self, modules: Modules) -> None:
        """A unit lays its weights into one tensor, and casts that: 4-bit codes must be stored in the dtype of all others."""
        check_cut(modules, "FSDPStrategy")
        packed = {name: codec for name, module in modules.items() if (codec := packed_codec(module)) is not None}
        if not packed:
            return
        strategy, plugin = self.trainer.strategy, self.trainer.precision_plugin
        parameters = [p for m in modules.values() if not isinstance(m, Rotation) for p in m._parameters.values()]
        if plugin.precision.endswith("-true"):  # Lightning is about to cast all of them
            dtypes = {plugin._desired_input_dtype}
        else:
            dtypes = {p.dtype for p in parameters if p is not None and p.is_floating_point()}
        dtypes |= {getattr(strategy.mixed_precision_config, "param_dtype", None)} - {None}
        for name, codec in packed.items():
            stored = modules[name].get_parameter("weight").dtype
            if not stored.is_floating_point or any(not codec.survives_cast(modules[name], dtype) for dtype in dtypes):
                others = " and ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
                raise ValueError(
                    f"FSDPStrategy: {name} is quantized and stored as {stored}, and its unit makes one tensor in {others} "
                    "of it: load the base and bnb_4bit_quant_storage in one dtype, that of the precision, or use "
                    "ModelParallelStrategy"
                )

    @override
    def watch_steps(self, rotations: dict[str, Rotation], undo: ExitStack) -> Steps:
        self._check_units()
        with _summon([self.trainer.strategy.model]):  # the first unit that is summoned becomes the root
            return Steps(self.trainer.optimizers, rotations, undo, gathered=_summon)

    def _check_units(self) -> None:
        """Raise ValueError for units that torch can neither save nor merge: not sharded, and frozen around a unit that
        trains, they lose their parameters in a backward pass."""
        units: list[Any] = FullyShardedDataParallel.fsdp_modules(self.trainer.strategy.model)
        names = {module: name for name, module in walk(self.trainer.lightning_module).items()}
        for unit in (unit for unit in units if unit.sharding_strategy.name == "NO_SHARD"):
            inner = [one for one in units if one is not unit and one in set(unit.modules())]
            below = {parameter for one in inner for parameter in one.parameters()}
            own = [parameter for parameter in unit.parameters() if parameter not in below]
            if own and not any(parameter.requires_grad for parameter in own) and any(p.requires_grad for p in below):
                name = names.get(unit.module) or "the whole model"
                raise ValueError(
                    f"FSDPStrategy does not shard, as on one process, and torch then loses the weights of {name}, where "
                    "nothing trains beside rotations: use strategy='auto' on one process and 'ddp' on several, or train "
                    "something in each unit (bias='oft_only')"
                )

    @override
    def merge(self, root: nn.Module, keep_base: KeepBase, only: Collection[str], requantize: bool = False) -> None:
        """A layer's tensors lie in the flat parameter of the unit around it, its rotations in units of their own."""
        model = self.trainer.strategy.model
        with _summon([model]):  # makes it the root, where no fit has
            units = FullyShardedDataParallel.fsdp_modules(model)  # from the outermost to the innermost
        around = {module: unit for unit in units for module in unit.modules()}

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


def _without_quant_states(module: Any, state_dict: dict[str, Any], prefix: str, local_metadata: Any) -> None:
    """Take out of a state dict how packed weights were quantized: beside their codes, which stay, that is the base's, and
    no layer takes it up again."""
    for name in packed_names(module):
        path = ".".join(part for part in name.split(".") if part != "_fsdp_wrapped_module")
        for key in [key for key in state_dict if key.startswith(f"{prefix}{path}.weight.")]:
            del state_dict[key]


class _WithRotations(_Policy):
    """The user's units, and every rotation as a unit of its own, in float32 whatever the mixed precision."""

    def __init__(self, policy: _Policy | None) -> None:
        self._policy = policy

    @override
    def _run_policy(self, root_module: nn.Module, ignored_modules: set[nn.Module], root_kwargs: dict[str, Any]) -> Any:
        users = self._policy._run_policy(root_module, ignored_modules, root_kwargs) if self._policy is not None else {}
        rotations = [one for one in root_module.modules() if isinstance(one, Rotation) and one not in ignored_modules]
        return {**users, **{rotation: {**root_kwargs, "mixed_precision": None} for rotation in rotations}}


def with_rotations(policy: Any) -> Any:
    """A wrap policy that makes every rotation a unit too."""
    if isinstance(policy, _WithRotations):  # of an earlier run with this strategy
        return policy
    if policy is None or isinstance(policy, _Policy):
        return _WithRotations(policy)
    rotations = functools.partial(lambda_auto_wrap_policy, lambda_fn=lambda module: isinstance(module, Rotation))
    return functools.partial(_or_policy, policies=[policy, rotations])
