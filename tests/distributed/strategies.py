"""Strategies that Lightning gives to GPUs only, on a CPU over gloo."""

from __future__ import annotations

from typing import Any
from unittest import mock

import lightning.pytorch.strategies.deepspeed as deepspeed_strategy
import torch
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.fsdp.wrap import ModuleWrapPolicy


class CPUFSDP(FSDPStrategy):
    """FSDP1: Lightning refuses FSDPStrategy itself by its exact type, and FSDP wants a device named."""

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


class CPUDeepSpeed(DeepSpeedStrategy):
    """DeepSpeed: Lightning asks for a CUDA accelerator and for devices with numbers."""

    root_device = property(lambda self: torch.device("cpu", 0))

    def __init__(self, stage: int) -> None:
        super().__init__(stage=stage, process_group_backend="gloo")

    def setup_environment(self) -> None:
        accelerator = mock.patch.object(deepspeed_strategy, "CUDAAccelerator", type(self.accelerator))
        indices = mock.patch.object(deepspeed_strategy, "_validate_device_index_selection")
        with accelerator, indices:
            super().setup_environment()
