"""A layer that has left its series for the exact map: in a loop of one's own, in copies, states and files."""

from __future__ import annotations

import copy
import io
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from layer_cases import KINDS, Case, config
from torch import Tensor, nn

from lightning_oft import (
    OFTConfig,
    delete_adapter,
    inject,
    load_adapter,
    merge,
    oft_layers,
    project,
    save_adapter,
    unmerge,
)
from lightning_oft import functional as maths
from lightning_oft.formats.adapters import read_adapter
from lightning_oft.formats.checkpoint import complete, put_adapters, write_entry
from lightning_oft.layers import Rotation
from lightning_oft.layers.state import every_rotation

pytestmark = [
    pytest.mark.filterwarnings("ignore:adapter .* is not active"),
    pytest.mark.filterwarnings("ignore:block sizes adjusted"),
]
NAMES = ["up", "mid", "down"]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.mid, self.down = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.down(torch.tanh(self.mid(torch.tanh(self.up(x)))))
        return output


def _turn(model: nn.Module, angle: float, *names: str) -> None:
    """Generators whose largest ||Q_i||_F is `angle` of the reach, in layers of these names, or in all."""
    generator = torch.Generator().manual_seed(1)
    for name, layer in oft_layers(model).items():
        for rotation in every_rotation(layer) if not names or name in names else ():
            weight, terms = rotation.weight.detach(), rotation.series_terms
            weight.copy_(torch.randn(weight.shape, generator=generator))
            weight.mul_(angle * maths.reach_radius(terms or 6) / maths.frobenius_norm(weight).max())


def _exact(model: nn.Module) -> list[str]:
    return [name for name, layer in oft_layers(model).items() if all(r.terms is None for r in every_rotation(layer))]


def _partly(**options: Any) -> Net:
    """`up` has left its series, `mid` is at the edge of its reach, `down` rests."""
    model = Net()
    inject(model, OFTConfig(oft_block_size=4, target_modules=NAMES, **options))
    _turn(model, 1.5, "up")
    project(model)
    _turn(model, 0.999, "mid")
    return model


X = torch.randn(5, 8, generator=torch.Generator().manual_seed(2))


# ---- in a loop of one's own ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["linear_2d", "embedding_1d", "conv2d_3x3", "attention", "attention_kdim_vdim"])
def test_project_makes_every_kind_of_layer_leave_without_a_jump(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    case: Case = KINDS[kind]
    model, inputs = case.build().eval(), case.inputs()
    inject(model, config(target_modules=["layer"]))
    inject(model, config(target_modules=["layer"], block_share=True), "inactive")
    _turn(model, 1.0)
    before = model(*inputs)
    with caplog.at_level("INFO"):
        project(model)
        project(model)
    assert _exact(model) == ["layer"]
    torch.testing.assert_close(model(*inputs), before, rtol=0, atol=2e-6)
    said = [record.message for record in caplog.records if "go on with the exact" in record.message]
    assert len(said) == 1
    assert said[0].startswith("OFT: layer")
    merge(model)
    torch.testing.assert_close(model(*inputs), before, rtol=0, atol=5e-6)
    unmerge(model)
    delete_adapter(model, "inactive")
    assert _exact(model) == ["layer"]


@pytest.mark.parametrize("guard", ["exact", "project", "warn"])
def test_each_guard_does_what_it_says_and_nothing_within_the_reach(guard: Any) -> None:
    model = Net()
    inject(model, OFTConfig(oft_block_size=4, target_modules=NAMES, series_guard=guard))
    _turn(model, 0.9)
    _turn(model, 2.0, "mid")
    before = {name: layer.oft_R["default"].weight.clone() for name, layer in oft_layers(model).items()}
    project(model)
    rotations: dict[str, Rotation] = {name: layer.oft_R["default"] for name, layer in oft_layers(model).items()}
    assert _exact(model) == (["mid"] if guard == "exact" else [])
    assert torch.equal(rotations["mid"].weight, before["mid"]) == (guard == "warn")
    assert all(torch.equal(rotations[name].weight, before[name]) for name in ("up", "down"))
    error = float(maths.orthogonality_error(rotations["mid"].matrix().detach().double()).max())
    assert (error > maths.SERIES_TOLERANCE) == (guard == "warn")


def test_a_rotation_that_has_left_is_held_where_float32_can_tell_it() -> None:
    model = _partly(max_angle=None)
    rotation: Any = oft_layers(model)["up"].oft_R["default"]
    rotation.weight.data.mul_(1e6)
    project(model)
    assert float(maths.frobenius_norm(rotation.weight.detach()).max()) == pytest.approx(maths.EXACT_RADIUS, rel=1e-5)
    assert float(maths.orthogonality_error(rotation.matrix().detach().double()).max()) <= maths.SERIES_TOLERANCE


# ---- copies and states -----------------------------------------------------------------------------------------------


def _through_torch_save(model: nn.Module) -> nn.Module:
    buffer, again = io.BytesIO(), _fresh()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    again.load_state_dict(torch.load(buffer, weights_only=True))
    return again


def _fresh() -> Net:
    model = Net()
    inject(model, OFTConfig(oft_block_size=4, target_modules=NAMES))
    return model


def _checkpoint(model: nn.Module, adapter_only: bool) -> dict[str, Any]:
    buffer = io.BytesIO()
    checkpoint: dict[str, Any] = {"state_dict": dict(model.state_dict())}
    write_entry(model, checkpoint, adapter_only)
    torch.save(checkpoint, buffer)
    buffer.seek(0)
    found: dict[str, Any] = torch.load(buffer, weights_only=True)
    return found


def _through_checkpoint(model: nn.Module, adapter_only: bool, into: nn.Module) -> nn.Module:
    checkpoint = _checkpoint(model, adapter_only)
    complete(into, checkpoint)
    into.load_state_dict(checkpoint["state_dict"])
    return into


def _put(model: nn.Module) -> nn.Module:
    again = Net()
    put_adapters(again, _checkpoint(model, True))
    return again


WAYS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "deepcopy": copy.deepcopy,
    "state dict": lambda model: (again := _fresh(), again.load_state_dict(model.state_dict()))[0],
    "torch.save": _through_torch_save,
    "adapter-only checkpoint": lambda model: _through_checkpoint(model, True, _fresh()),
    "full checkpoint": lambda model: _through_checkpoint(model, False, _fresh()),
    "checkpoint into another state": lambda model: _through_checkpoint(model, True, _all_left()),
    "load_from_checkpoint": _put,
    "a merge taken back": lambda model: (merge(model, keep_base="always"), unmerge(model), model)[2],
}


def _all_left() -> Net:
    model = _fresh()
    _turn(model, 2.0)
    project(model)
    assert _exact(model) == NAMES
    return model


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_which_layers_have_left_goes_along_to_the_bit(way: Callable[[nn.Module], nn.Module]) -> None:
    model = _partly()
    expected = model(X)
    assert _exact(model) == ["up"]
    again = way(model)
    assert torch.equal(again(X), expected)
    assert _exact(again) == ["up"]
    _turn(again, 1.1, "mid")
    project(again)
    assert _exact(again) == ["up", "mid"]


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compiled_code_follows() -> None:
    model = _fresh()
    _turn(model, 0.9)
    compiled = torch.compile(model, backend=lambda graph, _: graph, fullgraph=True)
    before = compiled(X)
    for layer in oft_layers(model).values():
        layer.oft_R["default"].use_map(exact=True)  # type: ignore[index, union-attr, operator]
    assert not torch.equal(compiled(X), before)
    torch.testing.assert_close(compiled(X), model(X))


def test_a_map_computed_beside_another_layers_is_not_used_after_the_change() -> None:
    model = _fresh().train()
    _turn(model, 0.99)
    series = copy.deepcopy(model).mid(torch.ones(1, 16))
    model.up(X)  # computes the maps of its neighbours too
    model.mid.oft_R["default"].use_map(exact=True)  # type: ignore[index, union-attr, operator]
    exact = model.mid(torch.ones(1, 16))
    assert not torch.equal(exact, series)
    torch.testing.assert_close(exact, copy.deepcopy(model).eval().mid(torch.ones(1, 16)), rtol=0, atol=1e-6)


def test_an_earlier_state_brings_the_series_back() -> None:
    model = _fresh()
    _turn(model, 0.9)
    expected, earlier = model(X), copy.deepcopy(model.state_dict())
    _turn(model, 2.0)
    project(model)
    model.load_state_dict({"up.weight": earlier["up.weight"]}, strict=False)
    assert _exact(model) == NAMES
    model.load_state_dict(earlier)
    assert _exact(model) == []
    assert torch.equal(model(X), expected)


# ---- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"num_cayley_neumann_terms": 5}, {"block_share": True}])
def test_a_file_of_some_layers_that_left_and_others_that_did_not_is_exact_for_all(
    options: dict[str, Any], tmp_path: Path
) -> None:
    model = _partly(**options)
    expected = model(X).detach()
    save_adapter(model, tmp_path)
    content = json.loads((tmp_path / "adapter_config.json").read_text())
    assert content["use_cayley_neumann"] is False
    with pytest.warns(UserWarning, match="lightning_oft"):
        theirs = peft.PeftModel.from_pretrained(Net(), tmp_path)
    torch.testing.assert_close(theirs(X), expected, rtol=0, atol=1e-6)
    assert not torch.equal(Net()(X), expected)
    for again in (Net(), model):  # also into the model that it came from
        load_adapter(again, tmp_path)
        torch.testing.assert_close(again(X), expected, rtol=0, atol=1e-6)
        assert _exact(again) == NAMES
    save_adapter(model, tmp_path / "again")
    assert (tmp_path / "again" / "adapter_model.safetensors").read_bytes() == (
        tmp_path / "adapter_model.safetensors"
    ).read_bytes()


def test_a_series_that_is_loaded_from_beyond_its_reach_stays_pefts(tmp_path: Path) -> None:
    torch.manual_seed(0)
    theirs = peft.get_peft_model(Net(), peft.OFTConfig(oft_block_size=4, target_modules=NAMES))
    for name, parameter in theirs.named_parameters():
        if "oft_R" in name:
            nn.init.normal_(parameter, std=0.1)
    theirs.save_pretrained(tmp_path)
    ours = Net()
    load_adapter(ours, tmp_path)
    project(ours)
    assert _exact(ours) == []
    expected = theirs.eval()(X).detach()
    torch.testing.assert_close(ours(X), expected)
    for name, parameter in theirs.named_parameters():
        if "oft_R" in name:
            nn.init.constant_(parameter, 1e-3)
    theirs.save_pretrained(tmp_path / "inside")
    load_adapter(ours, tmp_path / "inside")
    _turn(ours, 2.0)
    project(ours)
    assert _exact(ours) == NAMES  # its guard is what its configuration says again
    load_adapter(ours, tmp_path)
    torch.testing.assert_close(ours(X), expected)
    save_adapter(ours, tmp_path / "ours")
    stored = read_adapter(tmp_path / "ours").generators()
    assert all(torch.equal(value, read_adapter(tmp_path).generators()[name]) for name, value in stored.items())
