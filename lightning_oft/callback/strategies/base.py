"""What a strategy is asked; the answers of one process and of DDP; and which adapter answers for which strategy."""

from collections.abc import Collection
from contextlib import AbstractContextManager, ExitStack, nullcontext
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from lightning_oft.callback.strategies.steps import Steps
from lightning_oft.codecs import packed_codec
from lightning_oft.layers.rotation import Rotation
from lightning_oft.model.merging import KeepBase, merge_layers
from lightning_oft.model.traversal import Modules, class_names, some, walk


class StrategyAdapter:
    """One process, or DDP: every process has all parameters. The removal of what is registered goes onto `undo`."""

    adapter_only = True
    """Whether checkpoints can leave the base out."""
    can_unload = True
    """Whether a run that trained nothing can take its rotations out again."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer

    def prepare(self, pl_module: Any, adapter_only: bool, undo: ExitStack) -> None:
        """Called before the injection: replace layers that would otherwise be replaced later, rotations and all, and
        prepare checkpoints of a strategy that reads them before any hook."""
        plugin = self.trainer.precision_plugin
        if "BitsandbytesPrecision" in class_names(plugin):
            plugin.convert_module(pl_module)

    def check_packed(self, modules: Modules) -> None:
        """Called before each injection, with all that is there. Raises ValueError for quantized weights that the strategy
        would destroy, or that do not let themselves be cut."""

    def injects_early(self) -> bool:
        """Whether rotations may be put into what is built before configure_model."""
        return True

    def after_inject(self, root: nn.Module) -> None:
        """Give new rotations the place that the strategy wants them to have."""

    def optimized(self) -> list[Tensor]:
        """The parameters that the optimizers train."""
        groups = [group for optimizer in self.trainer.optimizers for group in optimizer.param_groups]
        return [tensor for group in groups for tensor in group["params"]]

    def watch_steps(self, rotations: dict[str, Rotation], undo: ExitStack) -> Steps:
        """Project the rotations, and act after every real step from now on."""
        return Steps(self.trainer.optimizers, rotations, undo)

    def merge_device(self) -> torch.device | None:
        """Where to merge: Lightning has moved the model to the CPU by the end of a fit."""
        device = self.trainer.strategy.root_device
        return device if device.type != "cpu" else None

    def merge(self, root: nn.Module, keep_base: KeepBase, only: Collection[str], requantize: bool = False) -> None:
        """Merge some layers."""
        merge_layers(walk(root), None, keep_base, self.merge_device(), only=only, requantize=requantize)

    def whole(self) -> AbstractContextManager[Any]:
        """A context in which every process has all parameters, or the part of each that a DTensor shows."""
        return nullcontext()

    def whole_state(self, root: nn.Module) -> dict[str, Tensor] | None:
        """The whole tensors of a model by name, on rank zero, within `whole`; None where they lie there anyway."""
        return None


def check_cut(modules: Modules, strategy: str) -> None:
    """Raise ValueError for quantized weights that a strategy, by its class's name, does not cut and put together again."""
    packed = {name: codec for name, module in modules.items() if (codec := packed_codec(module)) is not None}
    uncut = [name for name, codec in packed.items() if strategy not in codec.sharded_by]
    if uncut:
        formats = ", ".join(sorted({packed[name].storage(modules[name]) or "not quantized yet" for name in uncut}))
        raise ValueError(
            f"{strategy}: the quantized weights of {some(uncut)} ({formats}) cannot be sharded: use strategy='ddp', or "
            "load the base in bitsandbytes' nf4 or fp4 and shard it with ModelParallelStrategy"
        )


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
        found: StrategyAdapter = getattr(import_module(f"lightning_oft.callback.strategies.{file}"), cls)(trainer)
        return found
    return StrategyAdapter(trainer)
