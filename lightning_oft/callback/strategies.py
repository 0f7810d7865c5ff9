"""What differs between strategies, in one place: when to inject, how to see real steps, where and how to merge."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from .. import checkpoints
from ..layers import Rotation
from ..rotation import SERIES_TOLERANCE
from ..surgery import oft_layers
from ..surgery.sharded import gather_back
from ..surgery.walk import class_names
from . import guards

_WATCH_EVERY = 100
"""Steps between two looks at the series' error: a look waits for the device."""


class Steps:
    """Acts after every real optimizer step: projects what that optimizer trains, and checks that it trains.

    A post hook of the raw optimizer is the only place that equals real updates under accumulation, manual
    optimization, gradient scalers that skip, and LBFGS (measured).
    """

    def __init__(self, trainer: Any, rotations: dict[str, Rotation]) -> None:
        self._handles = []
        self._rotations = rotations
        self._warned = False
        self._count = 0
        for optimizer in trainer.optimizers:
            held = {id(tensor) for group in optimizer.param_groups for tensor in group["params"]}
            own = {name: rotation for name, rotation in rotations.items() if id(rotation.weight) in held}
            raw = getattr(optimizer, "optimizer", optimizer)
            self._handles.append(raw.register_step_post_hook(self._after(own)))

    def _after(self, own: dict[str, Rotation]) -> Any:
        checked = False

        def after_step(*_: Any) -> None:
            nonlocal checked
            if not checked:
                guards.check_gradients(own)
                checked = True
            for rotation in own.values():
                rotation.project()
            self._count += 1
            if self._count % _WATCH_EVERY == 0:
                self.check_series()

        return after_step

    def check_series(self) -> None:
        """Warn once where a truncated series is less orthogonal than float32 is."""
        if self._warned:
            return
        errors = {name: rotation.error_bound() for name, rotation in self._rotations.items()}
        name = max(errors, key=lambda key: errors[key], default=None)
        if name is None or errors[name] <= SERIES_TOLERANCE:
            return
        self._warned = True
        terms = self._rotations[name].terms
        warnings.warn(
            f"{name}: its rotation has grown so large that a series of {terms} terms is off orthogonality by "
            f"{errors[name]:.1e} (above {SERIES_TOLERANCE:.0e}): set use_cayley_neumann=false for the exact map, more "
            "num_cayley_neumann_terms (even), or max_angle",
            stacklevel=2,
        )

    def remove(self) -> None:
        """Unregister from the optimizers."""
        for handle in self._handles:
            handle.remove()
        self._handles = []


class Strategy:
    """One process, or DDP: every process has all parameters."""

    def before_inject(self, trainer: Any, pl_module: nn.Module) -> None:
        """Replace layers now that would otherwise be replaced after the injection, rotations and all."""
        plugin = trainer.precision_plugin
        if "BitsandbytesPrecision" in class_names(plugin):
            plugin.convert_module(pl_module)

    def after_inject(self, trainer: Any, root: nn.Module) -> None:
        """Give new rotations the place that the strategy wants them to have."""

    def watch_steps(self, trainer: Any, root: nn.Module, adapter_name: str) -> Steps:
        """Act after every real step from now on."""
        return Steps(trainer, guards.trainable_rotations(root, adapter_name))

    def device(self, trainer: Any) -> torch.device | None:
        """Where to merge: Lightning has moved the model to the CPU by the end of a fit."""
        device = trainer.strategy.root_device
        return device if device.type != "cpu" else None

    def hold_checkpoints(self, pl_module: Any, adapter_only: bool) -> list[Any]:
        """Prepare the module for a strategy that reads and writes checkpoints without asking anybody; handles to undo."""
        return []

    def settle(self, pl_module: nn.Module) -> None:
        """Called when the fit has ended, before anything is merged or exported."""

    def whole_state(self, root: nn.Module) -> dict[str, Tensor] | None:
        """The whole tensors of a model by name, on rank zero; None where every process has them anyway."""
        return None


class FullyShard(Strategy):
    """FSDP2 (ModelParallelStrategy): a process holds some rows of each parameter, and some blocks of each rotation."""

    def after_inject(self, trainer: Any, root: nn.Module) -> None:
        """Make every rotation a unit of its own, before or after the user shards the layers around it.

        Left plain inside a layer that is sharded already, each rank would train its own (measured: 5.4e-2 apart, no
        error); inside the layer's unit, a mixed precision policy would round its generators.
        """
        from torch.distributed.fsdp import FSDPModule, fully_shard

        mesh = trainer.strategy.device_mesh["data_parallel"]
        for layer in oft_layers(root).values():
            for rotation in layer.oft_R.modules():  # type: ignore[union-attr]
                if isinstance(rotation, Rotation) and not isinstance(rotation, FSDPModule):
                    fully_shard(rotation, mesh=mesh)

    def device(self, trainer: Any) -> torch.device | None:
        """Every process merges the rows it holds, where they are."""
        return None

    def hold_checkpoints(self, pl_module: Any, adapter_only: bool) -> list[Any]:
        """FSDP2 loads whatever the module's state_dict names, before any hook: so it names the adapter only."""
        if not adapter_only:
            return []
        pl_module.strict_loading = False  # the base is missing from the file; `check_loaded` is strict about the rest
        return [pl_module.register_state_dict_post_hook(_only_trained)]

    def settle(self, pl_module: nn.Module) -> None:
        gather_back(pl_module)

    def whole_state(self, root: nn.Module) -> dict[str, Tensor] | None:
        """Gathered tensor by tensor, and kept on rank zero's CPU."""
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

        return get_model_state_dict(root, options=StateDictOptions(full_state_dict=True, cpu_offload=True))


def _only_trained(module: Any, state_dict: dict[str, Any], prefix: str, local_metadata: Any) -> None:
    """Take out of a state dict what an adapter-only checkpoint leaves out."""
    for name in checkpoints.frozen_names(module, ()):
        state_dict.pop(prefix + name, None)


def strategy_of(trainer: Any) -> Strategy:
    """The strategy's ways. Raises ValueError for one that cannot work."""
    if guards.is_deepspeed(trainer) and getattr(trainer.strategy, "zero_stage_3", False):
        raise ValueError(
            "OFTFinetuning does not support DeepSpeed stage 3, which partitions the weights that a merge folds: "
            "use stage 1 or 2, or ModelParallelStrategy (FSDP2)"
        )
    names = class_names(trainer.strategy)
    if "ModelParallelStrategy" in names:
        return FullyShard()
    return Strategy()
