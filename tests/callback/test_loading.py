"""A LightningModule from a checkpoint, without the callback that wrote it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from small import Small, difference, inputs, loader, oft, state, trainer

from lightning_oft import load_from_checkpoint, merge, oft_layers

pytestmark = pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`")


def fit(root: Path, **options: Any) -> tuple[pl.Trainer, Small]:
    model, keeper = Small(), ModelCheckpoint(root, save_last=True)
    run = trainer(root, oft(**options), keeper)
    run.fit(model, loader(), loader(False))
    return run, model


@pytest.mark.parametrize("kind", ["adapter", "full", "merged"])
def test_load_from_checkpoint_needs_no_callback(tmp_path: Path, kind: str) -> None:
    options = {"save_adapter_only": kind != "full"}
    run, model = fit(tmp_path, **options)
    if kind == "merged":
        run.save_checkpoint(tmp_path / "last.ckpt")
    loaded = load_from_checkpoint(Small, tmp_path / "last.ckpt")
    x = inputs()[0]
    torch.testing.assert_close(loaded(x), model.eval()(x))
    assert bool(oft_layers(loaded)) == (kind != "merged")
    if kind != "merged":
        merge(loaded)
        assert difference(state(loaded), state(model)) == 0.0
    fewer = load_from_checkpoint(Small, tmp_path / "last.ckpt", lr=0.5)
    assert fewer.lr == 0.5


def test_load_from_checkpoint_restores_several_adapters(tmp_path: Path) -> None:
    run, model = fit(tmp_path, merge_on_fit_end=False, bias="oft_only")
    run.save_checkpoint(tmp_path / "again.ckpt")
    loaded = load_from_checkpoint(Small, tmp_path / "again.ckpt")
    assert difference(state(loaded), state(model)) == 0.0
    trainable = {name for name, p in loaded.named_parameters() if p.requires_grad}
    assert trainable == {
        *(f"net.{layer}.oft_R.default.weight" for layer in (0, 3)),
        *(f"net.{layer}.bias" for layer in (0, 3, 6)),
        "net.6.weight",
    }


class Other(Small):
    """A base of other weights, or of those it is given."""

    base: dict[str, torch.Tensor] = {}

    def build(self) -> None:
        super().build()
        self.net[0].weight.data.mul_(2)  # type: ignore[index, union-attr, operator]
        if self.base:
            self.load_state_dict(self.base)


class Given(Other):
    pass


def test_after_a_full_checkpoint_the_adapter_belongs_to_the_base_that_it_brought(tmp_path: Path) -> None:
    fit(tmp_path, save_adapter_only=False)
    full = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    Given.base = {name: value for name, value in full.items() if "oft_R" not in name}
    for epochs, cls, source in ((2, Other, tmp_path), (3, Given, tmp_path / "2")):
        run = trainer(tmp_path, oft(), ModelCheckpoint(tmp_path / f"{epochs}", save_last=True), max_epochs=epochs)
        run.fit(cls(), loader(), loader(False), ckpt_path=str(source / "last.ckpt"))
