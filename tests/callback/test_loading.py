"""A LightningModule from a checkpoint, without the callback that wrote it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from small import Small, difference, inputs, loader, oft, state, trainer

from lightning_oft import OFTConfig, inject, load_from_checkpoint, merge, oft_layers, set_adapter, unload

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


def test_adapters_are_active_on_the_layers_where_they_were(tmp_path: Path) -> None:
    first = oft(adapter_name="first", target_modules=["net.3"], modules_to_save=None, merge_on_fit_end=False)
    second = oft(adapter_name="second", modules_to_save=None, merge_on_fit_end=False)
    model = Small()
    with pytest.warns(UserWarning, match=r"adapter 'second' is not active on net\.3"):
        trainer(tmp_path, first, second, ModelCheckpoint(tmp_path, save_last=True)).fit(model, loader(), loader(False))
    loaded = load_from_checkpoint(Small, tmp_path / "last.ckpt")
    assert torch.equal(loaded(inputs()[0]), model.eval()(inputs()[0]))
    assert {n for n, p in loaded.named_parameters() if p.requires_grad} == {
        n for n, p in model.named_parameters() if p.requires_grad
    }


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks used to create")
def test_a_checkpoint_of_another_choice_of_adapters_brings_its_choice(tmp_path: Path) -> None:
    """What two adapters trained whole shares one place in the state dict: the file says whose values are in it."""
    adapters = [oft(adapter_name=name, merge_on_fit_end=False) for name in ("a", "b")]

    class Switch(pl.Callback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            set_adapter(pl_module, "b")

    model = Small()
    with pytest.warns(UserWarning, match="adapter 'b' is not active on"):
        trainer(tmp_path, *adapters, Switch(), ModelCheckpoint(tmp_path, save_last=True)).fit(
            model, loader(), loader(False)
        )
    expected = {}
    for name in ("a", "b"):
        set_adapter(model, name)
        expected[name] = model.eval()(inputs()[0])
    other = Small()
    with pytest.warns(UserWarning, match="adapter 'b' is not active on"):
        trainer(tmp_path, *(oft(adapter_name=name) for name in ("a", "b"))).validate(
            other, loader(False), ckpt_path=str(tmp_path / "last.ckpt"), verbose=False
        )
    for name in ("b", "a"):
        set_adapter(other, name)
        assert torch.equal(other.eval()(inputs()[0]), expected[name])


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks used to create")
def test_a_load_state_dict_of_the_instance_is_the_one_that_is_called(tmp_path: Path) -> None:
    trainer(tmp_path, oft(), ModelCheckpoint(tmp_path, save_last=True)).fit(Small(), loader())
    model, calls = Small(), list[bool]()

    def own(state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        calls.append(strict)
        return Small.load_state_dict(model, state_dict, strict=strict, assign=assign)

    model.load_state_dict = own  # type: ignore[method-assign]
    trainer(tmp_path, oft()).validate(model, loader(False), ckpt_path=str(tmp_path / "last.ckpt"), verbose=False)
    assert len(calls) == 1
    unload(model)
    assert model.load_state_dict is own  # type: ignore[comparison-overlap]


class Injected(Small):
    """Injects by itself, without the callback."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        inject(self, OFTConfig(oft_block_size=4, target_modules=["net.0", "net.3"]))


def test_a_module_that_injects_by_itself_needs_no_entry(tmp_path: Path) -> None:
    model = Injected(batch_norm=False)
    trainer(tmp_path, ModelCheckpoint(tmp_path, save_last=True)).fit(model, loader(), loader(False))
    loaded = load_from_checkpoint(Injected, tmp_path / "last.ckpt")
    assert difference(state(loaded), state(model)) == 0.0


class Tied(Small):
    """The head shares the weight of an embedding."""

    def build(self) -> None:
        super().build()
        self.names = torch.nn.Embedding(2, 16)
        self.net[6].weight = self.names.weight  # type: ignore[index]


def test_a_tied_head_of_an_earlier_version_stays_tied(tmp_path: Path) -> None:
    """They named a tied tensor once, under its first name, and said nothing for PEFT."""
    trainer(tmp_path, oft(), ModelCheckpoint(tmp_path, save_last=True)).fit(Tied(), loader(), loader(False))
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    content = checkpoint["lightning_oft"]["adapters"]["default"]
    for key in ("modules_to_save", "known_to_peft", "carried", "has_unique_names", "base"):
        del content[key]
    content["owned"] = [name for name in content["owned"] if name != "names.weight"]
    del checkpoint["lightning_oft"]["active_on"]
    torch.save(checkpoint, tmp_path / "earlier.ckpt")
    loaded = load_from_checkpoint(Tied, tmp_path / "earlier.ckpt")
    assert loaded.net[6].weight is loaded.names.weight  # type: ignore[index]
