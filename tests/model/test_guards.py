"""Every refusal of the surgery: it names the layer and the remedy, and leaves the model as it was."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from layer_cases import config, randomize
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune, spectral_norm

from lightning_oft import OFTConfig, disable_adapters, inject, merge, set_adapter, unload, unmerge


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


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "lazy": (lambda: nn.LazyLinear(8), "layer: its shape is not known yet: run one batch through the model first"),
    "lazy_conv": (lambda: nn.LazyConv2d(8, 3), "layer: its shape is not known yet"),
    "parametrized": (
        lambda: parametrizations.orthogonal(nn.Linear(8, 8)),
        "layer: its weight is parametrized: call torch.nn.utils.parametrize.remove_parametrizations first",
    ),
    "parametrized_out_proj": (
        _parametrized_projection,
        "layer: of its out_proj, its weight is parametrized: call .*remove_parametrizations first",
    ),
    "weight_norm": (
        _weight_normed,
        "layer: its weight is recomputed at every forward: call .*remove_weight_norm first",
    ),
    "spectral_norm": (
        lambda: spectral_norm(nn.Linear(8, 8)),
        "layer: its weight is recomputed at every forward: call .*remove_spectral_norm or prune.remove first",
    ),
    "pruned": (_pruned, "layer: its weight is recomputed .*prune.remove first"),
    "norm": (lambda: nn.LayerNorm(8), "layer: a LayerNorm cannot be adapted .only layers of type .*linear"),
    "bilinear": (lambda: nn.Bilinear(8, 8, 8), "layer: a Bilinear cannot be adapted"),
    "lstm": (lambda: nn.LSTM(8, 8), "layer: a LSTM cannot be adapted"),
    "dead": (
        lambda: _Dead(8, 8),
        "layer: the output of the base layer does not require grad when its input does.*exclude these layers or load "
        "the base with weight-only quantization",
    ),
    "prime": (
        lambda: nn.Linear(769, 4),
        "layer: fan-in 769 with oft_block_size=4 leaves blocks of size 1.*add it to exclude_modules",
    ),
}


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
@pytest.mark.parametrize(("build", "message"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_adapted_is_refused_and_nothing_changes(build: Callable[[], nn.Module], message: str) -> None:
    model = nn.ModuleDict({"fine": nn.Linear(8, 8), "layer": build()})
    before = _fingerprint(model)
    with pytest.raises(ValueError, match=message):
        inject(model, config(target_modules=["fine", "layer"]))
    assert _fingerprint(model) == before


def _fingerprint(model: nn.Module) -> list[Any]:
    modules = [(name, type(m), len(m._forward_pre_hooks), len(m._forward_hooks)) for name, m in model.named_modules()]
    return [modules, list(model.state_dict()), [p.requires_grad for p in model.parameters()]]


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
def test_after_the_remedy_it_can() -> None:
    lazy, pruned, parametrized = nn.LazyLinear(8), _pruned(), parametrizations.orthogonal(nn.Linear(8, 8))
    lazy(torch.randn(2, 8))
    prune.remove(pruned, "weight")  # type: ignore[no-untyped-call]
    nn.utils.parametrize.remove_parametrizations(parametrized, "weight")
    model = nn.Sequential(lazy, pruned, parametrized)
    assert inject(model, config(target_modules=["0", "1", "2"])) == ["0", "1", "2"]


def test_one_block_of_size_one_by_r_is_refused_too() -> None:
    with pytest.raises(ValueError, match="0: fan-in 8 with r=8 leaves blocks of size 1"):
        inject(nn.Sequential(nn.Linear(8, 8)), OFTConfig(r=8))


def test_a_block_size_that_does_not_divide_is_adjusted_and_said_once() -> None:
    model = nn.Sequential(*(nn.Linear(30, 30) for _ in range(6)), nn.Linear(30, 16), nn.Linear(16, 12))
    with pytest.warns(UserWarning, match="block sizes adjusted") as caught:
        inject(model, OFTConfig(oft_block_size=16))
    assert [str(warning.message) for warning in caught] == [
        "block sizes adjusted to divide the fan-in: block size 15 instead of 16 for fan-in 30: 0, 1, 2, 3 and 3 more"
    ]
    with pytest.warns(UserWarning, match="r=3 instead of 4 for fan-in 30: 0, 1, 2, 3 and 3 more"):
        inject(nn.Sequential(*(nn.Linear(30, 30) for _ in range(7))), OFTConfig(r=4))


def test_a_linear_layer_compiled_by_itself_is_refused() -> None:
    root: Any = torch.compile(nn.Linear(8, 8), backend="eager")
    with pytest.raises(ValueError, match="selects what cannot be adapted: the model itself: it is compiled by itself"):
        inject(root, config(target_modules="all-linear"))
    model = nn.Sequential(nn.Linear(8, 8), root)
    with pytest.raises(ValueError, match="1: it is compiled by itself: compile the module above it"):
        inject(model, config(target_modules="all-linear"))


def test_nothing_matched_names_what_could_be() -> None:
    with pytest.raises(ValueError, match=r"target_modules=\['q'\] matches nothing; layers that could be adapted: 0"):
        inject(nn.Sequential(nn.Linear(8, 8)), config(target_modules=["q"]))


def test_modules_to_save_that_match_nothing_are_named_with_what_is_there() -> None:
    model = nn.ModuleDict({"body": nn.Linear(8, 8), "head": nn.Linear(8, 2)})
    before = _fingerprint(model)
    with pytest.raises(
        ValueError, match="modules_to_save: classifier matches no module; the model's own are body, head"
    ):
        inject(model, config(target_modules=["body"], modules_to_save=["head", "classifier"]))
    assert _fingerprint(model) == before


def test_heads_that_a_task_type_implies_need_not_exist() -> None:
    model = nn.ModuleDict({"body": nn.Linear(8, 8), "score": nn.Linear(8, 2)})
    assert inject(model, config(target_modules="all-linear", task_type="SEQ_CLS")) == ["body"]
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {
        "body.oft_R.default.weight",
        "score.weight",
        "score.bias",
    }


@pytest.mark.parametrize("name", ["", "a.b", "keys", "items", "forward", "training", "weight.x", "_modules", 3, None])
def test_a_name_that_cannot_be_a_key_is_refused(name: Any) -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    before = _fingerprint(model)
    with pytest.raises(ValueError, match=r"adapter_name=.*must be a non-empty string without dots"):
        inject(model, config(target_modules=["0"]), name)
    assert _fingerprint(model) == before


def test_the_same_adapter_with_another_configuration_is_refused() -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    inject(model, config(target_modules=["0"]))
    with pytest.raises(
        ValueError,
        match=r"0: adapter 'default' is already there with another configuration .coft=False, now True.: unload",
    ):
        inject(model, config(target_modules=["0"], coft=True))


def test_a_merged_model_refuses_what_needs_its_base() -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    inject(model, config(target_modules=["0"]))
    randomize(model)
    merge(model)
    for action in (
        lambda: inject(model, config(target_modules=["0"]), "second"),
        lambda: set_adapter(model, "default"),
        lambda: disable_adapters(model).__enter__(),
        lambda: merge(model),
    ):
        with pytest.raises(RuntimeError, match=r"0 are merged; call unmerge.model. first"):
            action()


def test_inside_disable_adapters_nothing_may_be_changed() -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    inject(model, config(target_modules=["0"]))
    with disable_adapters(model):
        for action in (
            lambda: inject(model, config(target_modules=["0"]), "second"),
            lambda: set_adapter(model, "default"),
            lambda: unload(model),
            lambda: merge(model),
        ):
            with pytest.raises(RuntimeError, match="inside disable_adapters: leave its context first"):
                action()


def test_without_an_adapter_there_is_nothing_to_merge_or_choose() -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    with pytest.raises(ValueError, match="nothing to merge: the model has no adapter; call inject or load_adapter"):
        merge(model)
    with pytest.raises(RuntimeError, match="nothing to unmerge: no layer of the model is merged"):
        unmerge(model)
    with pytest.raises(ValueError, match="no adapter 'default' here; there are: none"):
        set_adapter(model, "default")
    unload(model)


@pytest.mark.parametrize(
    ("names", "trainable", "message"),
    [
        ("third", None, "no adapter 'third' here; there are: default, second"),
        (["default", "default"], None, "each can be active once"),
        ("default", "second", r"trainable=\['second'\]: only active adapters train, and those are \['default'\]"),
        ("default", ["third"], "no adapter 'third' here"),
    ],
)
def test_a_choice_that_cannot_be_is_refused_and_nothing_changes(names: Any, trainable: Any, message: str) -> None:
    model, x = nn.Sequential(nn.Linear(8, 8)), torch.randn(2, 8)
    inject(model, config(target_modules=["0"]))
    with pytest.warns(UserWarning, match="not active"):
        inject(model, config(target_modules=["0"]), "second")
    randomize(model)
    before = model(x)
    with pytest.raises(ValueError, match=message):
        set_adapter(model, names, trainable)
    assert torch.equal(model(x), before)


def test_a_call_without_a_known_input_is_a_type_error() -> None:
    class Named(nn.Linear):
        def forward(self, tokens: Tensor) -> Tensor:  # type: ignore[override]
            return super().forward(tokens)

    model = nn.ModuleDict({"layer": Named(8, 8)})
    inject(model, config())
    with pytest.raises(TypeError, match=r"Named called with \['tokens'\]: pass its input as the first argument"):
        model["layer"](tokens=torch.randn(2, 8))
    assert model["layer"](torch.randn(2, 8)).shape == (2, 8)
