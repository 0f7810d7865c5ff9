"""Searches for a learning rate or a batch size train for a while: nothing of it stays."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import BatchSizeFinder, LearningRateFinder
from lightning.pytorch.tuner import Tuner
from small import Small, difference, inputs, merged_layers, oft, state, trainer
from torch.utils.data import DataLoader, TensorDataset

from lightning_oft import oft_layers


class Batched(Small):
    """Makes its own loader, as the tuner wants it."""

    def __init__(self) -> None:
        super().__init__(dropout=0.0)
        self.batch_size = 2

    def train_dataloader(self) -> Any:
        return DataLoader(TensorDataset(*inputs()), self.batch_size)

    val_dataloader = train_dataloader


class Untouched(pl.Callback):
    """When training starts, every rotation is the identity and nothing is merged."""

    def __init__(self) -> None:
        self.asked = 0

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.asked += 1
        rotations = [layer.oft_R["default"].weight for layer in oft_layers(pl_module).values()]
        assert len(rotations) == 2
        assert not any(bool(weight.any()) for weight in rotations)
        assert not merged_layers(pl_module)


@pytest.mark.parametrize("finder", ["rate", "size"])
@pytest.mark.parametrize("order", [1, -1], ids=["behind", "before"])
def test_finders_leave_no_trace(tmp_path: Path, finder: str, order: int) -> None:
    callback: Any = LearningRateFinder(num_training_steps=24, early_stop_threshold=None)
    if finder == "size":
        callback = BatchSizeFinder(steps_per_trial=1, max_trials=2)
    torch.manual_seed(0)
    model, base, look = Batched(), state(Batched()), Untouched()
    run = trainer(tmp_path, *[oft(), callback][::order], look, enable_checkpointing=True)
    run.fit(model)
    assert (model.lr, model.batch_size) != (0.01, 2)
    assert look.asked == 1
    plain = Batched()
    plain.lr, plain.batch_size = model.lr, model.batch_size
    trainer(tmp_path, oft()).fit(plain)
    assert difference(state(model), state(plain)) == 0.0
    assert list(state(model)) == list(base)


@pytest.mark.parametrize("finder", ["lr_find", "scale_batch_size"])
def test_the_tuner_leaves_no_trace(tmp_path: Path, finder: str) -> None:
    model, base = Batched(), state(Batched())
    run = trainer(tmp_path, oft(), enable_checkpointing=True)
    options: dict[str, Any] = {"num_training": 24, "early_stop_threshold": None}
    getattr(Tuner(run), finder)(model, **(options if finder == "lr_find" else {"steps_per_trial": 1, "max_trials": 2}))
    now = state(model)
    assert all(torch.equal(now[name], base[name]) for name in base)
    assert not any(bool(now[name].any()) for name in now.keys() - base.keys())
    assert not merged_layers(model)
    run.fit(model)
    plain = Batched()
    plain.lr, plain.batch_size = model.lr, model.batch_size
    trainer(tmp_path, oft()).fit(plain)
    assert difference(state(model), state(plain)) == 0.0
