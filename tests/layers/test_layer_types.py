"""Every layer type: exact identity, merged equals unmerged, and the way back."""

from __future__ import annotations

import copy
import functools
import importlib
import itertools
import pickle
import warnings
from typing import Any

import pytest
import torch
from layer_cases import KINDS, Case, config, randomize, relative
from torch import Tensor, nn

from lightning_oft import disable_adapters, inject, merge, oft_layers, set_adapter, unload, unmerge

cases = pytest.mark.parametrize("case", KINDS.values(), ids=KINDS)
SOME = (
    "linear_3d",
    "conv1d_hf",
    "embedding_1d",
    "conv2d_groups",
    "conv_transpose1d",
    "attention",
    "attention_kdim_vdim",
    "experts",
    "experts_transposed",
)
"""One of each way to rotate: by the input, by the output, by the weight, by the weights of several parts."""
some_cases = pytest.mark.parametrize("case", [KINDS[name] for name in SOME], ids=SOME)
pytestmark = pytest.mark.filterwarnings("ignore:block sizes adjusted")


def _model(case: Case, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, tuple[Tensor, ...]]:
    model = case.build().to(dtype).eval()
    return model, tuple(x.to(dtype) if x.is_floating_point() else x for x in case.inputs())


@cases
def test_identity_at_injection_is_exact(case: Case) -> None:
    model, inputs = _model(case)
    names, twin = list(model.state_dict()), copy.deepcopy(model)
    assert inject(twin, config()) == ["layer"]
    assert [name for name in twin.state_dict() if "oft_R" not in name] == names
    for train, grad in itertools.product((False, True), repeat=2):
        with torch.set_grad_enabled(grad):
            assert torch.equal(twin.train(train)(*inputs), model.train(train)(*inputs)), (train, grad)


@cases
def test_two_adapters_merge_to_what_they_compute_and_leave_no_trace(case: Case) -> None:
    for dtype, bound in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
        model, inputs = _model(case, dtype)
        base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        with torch.no_grad():
            base_output = model(*inputs)
        classes = [type(module) for module in model.modules()]
        inject(model, config())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            inject(model, config(oft_block_size=3, block_share=True), "second")
        for seed, name in enumerate(("default", "second")):
            randomize(model, adapter_name=name, seed=seed)
        set_adapter(model, ["second", "default"])
        adapted = model(*inputs)
        assert relative(adapted, base_output) > 0.01
        merge(model)
        assert relative(model(*inputs), adapted) < bound
        assert list(model.state_dict()) == list(base)
        assert [type(module) for module in model.modules()] == classes
        unmerge(model)
        assert torch.equal(model(*inputs), adapted)
        with disable_adapters(model), torch.no_grad():
            assert torch.equal(model(*inputs), base_output)
        unload(model)
        assert all(torch.equal(tensor, base[name]) for name, tensor in model.state_dict().items())
        assert list(model.state_dict()) == list(base)


@cases
def test_without_a_kept_base_unmerge_solves_and_large_weights_are_folded_in_pieces(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, inputs = _model(case)
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    inject(model, config())
    randomize(model)
    adapted = model(*inputs)
    for piece in (2**24, 20):
        monkeypatch.setattr(importlib.import_module("lightning_oft.model.folding"), "PIECE", piece)
        merge(model, keep_base="never")
        assert relative(model(*inputs), adapted) < 1e-5
        unmerge(model)
        assert relative(model(*inputs), adapted) < 1e-5
        for name, tensor in base.items():
            torch.testing.assert_close(model.state_dict()[name], tensor, rtol=1e-5, atol=1e-5)


@some_cases
def test_every_rotation_gets_a_gradient_and_matches_finite_differences(case: Case) -> None:
    model, inputs = _model(case, torch.float64)
    inject(model, config(use_cayley_neumann=False))
    randomize(model, 0.05)
    loss = model(*inputs).square().sum()
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (parameter.grad is not None) == ("oft_R" in name)
        if parameter.grad is None:
            continue
        direction, step = torch.randn_like(parameter), 2**-10
        values: list[float] = []
        with torch.no_grad():
            for sign in (1, -1):
                parameter.add_(direction, alpha=sign * step)
                values.append(float(model(*inputs).square().sum()))
                parameter.sub_(direction, alpha=sign * step)
        expected = (values[0] - values[1]) / (2 * step)
        assert float((parameter.grad * direction).sum().detach()) == pytest.approx(expected, rel=2e-2, abs=1e-2)


@some_cases
def test_copies_compute_the_same_and_are_their_own(case: Case) -> None:
    model, inputs = _model(case)
    inject(model, config())
    randomize(model)
    expected = model(*inputs)
    twins = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    merge(model)
    twins += [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    for index, twin in enumerate(twins):
        assert relative(twin(*inputs), expected) < 1e-5
        if index >= 2:
            unmerge(twin)
        randomize(twin, seed=5)
        assert relative(twin(*inputs), expected) > 0.001
        assert list(oft_layers(twin)) == ["layer"]
    assert relative(model(*inputs), expected) < 1e-5


def test_a_call_without_a_known_input_is_a_type_error() -> None:
    class Named(nn.Linear):
        def forward(self, tokens: Tensor) -> Tensor:  # type: ignore[override]
            return super().forward(tokens)

    model = nn.ModuleDict({"layer": Named(8, 8)})
    inject(model, config())
    with pytest.raises(TypeError, match=r"Named called with \['tokens'\]: pass its input as the first argument"):
        model["layer"](tokens=torch.randn(2, 8))
    assert model["layer"](torch.randn(2, 8)).shape == (2, 8)


@pytest.mark.parametrize(("name", "weight"), [("attention", "in_proj_weight"), ("experts_transposed", "down_proj")])
def test_weights_that_fsdp1_lays_over_the_parameters_are_rotated_too(name: str, weight: str) -> None:
    model, inputs = _model(KINDS[name])
    inject(model, config())
    randomize(model)
    expected = model(*inputs)
    layer: Any = model.layer
    vars(layer)[weight] = getattr(layer, weight).detach()  # as in the middle of a forward
    assert torch.equal(model(*inputs), expected)


@pytest.mark.parametrize("name", ["attention", "experts", "experts_transposed"])
def test_a_forward_that_was_wrapped_while_it_rotated_goes_on_after_a_merge(name: str) -> None:
    """accelerate's hooks keep the forward that they find."""
    model, inputs = _model(KINDS[name])
    inject(model, config())
    randomize(model)
    expected = model(*inputs)
    model.layer.forward = functools.partial(model.layer.forward)  # type: ignore[operator, union-attr]
    assert torch.equal(model(*inputs), expected)
    merge(model)
    assert relative(model(*inputs), expected) < 1e-5
    unmerge(model)
    assert torch.equal(model(*inputs), expected)
    merge(model)
    unload(model)
    assert relative(model(*inputs), expected) < 1e-5
