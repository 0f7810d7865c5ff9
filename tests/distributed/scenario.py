"""One small fit, the same for every strategy and for one process: what the distributed tests compare."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    PrepareModuleOutput,
    RowwiseParallel,
    parallelize_module,
)
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset
from transformers.pytorch_utils import Conv1D

from lightning_oft import OFTConfig, OFTFinetuning, inject

FEATURES, BATCH, STEPS = 12, 8, 10
CONFIG: dict[str, Any] = {
    "oft_block_size": 4,
    "target_modules": ["up", "down"],
    "max_angle": 3.0,
    "bias": "oft_only",
}


class Block(nn.Module):
    """A residual block: the unit in which a user shards. transformers' Conv1D stores its weight the other way round."""

    def __init__(self, hidden: int = 24, conv1d: bool = False) -> None:
        super().__init__()
        linear = (lambda fan_in, fan_out: Conv1D(fan_out, fan_in)) if conv1d else nn.Linear
        self.up = linear(FEATURES, hidden)
        self.down = linear(hidden, FEATURES)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = x + self.down(torch.tanh(self.up(x)))
        return output


class Model(pl.LightningModule):
    """Two blocks and a head, cut by the user in configure_model as `shard` says; built there too where `late`."""

    def __init__(
        self,
        shard: str = "none",
        optimizer: str = "trainable",
        mp_bf16: bool = False,
        late: bool = False,
        injects: bool = False,
        **block: Any,
    ) -> None:
        super().__init__()
        self.shard, self.optimizer_name, self.mp_bf16, self.block = shard, optimizer, mp_bf16, block
        self.injects = injects
        if not late:
            self.build()

    def build(self) -> None:
        torch.manual_seed(3)
        self.blocks = nn.Sequential(Block(**self.block), Block(**self.block))
        self.head = nn.Linear(FEATURES, 2)

    def configure_model(self) -> None:
        if self.shard == "none" or getattr(self, "_sharded", False):
            return
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        if not hasattr(self, "blocks"):
            self.build()  # built and sharded before anything could be injected by a callback
        if self.injects:
            inject(self, OFTConfig(**CONFIG, magnitude="joint"))
        self._sharded = True
        mesh = self.device_mesh["data_parallel"]  # type: ignore[index]
        if self.shard in ("tp", "sequence"):
            if self.device_mesh["tensor_parallel"].size() > 1:  # type: ignore[index]
                self.split(self.device_mesh["tensor_parallel"], self.shard == "sequence")  # type: ignore[index]
            if mesh.size() == 1:
                return
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16) if self.mp_bf16 else MixedPrecisionPolicy()
        for block in self.blocks:
            if self.shard == "layer":
                fully_shard(block.up, mesh=mesh, mp_policy=policy)  # type: ignore[arg-type]
                fully_shard(block.down, mesh=mesh, mp_policy=policy)  # type: ignore[arg-type]
            fully_shard(block, mesh=mesh, mp_policy=policy)
        fully_shard(self.head, mesh=mesh, mp_policy=policy)

    def split(self, mesh: Any, sequence: bool) -> None:
        """Tensor parallel: `up` by columns, `down` by rows; between blocks whole, or cut by rows of the batch."""
        between = Shard(0) if sequence else Replicate()
        plan: dict[str, Any] = {
            "up": ColwiseParallel(input_layouts=between),
            "down": RowwiseParallel(output_layouts=between),
        }
        for block in self.blocks:
            parallelize_module(block, mesh, plan)
        if sequence:
            inside = PrepareModuleInput(
                input_layouts=Replicate(), desired_input_layouts=Shard(0), use_local_output=True
            )
            parallelize_module(self.blocks, mesh, inside)
            outside = PrepareModuleOutput(output_layouts=Shard(0), desired_output_layouts=Replicate())
            parallelize_module(self.blocks, mesh, outside)

    def loss(self, batch: list[Tensor]) -> Tensor:
        return nn.functional.mse_loss(self.head(self.blocks(batch[0])).float(), batch[1])

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.loss(batch)

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch), sync_dist=True)

    test_step = validation_step

    def configure_optimizers(self) -> Any:
        parameters = [p for p in self.parameters() if p.requires_grad or self.optimizer_name == "all"]
        return torch.optim.AdamW(parameters, 0.02, weight_decay=0.0)


def data(world: int, rank: int) -> DataLoader[Any]:
    """The same global batches for any number of processes, in the same order."""
    generator = torch.Generator().manual_seed(0)
    inputs, targets = torch.randn(80, FEATURES, generator=generator), torch.randn(80, 2, generator=generator)
    dataset = TensorDataset(inputs, targets)
    sampler = DistributedSampler(dataset, world, rank, shuffle=False)
    return DataLoader(dataset, BATCH // world, sampler=sampler)


def callback(cls: type[OFTFinetuning] = OFTFinetuning, **options: Any) -> Any:
    """COFT, so that the projection has something to do on every step."""
    return cls(**{**CONFIG, **options})


def trainer(
    strategy: Any, root: str, devices: int = 1, callbacks: list[Any] | None = None, **options: Any
) -> pl.Trainer:
    """Ten optimizer steps in two epochs, with accumulation and clipping."""
    defaults: dict[str, Any] = {
        "max_steps": STEPS,
        "accumulate_grad_batches": 2,
        "gradient_clip_val": 0.05,
        "num_sanity_val_steps": 1,
        "enable_checkpointing": False,
    }
    return pl.Trainer(
        accelerator="cpu",
        devices=devices,
        strategy=strategy,
        callbacks=callbacks,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        default_root_dir=root,
        **{**defaults, **options},
    )


def whole_state(model: nn.Module) -> dict[str, Tensor]:
    state = model.state_dict()
    return {name: (v.full_tensor() if hasattr(v, "full_tensor") else v).detach().clone() for name, v in state.items()}
