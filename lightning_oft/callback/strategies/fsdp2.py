"""FSDP2 (ModelParallelStrategy): every parameter is a DTensor, sharded by the user in configure_model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_oft import checkpoints
from lightning_oft.layers import Rotation
from lightning_oft.surgery import oft_layers
from lightning_oft.surgery.sharded import gather_back

from .base import Strategy


class FullyShard(Strategy):
    """FSDP2 (ModelParallelStrategy): a process holds some rows of each parameter, and some blocks of each rotation."""

    @override
    def after_inject(self, trainer: Any, root: nn.Module) -> None:
        """Make every rotation a unit of its own, before or after the user shards the layers around it.

        Left plain inside a layer that is sharded already, each rank would train its own (measured: 5.4e-2 apart, no
        error); inside the layer's unit, a mixed precision policy would round its generators.
        """
        from torch.distributed.fsdp import FSDPModule, fully_shard

        mesh = trainer.strategy.device_mesh["data_parallel"]
        if mesh.size() == 1:
            return
        for layer in oft_layers(root).values():
            for rotation in layer.oft_R.modules():  # type: ignore[union-attr]
                if isinstance(rotation, Rotation) and not isinstance(rotation, FSDPModule):
                    fully_shard(rotation, mesh=mesh)

    @override
    def device(self, trainer: Any) -> torch.device | None:
        """Every process merges the rows it holds, where they are."""
        return None

    @override
    def hold_checkpoints(self, pl_module: Any, adapter_only: bool) -> list[Any]:
        """FSDP2 loads whatever the module's state_dict names, before any hook: so it names the adapter only."""
        if not adapter_only:
            return []
        pl_module.strict_loading = False  # the base is missing from the file; `check_loaded` is strict about the rest
        return [pl_module.register_state_dict_post_hook(_only_trained)]

    @override
    def settle(self, pl_module: nn.Module) -> None:
        gather_back(pl_module)

    @override
    def whole_state(self, trainer: Any, root: nn.Module) -> dict[str, Tensor] | None:
        """Gathered tensor by tensor, and kept on rank zero's CPU."""
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

        state: Any = get_model_state_dict(root, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
        return dict(state)


def _only_trained(module: Any, state_dict: dict[str, Any], prefix: str, local_metadata: Any) -> None:
    """Take out of a state dict what an adapter-only checkpoint leaves out."""
    for name in checkpoints.frozen_names(module, ()):
        state_dict.pop(prefix + name, None)
