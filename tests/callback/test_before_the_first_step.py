"""What is wrong before a fit begins is said before it begins, and the model stays as it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from small import Small, loader, oft, trainer
from torch import nn

from lightning_oft import OFTFinetuning, inject, oft_layers, unload
from lightning_oft.surgery.walk import merged_layers

pytestmark = pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`")

HOOKS = {"on_save_checkpoint", "on_load_checkpoint", "configure_model"}


def _looks(model: Small) -> dict[str, Any]:
    return {
        "state": {name: value.clone() for name, value in model.state_dict().items()},
        "trains": [parameter.requires_grad for parameter in model.parameters()],
        "classes": [type(module) for module in model.modules()],
        "hooks": HOOKS & model.__dict__.keys(),
        "merged": list(merged_layers(model)),
    }


def _same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    states = one.pop("state"), other.pop("state")
    return one == other and all(torch.equal(states[0][name], states[1][name]) for name in states[0])


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "a target that matches nothing": ({"target_modules": ["nope"]}, "nope"),
    "a place that is a file": ({"export_dir": "taken"}, "export_dir='.*taken': cannot be written"),
    "a place of something else": ({"export_dir": "precious"}, "merged: holds something else than a model"),
}


@pytest.mark.parametrize(("options", "message"), REFUSED.values(), ids=REFUSED)
def test_a_fit_that_is_refused_leaves_the_model_as_it_was(
    tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    (tmp_path / "taken").touch()
    (tmp_path / "precious" / "merged").mkdir(parents=True)
    (tmp_path / "precious" / "merged" / "thesis.txt").write_text("mine")
    if "export_dir" in options:
        options = {"export_dir": str(tmp_path / options["export_dir"])}
    model = Small()
    before = _looks(model)
    with pytest.raises((ValueError, OSError), match=message) as error:
        trainer(tmp_path, oft(**options)).fit(model, loader())
    assert "\n" not in str(error.value)
    assert _same(_looks(model), before)
    assert not oft_layers(model)
    assert (tmp_path / "precious" / "merged" / "thesis.txt").read_text() == "mine"
    trainer(tmp_path, oft()).fit(model, loader())
    assert merged_layers(model)


@pytest.mark.parametrize("damage", ["another base", "cut short", "no checkpoint"])
def test_a_checkpoint_that_is_refused_leaves_the_model_as_it_was(tmp_path: Path, damage: str) -> None:
    place = tmp_path / "last.ckpt"
    trainer(tmp_path, oft(), ModelCheckpoint(tmp_path, save_last=True)).fit(Small(), loader())
    model = Small()
    if damage == "another base":
        nn.init.ones_(model.net[0].weight)  # type: ignore[index, union-attr]
    else:
        place.write_bytes(place.read_bytes()[:-500] if damage == "cut short" else b"text")
    before = _looks(model)
    with pytest.raises(
        Exception, match="another base" if damage == "another base" else r"last\.ckpt: is no checkpoint"
    ):
        trainer(tmp_path, oft(), ModelCheckpoint(tmp_path, save_last=True)).fit(model, loader(), ckpt_path=str(place))
    assert _same(_looks(model), before)


@pytest.mark.parametrize("merge", [True, False], ids=["merged", "unmerged"])
def test_another_configuration_of_an_adapter_that_is_there_is_refused(tmp_path: Path, merge: bool) -> None:
    model = Small()
    trainer(tmp_path, oft(merge_on_fit_end=merge)).fit(model, loader())
    before = _looks(model)
    other = oft(max_angle=1.0)
    message = r"'default' is there already with another configuration \(max_angle=None, now 1\.0\): unload\(model\) to"
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, other).fit(model, loader())
    assert _same(_looks(model), before)
    unload(model)
    trainer(tmp_path, other).fit(model, loader())


def test_two_callbacks_do_not_write_into_one_directory(tmp_path: Path) -> None:
    parts = [
        oft(module=f"net.{i}", target_modules="all-linear", modules_to_save=None, export_dir="one") for i in (0, 3)
    ]
    with pytest.raises(ValueError, match="two OFTFinetuning callbacks have export_dir='one'"):
        trainer(tmp_path, *parts).fit(Small(), loader())


@pytest.mark.parametrize(
    "options",
    [{"enabled": "no"}, {"module": 3}, {"merge_on_fit_end": 1}, {"adapter_name": 3}, {"export_dir": 5}],
    ids=str,
)
def test_an_argument_of_a_wrong_type_is_refused_at_once(options: dict[str, Any]) -> None:
    ((name, value),) = options.items()
    with pytest.raises(TypeError, match=f"{name}={value!r}: must be"):
        OFTFinetuning(**options)


def test_a_merged_model_trains_like_any_other(tmp_path: Path) -> None:
    model = Small()
    trains = [parameter.requires_grad for parameter in model.parameters()]
    trainer(tmp_path, oft()).fit(model, loader())
    assert [parameter.requires_grad for parameter in model.parameters()] == trains
    merged = {name: value.clone() for name, value in model.state_dict().items()}
    trainer(tmp_path, oft()).validate(model, loader(shuffle=False), verbose=False)
    assert [parameter.requires_grad for parameter in model.parameters()] == trains
    trainer(tmp_path).fit(model, loader())
    assert not torch.equal(model.state_dict()["net.0.weight"], merged["net.0.weight"])


@pytest.mark.parametrize("new", [True, False], ids=["parametrization", "old style"])
def test_a_frozen_spectral_norm_keeps_its_statistics(new: bool) -> None:
    norm: Any = nn.utils.parametrizations.spectral_norm if new else nn.utils.spectral_norm
    model = nn.Sequential(norm(nn.Linear(8, 16)), nn.LeakyReLU(), nn.Linear(16, 1))
    from lightning_oft import OFTConfig

    inject(model, OFTConfig(oft_block_size=4, target_modules=["2"]))
    buffers = {name: value.clone() for name, value in model.named_buffers()}
    assert buffers
    model.train()
    for _ in range(3):
        model(torch.randn(4, 8)).sum().backward()
    assert all(torch.equal(value, buffers[name]) for name, value in model.named_buffers())
    unload(model)
    model.train()
    model(torch.randn(4, 8))
    assert not all(torch.equal(value, buffers[name]) for name, value in model.named_buffers())
