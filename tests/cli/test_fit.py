"""`fit` and its sisters: what they run, what they say, and the traps of the stock LightningCLI."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import EMAWeightAveraging

from lightning_oft import OFTFinetuning
from lightning_oft.cli import COMMANDS, main
from lightning_oft.cli.application import Application
from lightning_oft.cli.auto import auto_class, loader_of
from lightning_oft.cli.report import score_table

from .conftest import SHORT, Fitted

Write = Callable[..., str]


class Plain(LightningModule):
    """A model that configures no optimizer."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.Linear(64, width), torch.nn.ReLU(), torch.nn.Linear(width, 10))

    def training_step(self, batch: dict[str, torch.Tensor], _: int) -> torch.Tensor:
        pixels = batch["pixel_values"].flatten(1)[:, :64]
        return torch.nn.functional.cross_entropy(self.net(pixels), batch["labels"])


PLAIN = f"{__name__}.Plain"


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> list[Application]:
    """Stops every command before it runs and keeps the application."""
    applications: list[Application] = []
    monkeypatch.setattr(Application, "_run_subcommand", lambda self, _: applications.append(self))
    return applications
