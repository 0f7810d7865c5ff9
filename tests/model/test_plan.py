"""What inject refuses: the layer and the remedy are named, and the model stays as it was."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from layer_cases import config
from peft.tuners.oft.layer import OFTLayer as PeftLayer
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune, spectral_norm

from lightning_oft import OFTConfig, inject
from lightning_oft.model.plan import nearest_divisor


class _Dead(nn.Linear):
    """As a layer that quantizes its activations: the output knows nothing of the input's gradient."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.detach())


def _weight_normed() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return nn.utils.weight_norm(nn.Linear(8, 8))  # type: ignore[no-any-return]


def _pruned() -> nn.Module:
    layer = nn.Linear(8, 8)
    prune.random_unstructured(layer, "weight", 0.5)
    return layer


def _parametrized_projection() -> nn.Module:
    layer = nn.MultiheadAttention(8, 2)
    parametrizations.weight_norm(layer.out_proj)
    return layer


def _compiled() -> nn.Module:
    return torch.compile(nn.Linear(8, 8), backend="eager")  # type: ignore[return-value]


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "lazy": (lambda: nn.LazyLinear(8), "its shape is not known yet: run one batch through the model first"),
    "parametrized": (
        lambda: parametrizations.orthogonal(nn.Linear(8, 8)),
        "its weight is parametrized: call torch.nn.utils.parametrize.remove_parametrizations first",
    ),
    "parametrized_out_proj": (_parametrized_projection, "of its out_proj, its weight is parametrized: call .* first"),
    "weight_norm": (_weight_normed, "its weight is recomputed at every forward: call .*remove_weight_norm first"),
    "spectral_norm": (lambda: spectral_norm(nn.Linear(8, 8)), "its weight is recomputed .*remove_spectral_norm"),
    "pruned": (_pruned, "its weight is recomputed .*prune.remove first"),
    "norm": (lambda: nn.LayerNorm(8), "a LayerNorm cannot be adapted .only layers of type .*linear"),
    "dead": (lambda: _Dead(8, 8), "the output of the base layer does not require grad when its input does.*exclude"),
    "prime": (lambda: nn.Linear(769, 4), "fan-in 769 with oft_block_size=4 leaves blocks of size 1.*exclude_modules"),
    "compiled": (_compiled, "it is compiled by itself: compile the module above it"),
}


def _structure(model: nn.Module) -> list[Any]:
    modules = [(name, type(m), len(m._forward_pre_hooks), len(m._forward_hooks)) for name, m in model.named_modules()]
    return [modules, list(model.state_dict()), [p.requires_grad for p in model.parameters()]]


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
@pytest.mark.parametrize(("build", "message"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_adapted_is_refused_and_nothing_changes(build: Callable[[], nn.Module], message: str) -> None:
    model = nn.ModuleDict({"fine": nn.Linear(8, 8), "layer": build()})
    before = _structure(model)
    with pytest.raises(ValueError, match=f"layer: {message}"):
        inject(model, config(target_modules=["fine", "layer"]))
    assert _structure(model) == before


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
def test_after_the_remedy_it_can() -> None:
    lazy, pruned, parametrized = nn.LazyLinear(8), _pruned(), parametrizations.orthogonal(nn.Linear(8, 8))
    lazy(torch.randn(2, 8))
    prune.remove(pruned, "weight")  # type: ignore[no-untyped-call]
    nn.utils.parametrize.remove_parametrizations(parametrized, "weight")
    model = nn.Sequential(lazy, pruned, parametrized)
    assert inject(model, config(target_modules=["0", "1", "2"])) == ["0", "1", "2"]


CALLS: dict[str, tuple[dict[str, Any], str, str]] = {
    "block": ({"oft_block_size": None, "r": 8}, "default", "body: fan-in 8 with r=8 leaves blocks of size 1"),
    "saved": (
        {"modules_to_save": ["head", "classifier"]},
        "default",
        "modules_to_save: classifier matches no module; the model's own are body, tied, head",
    ),
    "tied": ({"modules_to_save": ["tied"]}, "default", "body: its weight is also that of tied .they are tied."),
    "no_name": ({}, "", "adapter_name='': must be a non-empty string without dots"),
    "dotted_name": ({}, "a.b", "adapter_name='a.b': must be"),
    "taken_name": ({}, "keys", "adapter_name='keys': must be .* no name of nn.ModuleDict's own"),
}


@pytest.mark.parametrize(("options", "name", "message"), CALLS.values(), ids=CALLS)
def test_what_cannot_be_asked_is_refused_and_nothing_changes(options: dict[str, Any], name: str, message: str) -> None:
    model = nn.ModuleDict({"body": nn.Linear(8, 8), "tied": nn.Linear(8, 8), "head": nn.Linear(8, 2)})
    model["tied"].weight = model["body"].weight
    before = _structure(model)
    with pytest.raises(ValueError, match=message):
        inject(model, config(**{"target_modules": ["body"], **options}), name)
    assert _structure(model) == before


def test_inject_takes_a_module_and_a_config() -> None:
    for arguments in ((nn.Linear(8, 8), {"r": 4}), ("model", OFTConfig(r=4))):
        with pytest.raises(TypeError, match=r"takes a module and an OFTConfig"):
            inject(*arguments)  # type: ignore[arg-type]


def test_the_same_adapter_with_another_configuration_is_refused() -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    inject(model, config(target_modules=["0"]))
    with pytest.raises(ValueError, match=r"0: adapter 'default' is already there .* .coft=False, now True.: unload"):
        inject(model, config(target_modules=["0"], coft=True))


def test_a_block_size_that_does_not_divide_is_adjusted_and_said_once() -> None:
    model = nn.Sequential(*(nn.Linear(30, 30) for _ in range(6)), nn.Linear(30, 16), nn.Linear(16, 12))
    with pytest.warns(UserWarning, match="block sizes adjusted") as caught:
        inject(model, OFTConfig(oft_block_size=16))
    assert [str(warning.message) for warning in caught] == [
        "block sizes adjusted to divide the fan-in: block size 15 instead of 16 for fan-in 30: 0, 1, 2, 3 and 3 more"
    ]
    with pytest.warns(UserWarning, match=re.escape("r=3 instead of 4 for fan-in 30: 0, 1, 2, 3 and 3 more")):
        inject(nn.Sequential(*(nn.Linear(30, 30) for _ in range(7))), OFTConfig(r=4))


def test_the_nearest_divisor_is_pefts() -> None:
    layer = PeftLayer.__new__(PeftLayer)
    for number in range(2, 80):
        for wanted in range(2, 90):
            assert nearest_divisor(number, wanted) == layer.adjust_oft_parameters(number, wanted)


def test_heads_that_a_task_type_implies_need_not_exist() -> None:
    model = nn.ModuleDict({"body": nn.Linear(8, 8), "score": nn.Linear(8, 2)})
    assert inject(model, config(target_modules="all-linear", task_type="SEQ_CLS")) == ["body"]
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {
        "body.oft_R.default.weight",
        "score.weight",
        "score.bias",
    }
