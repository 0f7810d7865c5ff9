"""Strategies and launchers that cannot work are refused before anything is changed, with the remedy."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
from torch import nn

from lightning_oft import OFTFinetuning
from lightning_oft.callback.checks import check_launcher
from lightning_oft.callback.strategies import strategy_adapter


class DeepSpeedStrategy:
    """Lightning's own imports deepspeed, which is not here; we ask for the name."""

    def __init__(self, stage: int) -> None:
        self.zero_stage_3 = stage == 3
        self.launcher = self.checkpoint_io = None


class _MultiProcessingLauncher:
    """What ddp_spawn and ddp_notebook have."""


class Model(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)


def trainer(strategy: Any) -> Any:
    return SimpleNamespace(strategy=strategy, callbacks=[], precision_plugin=None)


def test_deepspeed_stage_3_is_refused_and_nothing_injected() -> None:
    model = Model()
    with pytest.raises(ValueError, match=r"DeepSpeed stage 3.*use stage 1 or 2, or ModelParallelStrategy"):
        OFTFinetuning().setup(trainer(DeepSpeedStrategy(3)), model, "fit")
    assert [name for name, _ in model.named_parameters()] == ["layer.weight", "layer.bias"]


@pytest.mark.parametrize("stage", [1, 2])
def test_deepspeed_stages_1_and_2_are_not_refused(stage: int) -> None:
    strategy_adapter(trainer(DeepSpeedStrategy(stage)))


@pytest.mark.parametrize(
    ("launcher", "merge", "refused"),
    [
        (_MultiProcessingLauncher(), False, True),
        (_MultiProcessingLauncher(), True, False),
        (object(), False, False),
        (None, False, False),
    ],
)
def test_spawned_fits_must_merge(launcher: Any, merge: bool, refused: bool) -> None:
    callback = OFTFinetuning(merge_on_fit_end=merge)
    running = trainer(SimpleNamespace(launcher=launcher))
    if not refused:
        check_launcher(running, callback)
        return
    with pytest.raises(ValueError, match=r"would be lost: leave merge_on_fit_end=True, or use strategy='ddp'"):
        check_launcher(running, callback)
