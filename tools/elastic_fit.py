"""The fit of one process of tools/two_nodes.py; torchrun starts it, and starts it again after a failure.

torchrun ... tools/elastic_fit.py DIRECTORY NODE
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy
from scenario import FEATURES, Model, callback, trainer
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from lightning_oft.callback.checkpoint_io import AtomicCheckpointIO
from lightning_oft.callback.random_state import RandomState

EPOCHS, STEPS_PER_EPOCH, ACCUMULATE = 8, 4, 2
PAUSE = 0.03
"""Seconds by which a batch is made longer, so that a kill can fall anywhere in it."""


class Progress(Callback):
    """Writes down, for the one who kills, this process and the step it is at."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.resumed_at = 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.resumed_at = trainer.global_step

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self.file.write_text(f"{os.getpid()} {os.environ['TORCHELASTIC_RESTART_COUNT']} {trainer.global_step} ")
        time.sleep(PAUSE)


def data(world: int, rank: int) -> DataLoader[Any]:
    """Shuffled anew every epoch, so that a resume at the wrong place would show."""
    generator = torch.Generator().manual_seed(0)
    samples = EPOCHS * STEPS_PER_EPOCH * ACCUMULATE
    inputs, targets = torch.randn(samples, FEATURES, generator=generator), torch.randn(samples, 2, generator=generator)
    dataset = TensorDataset(inputs, targets)
    sampler = DistributedSampler(dataset, world, rank, shuffle=True, seed=5)
    return DataLoader(dataset, samples // (STEPS_PER_EPOCH * ACCUMULATE * world), sampler=sampler)


def main() -> None:
    directory, node = Path(sys.argv[1]), sys.argv[2]
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    # Each rank draws its own dropout: resuming means continuing those random numbers too.
    torch.manual_seed(11 + rank)
    progress = Progress(directory / f"progress-{node}")
    checkpoints = ModelCheckpoint(directory / "checkpoints", save_last=True)
    run = trainer(
        DDPStrategy(process_group_backend="gloo"),
        str(directory),
        num_nodes=2,
        callbacks=[callback(module_dropout=0.2), RandomState(), progress, checkpoints],
        plugins=[AtomicCheckpointIO()],
        max_steps=-1,
        max_epochs=EPOCHS,
        enable_checkpointing=True,
    )
    model = Model()
    run.fit(model, data(world, rank), ckpt_path="last")
    state = {name: value.clone() for name, value in model.state_dict().items()}
    torch.save(
        {"state": state, "step": run.global_step, "resumed_at": progress.resumed_at}, directory / f"rank{rank}.pt"
    )


if __name__ == "__main__":
    main()
