"""Fits by processes that the main process starts itself (fork, as notebooks do, and spawn): what comes home."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy
from scenario import Model, callback, data, trainer


class Data(pl.LightningDataModule):
    """The scenario's data, cut for the process that asks."""

    def train_dataloader(self) -> Any:
        assert self.trainer is not None
        return data(self.trainer.world_size, self.trainer.global_rank)

    val_dataloader = train_dataloader


def ddp(method: Any) -> DDPStrategy:
    return DDPStrategy(process_group_backend="gloo", start_method=method)


def fit(root: Path, strategy: Any, devices: int, **options: Any) -> dict[str, Any]:
    model = Model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    checkpoint = ModelCheckpoint(root / "checkpoints", save_last=True)
    run = trainer(strategy, str(root), devices, [callback(**options), checkpoint], enable_checkpointing=True)
    result: dict[str, Any] = {"before": before}
    try:
        run.fit(model, datamodule=Data())
    except Exception as error:
        result["error"] = str(error)
    result["state"] = {name: value.clone() for name, value in model.state_dict().items()}
    if root.name == "fork":
        try:  # the weights that came home have absorbed the adapter that this checkpoint holds
            run.validate(model, datamodule=Data(), ckpt_path=str(root / "checkpoints" / "last.ckpt"), verbose=False)
        except Exception as error:
            result["twice"] = str(error)
    return result


def run(output: Path) -> dict[str, Any]:
    """Forks first: a process that has run autograd's threads cannot be forked."""
    return {
        "refused": fit(output / "refused", ddp("fork"), 2, merge_on_fit_end=False),
        "fork": fit(output / "fork", ddp("fork"), 2),
        "spawn": fit(output / "spawn", ddp("spawn"), 2),
        "one process": fit(output / "one", "auto", 1),
    }


if __name__ == "__main__":
    torch.save(run(Path(sys.argv[1]) / "forks"), Path(sys.argv[1]) / "forks-rank0.pt")
