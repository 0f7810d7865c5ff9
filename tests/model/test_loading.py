"""AdapterState: taken from one model and put into another, whole or not at all."""

from __future__ import annotations

import copy
import dataclasses
import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from layer_cases import randomize
from norm_net import batch, flags, net, same, snapshot, train
from torch import Tensor, nn

from lightning_oft import AdapterState, OFTConfig, inject, merge, oft_layers, set_adapter, unload, unmerge
from lightning_oft.layers import rotations_of
from lightning_oft.model import fingerprint, put, take

pytestmark = pytest.mark.filterwarnings("ignore:block sizes adjusted", "ignore:adapter .* is not active")
OPTIONS: dict[str, Any] = {"oft_block_size": 4, "target_modules": ["conv", "fc"], "modules_to_save": ["head"]}


def _base() -> nn.Module:
    torch.manual_seed(0)
    return net().eval()


def _trained(**options: Any) -> tuple[nn.Module, AdapterState]:
    model = _base()
    inject(model, OFTConfig(**{**OPTIONS, "bias": "oft_only", **options}))
    train(model)
    return model.eval(), take(model)


@pytest.mark.parametrize("prefix", ["", "inner"])
def test_what_is_taken_computes_the_same_where_it_is_put(prefix: str) -> None:
    model, state = _trained()
    other: Any = nn.ModuleDict({"inner": _base()}) if prefix else _base()
    assert put(other, state) == [f"{prefix}.{name}".lstrip(".") for name in ("conv", "fc")]
    x = batch()
    assert torch.equal((other["inner"] if prefix else other)(x), model(x))
    again = take(other)
    assert again.config == state.config
    assert again.modules_to_save == [f"{prefix}.head".lstrip(".")]
    generators = again.generators().values()
    assert all(torch.equal(a, b) for a, b in zip(generators, state.generators().values(), strict=True))


def test_a_state_is_a_copy_and_a_merged_or_silent_adapter_can_be_taken() -> None:
    model, state = _trained()
    inject(model, OFTConfig(oft_block_size=2, target_modules=["fc"]), "second")
    set_adapter(model, "second")
    silent = take(model)
    set_adapter(model, "default")
    merge(model)
    merged = take(model)
    unload(model)
    for other in (silent, merged):
        assert other.fingerprints == state.fingerprints
        for mine, theirs in ((other.generators(), state.generators()), (other.saved, state.saved)):
            assert mine.keys() == theirs.keys()
            assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_an_adapter_that_is_there_takes_over_the_values() -> None:
    model, state = _trained()
    x, were = batch(), flags(model)
    expected = model(x)
    train(model)
    assert not torch.equal(model.eval()(x), expected)
    put(model, state)
    assert torch.equal(model(x), expected)
    assert flags(model) == were


def test_put_below_another_name_leaves_the_first_one_alone() -> None:
    model, state = _trained(modules_to_save=None, bias="none")
    other = _base()
    inject(other, OFTConfig(oft_block_size=2, target_modules=["fc"]))
    put(other, state, "loaded")
    assert rotations_of(other.fc, "default")[""].block_size == 2  # type: ignore[arg-type]
    set_adapter(other, "loaded")
    x = batch()
    assert torch.equal(other(x), model(x))


def test_another_base_is_refused_by_name_unless_one_insists() -> None:
    _, state = _trained()
    torch.manual_seed(1)
    other = net()
    with pytest.raises(
        ValueError, match=r"was trained on another base, conv, fc differ; .* ignore_mismatched_base=True"
    ):
        put(other, state)
    assert not oft_layers(other)
    put(other, state, ignore_mismatched_base=True)
    assert list(oft_layers(other)) == ["conv", "fc"]


def _load_another(model: Any) -> None:
    model.load_state_dict({"fc.weight": torch.randn(8, 8)}, strict=False)


def _train_beside(model: Any) -> None:
    model.fc.weight.requires_grad_(True)
    train(model)


def _load_and_merge(model: Any) -> None:
    _load_another(model)
    merge(model)


@pytest.mark.parametrize("change", [_load_another, _train_beside, _load_and_merge])
def test_an_adapter_belongs_to_the_base_that_it_turns_now(change: Callable[[nn.Module], None]) -> None:
    model, _ = _trained()
    weight = model.get_parameter("fc.weight")
    change(model)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        state = take(model)
    merged = change is _load_and_merge
    assert merged or [str(one.message).partition(":")[0] for one in said] == [
        "the weights of fc have changed since the injection"
    ]
    with pytest.raises(ValueError, match=r"another base, fc differ"):
        put(_base(), state)
    if merged:
        unmerge(model)
    now = _base()
    now.get_parameter("fc.weight").data.copy_(weight.data)
    assert put(now, state) == ["conv", "fc"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_base_that_was_cast_is_the_same_base(dtype: torch.dtype) -> None:
    model, state = _trained()
    assert take(model.to(dtype)).fingerprints == state.fingerprints


def test_injecting_putting_and_taking_read_each_weight_once(monkeypatch: pytest.MonkeyPatch) -> None:
    _, state = _trained()
    plain, read = fingerprint._read, Counter[int]()

    def counted(weight: Any, storage: str | None = None) -> str | None:
        read[id(weight)] += isinstance(weight, nn.Parameter)
        return plain(weight, storage)

    monkeypatch.setattr(fingerprint, "_read", counted)
    calls: list[Callable[[nn.Module], Any]] = [
        lambda one: inject(one, OFTConfig(**OPTIONS)),
        lambda one: put(one, state),
        take,
    ]
    injected, model = _base(), _base()
    for call, one in zip(calls, (injected, model, model), strict=True):
        read.clear()
        call(one)
        assert read[id(one.conv.weight)] == read[id(one.fc.weight)] == max(read.values()) == 1
    with torch.no_grad():  # and what was read is not remembered
        model.fc.weight.data[0] += 1
    with pytest.warns(UserWarning, match=r"weights of fc have changed"):
        assert take(model).fingerprints["fc"] != state.fingerprints["fc"]


@pytest.mark.parametrize(("name", "is_merged"), [("norm", False), ("fc.bias", False), ("norm", True)])
def test_what_was_unfrozen_by_hand_is_named_as_missing(name: str, is_merged: bool) -> None:
    model = _base()
    inject(model, OFTConfig(**OPTIONS))
    train(model)
    if is_merged:
        merge(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        take(model)
    part, _, key = name.partition(".")
    module: Any = model.get_submodule(part)
    (getattr(module, key) if key else module).requires_grad_(True)
    with pytest.warns(UserWarning, match=rf"^{name}.*: trained or changed beside adapter 'default'.* modules_to_save"):
        take(model)


class Centred(nn.Module):
    """Subtracts a mean of its own making, which follows the data in training."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.centre = nn.Linear(8, 8), nn.Module()
        self.centre.register_buffer("mean", torch.zeros(8))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc(x)
        if self.training:
            self.centre.mean.lerp_(y.detach().mean(0), 0.5)
        return y - self.centre.mean  # type: ignore[operator]


@pytest.mark.parametrize("saved", [None, ["centre"]])
def test_statistics_that_drift_are_named_and_the_advice_helps(saved: list[str] | None) -> None:
    base, x = Centred(), torch.randn(16, 8) + 3
    model = copy.deepcopy(base)
    inject(model, OFTConfig(oft_block_size=4, target_modules=["fc"], modules_to_save=saved))
    model(x)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        state = take(model)
    assert bool(said) == (saved is None)
    assert all(str(one.message).startswith("centre.mean: trained or changed beside") for one in said)
    put(base, state)
    assert torch.equal(base.eval()(x), model.eval()(x)) == (saved is not None)


def _with(state: AdapterState, **saved: Tensor) -> AdapterState:
    return dataclasses.replace(state, saved={**state.saved, **saved})


def _other(**options: Any) -> Callable[[nn.Module, AdapterState], object]:
    def present(model: nn.Module, state: AdapterState) -> object:
        inject(model, OFTConfig(**{**OPTIONS, "bias": "oft_only", **options}))
        randomize(model)
        return put(model, state)

    return present


REFUSED: dict[str, tuple[Callable[[nn.Module, AdapterState], object], str]] = {
    "no layer": (
        lambda m, s: put(m, dataclasses.replace(s, layers={**s.layers, "fc9": s.layers["fc"]})),
        "the model has no fc9; load the adapter into the model it was trained on",
    ),
    "no tensor": (lambda m, s: put(m, _with(s, **{"head.9.weight": torch.ones(1)})), "the model has no head.9.weight"),
    "fan-in": (
        lambda m, s: put(m, dataclasses.replace(s, layers={**s.layers, "conv": s.layers["fc"]})),
        "conv has fan-in 27, the file's 2 blocks of 4 turn 8",
    ),
    "class": (
        lambda m, s: put(m, dataclasses.replace(s, layers={"norm": s.layers["fc"]})),
        "norm is a BatchNorm2d, which this rotation does not fit",
    ),
    "shape": (lambda m, s: put(m, _with(s, **{"fc.bias": torch.ones(9)})), r"fc.bias has shape \(8,\) in the model"),
    "lacking": (
        lambda m, s: put(m, dataclasses.replace(s, saved={})),
        "its configuration says that conv.bias, fc.bias, head.0.bias, .* were trained, and the file lacks them",
    ),
    "dtype": (
        lambda m, s: put(m, _with(s, **{"fc.bias": torch.ones(8, dtype=torch.int32)})),
        "fc.bias is torch.int32, torch.float32 in the model",
    ),
    "broken": (lambda m, s: put(m, _with(s, **{"fc.bias": torch.ones(8) / 0})), "fc.bias is NaN or infinite"),
    "name": (lambda m, s: put(m, s, "a.b"), "adapter_name='a.b'"),
    "ambiguous": (
        lambda m, s: put(nn.ModuleDict({"a": m, "b": _base()}), s),
        "its names fit a, b alike; load it into the one that you mean",
    ),
    "other layers": (_other(target_modules=["fc"]), "another adapter 'default' already, only one of them adapts conv"),
    "other tensors": (_other(modules_to_save=None), "only one of them trains head.0.bias, head.0.weight"),
    "other maths": (_other(use_cayley_neumann=False), "use_cayley_neumann is False there and True in the file"),
    "other blocks": (_other(oft_block_size=9), "the blocks of conv, fc have another size"),
}


@pytest.mark.parametrize(("call", "message"), REFUSED.values(), ids=REFUSED)
def test_what_does_not_fit_is_refused_and_nothing_changes(
    call: Callable[[nn.Module, AdapterState], object], message: str
) -> None:
    _, state = _trained()
    model = _base()
    before, were = snapshot(model), flags(model)
    with pytest.raises(ValueError, match=message):
        call(model, state)
    if "oft_R" not in str(list(model.state_dict())):
        assert same(model, before)
        assert flags(model) == were


def test_a_merged_model_takes_none_and_a_broken_adapter_is_not_given() -> None:
    model, state = _trained()
    merge(model)
    with pytest.raises(RuntimeError, match="cannot load an adapter: conv, fc are merged"):
        put(model, state, "second")
    model, _ = _trained()
    nn.init.constant_(rotations_of(model.fc, "default")[""].weight, float("nan"))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="generators of fc are NaN or infinite; nothing was written"):
        take(model)
    with pytest.raises(ValueError, match="no adapter 'third' here; there are: default"):
        take(model, "third")


def test_a_head_trained_apart_from_the_embedding_it_is_tied_to_gets_a_copy(caplog: pytest.LogCaptureFixture) -> None:
    def tied() -> Any:
        torch.manual_seed(0)
        model = nn.ModuleDict({"words": nn.Embedding(8, 4), "body": nn.Linear(4, 4), "head": nn.Linear(4, 8)})
        model["head"].weight = model["words"].weight
        return model

    model = tied()
    inject(model, OFTConfig(oft_block_size=2, target_modules=["body"], modules_to_save=["head"]))
    state = take(model)
    theirs = torch.randn(8, 4)  # PEFT trains a copy: the embedding stays
    saved = {"head.weight": theirs, "head.bias": state.saved["head.bias"]}
    alone = dataclasses.replace(state, saved=saved, modules_to_save=["head"])
    fresh = tied()
    put(fresh, alone)
    assert "load: head.weight shared a weight with another module" in caplog.text
    assert torch.equal(fresh["head"].weight, theirs)
    assert torch.equal(fresh["words"].weight, tied()["words"].weight)
