"""A resumed fit draws the random numbers that the interrupted one would have drawn."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from small import Small, difference, loader, state, trainer

from lightning_oft.callback.random_state import RandomState

pytestmark = pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`")


def fit(root: Path, epochs: int, ckpt: Any = None, seed: int = 0, keep: bool = True) -> dict[str, torch.Tensor]:
    """Shuffled data and dropout, without OFT."""
    model = Small()
    torch.manual_seed(seed)
    callbacks = [*([RandomState()] if keep else []), ModelCheckpoint(root, save_last=True)]
    trainer(root, *callbacks, max_epochs=epochs).fit(model, loader(), ckpt_path=ckpt)
    return state(model)


def test_a_resume_without_oft_is_exact_with_it_and_not_without(tmp_path: Path) -> None:
    for keep in (True, False):
        root = tmp_path / str(keep)
        straight = fit(root / "straight", 4, keep=keep)
        fit(root, 2, keep=keep)
        resumed = fit(root, 4, str(root / "last.ckpt"), seed=99, keep=keep)
        assert (difference(resumed, straight) == 0.0) == keep


def _draw() -> tuple[float, float, float]:
    return random.random(), float(np.random.rand()), float(torch.rand(1))  # noqa: NPY002 - the global one is what is kept


def _round_trip(states: dict[str, Any], path: Path) -> RandomState:
    torch.save(states, path)
    callback = RandomState()
    callback.setup(None, None, "fit")
    callback.load_state_dict(torch.load(path, weights_only=True))
    return callback


def test_all_generators_go_on_whenever_the_state_is_loaded(tmp_path: Path) -> None:
    states = RandomState().state_dict()
    expected = _draw()
    callback = _round_trip(states, tmp_path / "before.pt")  # before on_fit_start
    assert _draw() != expected
    callback.on_fit_start(None, None)
    assert _draw() == expected
    callback.load_state_dict(states)  # after it, as FSDP does
    assert _draw() == expected


def test_another_number_of_processes_leaves_the_generators_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    states = RandomState().state_dict()
    states["processes"] *= 2
    callback = _round_trip(states, tmp_path / "two.pt")
    before = torch.get_rng_state()
    with caplog.at_level("INFO"):
        callback.on_fit_start(None, None)
    assert torch.equal(torch.get_rng_state(), before)
    assert "2 processes" in caplog.text
