"""One small fit, the same for every strategy and for one process: what the distributed tests compare."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from lightning_oft import OFTFinetuning

FEATURES, BATCH, STEPS = 12, 8, 10


class Block(nn.Module):
    """A residual block: the unit in which a user shards."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(FEATURES, 24)
        self.down = nn.Linear(24, FEATURES)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = x + self.down(torch.tanh(self.up(x)))
        return output


class Model(pl.LightningModule):
    """Two blocks and a head, sharded by the user in configure_model as `shard` says; built there too where `late`."""

    def __init__(
        self, shard: str = "none", optimizer: str = "trainable", mp_bf16: bool = False, late: bool = False
    ) -> None:
        super().__init__()
        self.shard, self.optimizer_name, self.mp_bf16 = shard, optimizer, mp_bf16
        if not late:
            self.build()

    def build(self) -> None:
        torch.manual_seed(3)
        self.blocks = nn.Sequential(Block(), Block())
        self.head = nn.Linear(FEATURES, 2)

    def configure_model(self) -> None:
        if self.shard == "none" or getattr(self, "_sharded", False):
            return
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        if not hasattr(self, "blocks"):
            self.build()  # built and sharded before anything could be injected
        self._sharded = True
        mesh = self.device_mesh["data_parallel"]  # type: ignore[index]
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16) if self.mp_bf16 else MixedPrecisionPolicy()
        for block in self.blocks:
            if self.shard == "layer":
                fully_shard(block.up, mesh=mesh, mp_policy=policy)  # type: ignore[arg-type]
                fully_shard(block.down, mesh=mesh, mp_policy=policy)  # type: ignore[arg-type]
            fully_shard(block, mesh=mesh, mp_policy=policy)
        fully_shard(self.head, mesh=mesh, mp_policy=policy)

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


def callback(**options: Any) -> OFTFinetuning:
    """COFT, so that the projection has something to do on every step."""
    defaults: dict[str, Any] = {
        "oft_block_size": 4,
        "target_modules": ["up", "down"],
        "max_angle": 3.0,
        "bias": "oft_only",
    }
    return OFTFinetuning(**{**defaults, **options})


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
