"""FSDP1 on a CPU: Lightning refuses FSDPStrategy itself there, by its exact type, and FSDP wants a device named."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch.strategies import FSDPStrategy
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.fsdp.wrap import ModuleWrapPolicy


class CPUFSDP(FSDPStrategy):
    """FSDP1 over gloo."""

    def __init__(self, **options: Any) -> None:
        from scenario import Block

        super().__init__(process_group_backend="gloo", auto_wrap_policy=ModuleWrapPolicy({Block}), **options)

    def _setup_model(self, model: nn.Module) -> nn.Module:
        return FullyShardedDataParallel(
            module=model,
            cpu_offload=self.cpu_offload,
            mixed_precision=self.mixed_precision_config,
            sharding_strategy=self.sharding_strategy,
            device_id=torch.device("cpu"),  # type: ignore[arg-type]
            **self.kwargs,
        )
