"""Averages of weights: what is merged is the average, and nothing of it is lost on the way through a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import (
    EMAWeightAveraging,
    ModelCheckpoint,
    StochasticWeightAveraging,
    WeightAveraging,
)
from small import Small, difference, loader, oft, state, trainer
from torch import Tensor

from lightning_oft import load_from_checkpoint, merge, oft_layers
from lightning_oft.callback.random_state import RandomState
from lightning_oft.formats.checkpoint import NOTE

pytestmark = [
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks used to create"),
    # Lightning asks the instance for configure_model, where the injection waits
    pytest.mark.filterwarnings("ignore:You're using the WeightAveraging callback with a model that overrides"),
    pytest.mark.filterwarnings("ignore:You're using the WeightAveraging callback, but loading a checkpoint outside"),
    # torch, of the scheduler that SWA makes
    pytest.mark.filterwarnings("ignore:.*lr_scheduler.step.*before.*optimizer.step"),
]

AVERAGES = {"ema": lambda: EMAWeightAveraging(decay=0.8), "mean": lambda: WeightAveraging()}
ADAPTER = {"net.0.oft_R.default.weight", "net.3.oft_R.default.weight", "net.6.weight", "net.6.bias"}
BUFFERS = {"net.4.running_mean", "net.4.running_var", "net.4.num_batches_tracked"}


class Average(pl.Callback):
    """Averages by itself what trains, after every step."""

    def __init__(self, decay: float | None) -> None:
        self.decay, self.count = decay, 0
        self.values: dict[str, Tensor] = {}

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        for name, parameter in pl_module.named_parameters():
            now = parameter.detach().double()
            if parameter.requires_grad and self.count:
                share = 1 / (self.count + 1) if self.decay is None else 1 - self.decay
                self.values[name] += (now - self.values[name]) * share
            elif parameter.requires_grad:
                self.values[name] = now.clone()
        self.count += 1


def fit(root: Path, callback: Any, epochs: int, ckpt: Any = None, seed: int = 0, *more: Any) -> tuple[Any, Small, Any]:
    torch.manual_seed(seed)
    model = Small()
    keeper = ModelCheckpoint(root, monitor="val", save_last=True, save_top_k=2, filename="{epoch}")
    run = trainer(root, oft(), callback, RandomState(), *more, keeper, max_epochs=epochs)
    run.fit(model, loader(), loader(False), ckpt_path=ckpt)
    return run, model, keeper


@pytest.mark.parametrize("kind", AVERAGES)
def test_the_average_is_merged_resumed_and_tested(tmp_path: Path, kind: str) -> None:
    mine = Average(0.8 if kind == "ema" else None)
    _, straight, _ = fit(tmp_path / "straight", AVERAGES[kind](), 4, None, 0, mine)
    fit(tmp_path, AVERAGES[kind](), 2)
    run, model, keeper = fit(tmp_path, AVERAGES[kind](), 4, str(tmp_path / "last.ckpt"), 99)
    merged, base = state(model), state(Small())
    assert difference(merged, state(straight)) == 0.0
    assert all(torch.equal(merged[name], base[name]) for name in ("net.0.bias", "net.4.weight", "net.4.running_var"))
    last = load_from_checkpoint(Small, tmp_path / "last.ckpt")
    for name, parameter in last.named_parameters():
        if name in mine.values:
            torch.testing.assert_close(parameter.double(), mine.values[name], rtol=0, atol=1e-6)
    merge(last)
    assert difference(state(last), merged) == 0.0
    found = run.validate(model, loader(False), ckpt_path="best", verbose=False)[0]["val"]
    assert found == float(keeper.best_model_score)
    assert list(state(model)) == list(state(Small()))


@pytest.mark.parametrize("kind", AVERAGES)
def test_neither_the_average_nor_the_current_state_carries_the_base(tmp_path: Path, kind: str) -> None:
    fit(tmp_path, AVERAGES[kind](), 1)
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert set(saved["state_dict"]) - {NOTE} == set(saved["current_model_state"]) == ADAPTER | BUFFERS
    assert not torch.equal(saved["state_dict"]["net.6.weight"], saved["current_model_state"]["net.6.weight"])


def test_a_model_that_is_built_in_configure_model_is_averaged(tmp_path: Path) -> None:
    model, keeper = Small("configure_model"), ModelCheckpoint(tmp_path, save_last=True)
    trainer(tmp_path, oft(), EMAWeightAveraging(decay=0.8), keeper).fit(model, loader())
    average = load_from_checkpoint(Small, tmp_path / "last.ckpt")
    merge(average)
    assert difference(state(model), state(average)) == 0.0


def test_a_model_that_is_built_too_late_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="matches nothing; no layer here could be adapted"):
        trainer(tmp_path, oft(), EMAWeightAveraging()).fit(Small("setup"), loader())
    with pytest.raises(ValueError, match="before all of it was built"):
        trainer(tmp_path, oft(), StochasticWeightAveraging(1e-2)).fit(Small("configure_model"), loader())


def test_a_checkpoint_without_an_average_starts_one(tmp_path: Path) -> None:
    torch.manual_seed(0)
    trainer(tmp_path, oft(), ModelCheckpoint(tmp_path, save_last=True)).fit(Small(), loader())
    with pytest.warns(UserWarning, match="was not created with WeightAveraging"):
        _, model, _ = fit(tmp_path / "next", EMAWeightAveraging(decay=0.8), 2, str(tmp_path / "last.ckpt"))
    assert list(state(model)) == list(state(Small()))


@pytest.mark.parametrize("other", [EMAWeightAveraging, lambda: StochasticWeightAveraging(1e-2)])
def test_an_average_that_stands_before_is_refused(tmp_path: Path, other: Any) -> None:
    model = Small()
    before = state(model)
    with pytest.raises(ValueError, match="put OFTFinetuning first"):
        trainer(tmp_path, other(), oft()).fit(model, loader())
    assert difference(state(model), before) == 0.0


class Bare(Small):
    """No batch norm, and no scheduler but SWA's own."""

    def __init__(self) -> None:
        super().__init__(batch_norm=False)

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], self.lr)


class Starts(pl.Callback):
    """What trains, at the start of every epoch: what SWA averages."""

    def __init__(self) -> None:
        self.values: list[dict[str, Tensor]] = []

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        self.values.append({n: p.detach().double() for n, p in pl_module.named_parameters() if p.requires_grad})


def test_swa_merges_the_mean_of_its_epochs(tmp_path: Path) -> None:
    torch.manual_seed(0)
    starts, model = Starts(), Bare()
    trainer(tmp_path, oft(), StochasticWeightAveraging(1e-2, swa_epoch_start=2), starts, max_epochs=4).fit(
        model, loader()
    )
    mean = {name: sum(epoch[name] for epoch in starts.values[1:]) / 3 for name in starts.values[0]}  # type: ignore[misc]
    twin = Bare()
    run = trainer(tmp_path, oft(merge_on_fit_end=False), max_epochs=0)
    run.fit(twin, loader())
    for name, parameter in twin.named_parameters():
        if name in mean:
            parameter.data.copy_(mean[name])
    merge(twin)
    assert difference(state(model), state(twin)) < 1e-6
    assert list(state(model)) == list(state(Bare()))


@pytest.mark.parametrize("epoch", [0, 2])
def test_swa_resumes_and_its_checkpoint_is_an_adapter(tmp_path: Path, epoch: int) -> None:
    def fit_swa(root: Path, ckpt: Any = None, seed: int = 0) -> dict[str, Tensor]:
        torch.manual_seed(seed)
        model, keeper = Bare(), ModelCheckpoint(root, save_top_k=-1, filename="{epoch}")
        average = StochasticWeightAveraging(1e-2, swa_epoch_start=2)
        trainer(root, oft(), average, RandomState(), keeper, max_epochs=4).fit(model, loader(), ckpt_path=ckpt)
        return state(model)

    straight = fit_swa(tmp_path)
    place = str(tmp_path / f"epoch={epoch}.ckpt")
    saved = torch.load(place, weights_only=True)
    assert set(saved["state_dict"]) == ADAPTER | {NOTE}
    assert set(saved["callbacks"]["StochasticWeightAveraging"]["average_model_state"]) == ADAPTER
    assert difference(fit_swa(tmp_path / "resumed", place, 99), straight) == 0.0


def test_swa_would_reset_the_frozen_statistics_and_is_refused(tmp_path: Path) -> None:
    model, before = Small(), state(Small())
    with pytest.raises(ValueError, match=r"net\.4.*EMAWeightAveraging") as error:
        trainer(tmp_path, oft(), StochasticWeightAveraging(1e-2), max_epochs=2).fit(model, loader())
    assert "\n" not in str(error.value)
    now = state(model)
    assert all(torch.equal(now[name], value) for name, value in before.items())
    for norm in (["net.4", "net.6"],):  # where the norm trains, its statistics are SWA's to estimate
        trainer(tmp_path, oft(modules_to_save=norm), StochasticWeightAveraging(1e-2), max_epochs=2).fit(model, loader())
    assert oft_layers(model)
