"""Every kind of layer: exact identity, merged equals unmerged, and the way back."""

from __future__ import annotations

import copy
import importlib
import pickle
import warnings

import pytest
import torch
from layer_cases import KINDS, Case, config, randomize, relative

from lightning_oft import disable_adapters, inject, merge, oft_layers, set_adapter, unload, unmerge

cases = pytest.mark.parametrize("case", KINDS.values(), ids=KINDS)
pytestmark = pytest.mark.filterwarnings("ignore:block sizes adjusted")


def _model(case: Case, dtype: torch.dtype = torch.float32) -> tuple[torch.nn.Module, tuple[torch.Tensor, ...]]:
    model = case.build().to(dtype).eval()
    inputs = tuple(x.to(dtype) if x.is_floating_point() else x for x in case.inputs())
    return model, inputs


@cases
@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
def test_identity_at_injection_is_exact(case: Case, train: bool, grad: bool) -> None:
    model, inputs = _model(case)
    model.train(train)
    with torch.set_grad_enabled(grad):
        before = model(*inputs)
        names = list(model.state_dict())
        assert inject(model, config()) == ["layer"]
        assert torch.equal(model(*inputs), before)
    assert [name for name in model.state_dict() if "oft_R" not in name] == names


@cases
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)], ids=["fp32", "bf16"])
@pytest.mark.parametrize("kind", ["one", "two", "shared"])
def test_merged_equals_unmerged(case: Case, dtype: torch.dtype, bound: float, kind: str) -> None:
    model, inputs = _model(case, dtype)
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        base_output = model(*inputs)
    classes = [type(module) for module in model.modules()]
    inject(model, config(block_share=kind == "shared"))
    randomize(model)
    if kind == "two":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            inject(model, config(oft_block_size=3), "second")
        randomize(model, adapter_name="second", seed=1)
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
def test_unmerge_without_a_kept_base_is_close(case: Case) -> None:
    model, inputs = _model(case)
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    inject(model, config())
    randomize(model)
    adapted = model(*inputs)
    merge(model, keep_base="never")
    unmerge(model)
    assert relative(model(*inputs), adapted) < 1e-5
    for name, tensor in base.items():
        assert relative(model.state_dict()[name], tensor + 0) < 1e-5 or torch.equal(model.state_dict()[name], tensor)


@cases
def test_a_large_weight_is_folded_piece_by_piece(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = _model(case)
    inject(model, config())
    randomize(model)
    adapted = model(*inputs)
    monkeypatch.setattr(importlib.import_module("lightning_oft.model.folding"), "PIECE", 20)
    merge(model, keep_base="never")
    assert relative(model(*inputs), adapted) < 1e-5
    unmerge(model)
    assert relative(model(*inputs), adapted) < 1e-5


@cases
def test_every_rotation_gets_a_gradient_and_matches_finite_differences(case: Case) -> None:
    model, inputs = _model(case, torch.float64)
    inject(model, config(use_cayley_neumann=False))
    randomize(model, 0.05)
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == ("oft_R" in name)
    loss = model(*inputs).square().sum()
    loss.backward()
    for name, parameter in model.named_parameters():
        if "oft_R" not in name:
            continue
        direction = torch.randn_like(parameter)
        with torch.no_grad():
            step = 2**-10
            values: list[float] = []
            for sign in (1, -1):
                parameter.add_(direction, alpha=sign * step)
                values.append(float(model(*inputs).square().sum()))
                parameter.sub_(direction, alpha=sign * step)
        assert parameter.grad is not None
        expected = (values[0] - values[1]) / (2 * step)
        assert float((parameter.grad * direction).sum().detach()) == pytest.approx(expected, rel=2e-2, abs=1e-2)


@cases
@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
@pytest.mark.parametrize("merged", [False, True], ids=["unmerged", "merged"])
def test_copies_compute_the_same(case: Case, how: str, merged: bool) -> None:
    model, inputs = _model(case)
    inject(model, config())
    randomize(model)
    expected = model(*inputs)
    if merged:
        merge(model)
    twin = copy.deepcopy(model) if how == "deepcopy" else pickle.loads(pickle.dumps(model))
    assert relative(twin(*inputs), expected) < 1e-5
    if merged:
        unmerge(twin)
    randomize(twin, seed=5)
    assert relative(twin(*inputs), expected) > 0.001
    assert relative(model(*inputs), expected) < 1e-5
    assert list(oft_layers(twin)) == ["layer"]
