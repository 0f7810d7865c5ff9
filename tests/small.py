"""A small LightningModule, its data and a Trainer for it: what the life-cycle tests run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_oft import OFTFinetuning
from lightning_oft.model import traversal

FEATURES, HIDDEN = 8, 16


def net(dropout: float = 0.1, batch_norm: bool = True) -> nn.Sequential:
    """Two layers to adapt (`0`, `3`), a batch norm, and a head (`6`)."""
    torch.manual_seed(1)
    norm: nn.Module = nn.BatchNorm1d(HIDDEN) if batch_norm else nn.Identity()
    first, second, head = nn.Linear(FEATURES, HIDDEN), nn.Linear(HIDDEN, HIDDEN), nn.Linear(HIDDEN, 2)
    return nn.Sequential(first, nn.ReLU(), nn.Dropout(dropout), second, norm, nn.ReLU(), head)


class Small(pl.LightningModule):
    """A classifier whose net is built in `__init__`, `setup` or `configure_model`."""

    net: nn.Module

    def __init__(self, built_in: str = "init", lr: float = 0.01, dropout: float = 0.1, batch_norm: bool = True) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.built_in, self.lr = built_in, lr
        self.seen: list[float] = []
        if built_in == "init":
            self.build()

    def build(self) -> None:
        if not hasattr(self, "net"):
            self.net = net(self.hparams["dropout"], self.hparams["batch_norm"])

    def setup(self, stage: str) -> None:
        if self.built_in == "setup":
            self.build()

    def configure_model(self) -> None:
        if self.built_in == "configure_model":
            self.build()

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.net(x)
        return output

    def loss(self, batch: Any) -> Tensor:
        x, y = batch
        dtype = next(p for p in self.net.parameters()).dtype
        return nn.functional.cross_entropy(self(x.to(dtype)).float(), y)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        self.log("loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val", self.loss(batch))

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test", self.loss(batch))

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self(batch[0])

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), self.lr)
        return [optimizer], [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 8)]


def inputs() -> tuple[Tensor, Tensor]:
    """64 points and their classes."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, FEATURES, generator=generator)
    return x, (x[:, 0] * x[:, 1] > 0).long()


def loader(shuffle: bool = True, batch_size: int = 8) -> DataLoader[Any]:
    return DataLoader(TensorDataset(*inputs()), batch_size, shuffle=shuffle)


def oft(**options: Any) -> OFTFinetuning:
    """Adapts the two layers and trains the head."""
    defaults: dict[str, Any] = {
        "oft_block_size": 4,
        "target_modules": ["net.0", "net.3"],
        "modules_to_save": ["net.6"],
        "use_cayley_neumann": False,
    }
    return OFTFinetuning(**{**defaults, **options})


def trainer(root: Path, *callbacks: Any, **options: Any) -> pl.Trainer:
    """A quiet Trainer on the CPU."""
    defaults: dict[str, Any] = {
        "max_epochs": 1,
        "accelerator": "cpu",
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": any(isinstance(c, pl.callbacks.ModelCheckpoint) for c in callbacks),
        "default_root_dir": str(root),
    }
    return pl.Trainer(callbacks=list(callbacks), **{**defaults, **options})


def merged_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The layers whose weights hold their rotations."""
    return traversal.merged_layers(traversal.walk(model))


def difference(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """Largest difference between two states of the same names."""
    assert set(a) == set(b)
    return max(float((a[key].double() - b[key].double()).abs().max()) for key in a)


def state(module: nn.Module) -> dict[str, Tensor]:
    """A copy of the state dict."""
    return {name: value.detach().clone() for name, value in module.state_dict().items()}
