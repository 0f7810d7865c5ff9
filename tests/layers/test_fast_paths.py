"""What is computed together, cached or put off equals what each layer computes by itself; and how much it computes."""

from __future__ import annotations

import copy
import weakref
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from layer_cases import computed_maps, config, gradients, randomize, rotations
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig, LlamaForCausalLM

from lightning_oft import disable_adapters, functional, inject, merge, set_adapter, unload
from lightning_oft.layers import linear as linear_layers

Loss = Callable[["Attention", Tensor], Tensor]


class Attention(nn.Module):
    """Four linear layers side by side, one of which may be left out of a call."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor, last: bool = True) -> Tensor:
        y = torch.tanh(self.q(x)) * self.k(x) + self.v(x)
        return self.o(y) if last else y


def _model(shared: bool = True, **options: Any) -> Attention:
    torch.manual_seed(0)
    model = Attention()
    inject(model, config(target_modules="all-linear", **options))
    randomize(model)
    for rotation in rotations(model).values():
        rotation.shared = rotation.shared if shared else None
    return model.train()


def _two_batches(model: Attention, x: Tensor) -> Tensor:
    return model(x).square().sum() + model(2 * x).sum()


def _backward_in_turn(model: Attention, x: Tensor) -> Tensor:
    """The last layer runs in the second forward only, with an R computed in the first, whose backward comes first."""
    model(x, last=False).square().sum().backward()
    return model.o(x).square().sum()


def _two_graphs(model: Attention, x: Tensor) -> Tensor:
    first, second = model(x, last=False).square().sum(), model.o(x).square().sum()
    first.backward()
    return second


LOSSES: dict[str, Loss] = {
    "one_batch": lambda model, x: model(x).square().sum(),
    "two_before_backward": _two_batches,
    "backward_in_turn": _backward_in_turn,
    "two_graphs": _two_graphs,
    "checkpoint": lambda model, x: checkpoint(model, x, use_reentrant=False).square().sum(),
    "reentrant": lambda model, x: checkpoint(model, x, use_reentrant=True).square().sum(),
    "checkpoint_in_part": lambda model, x: (
        (model(x, last=False) + checkpoint(model.o, checkpoint(model.o, x, use_reentrant=False), use_reentrant=False))
        .square()
        .sum()
    ),
    "unused": lambda model, x: model(x, last=False).square().sum(),
}


@pytest.mark.parametrize("exact", [False, True], ids=["series", "exact"])
@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_layers_side_by_side_train_as_each_by_itself(loss: Loss, exact: bool) -> None:
    together, apart = (_model(shared, use_cayley_neumann=not exact) for shared in (True, False))
    for step in range(3):
        x = torch.randn(5, 8, requires_grad=True)
        for model in (together, apart):
            model.zero_grad()
            loss(model, x).backward()
            with torch.no_grad():
                for rotation in rotations(model).values():
                    if step < 2 and rotation.weight.grad is not None:
                        rotation.weight.data -= 0.01 * rotation.weight.grad
        torch.testing.assert_close(gradients(together), gradients(apart), rtol=1e-5, atol=1e-6)


def test_one_map_is_computed_for_all_and_none_for_what_nobody_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x, sizes = _model(), torch.randn(5, 8), computed_maps(monkeypatch)
    model(x).sum().backward()
    assert sizes == [4]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.step()
        optimizer.zero_grad()
        model(x, last=False).sum().backward()
    assert sizes == [4, 4, 3, 3]


def test_frozen_evaluated_and_copied_rotations_are_computed_by_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = _model(), torch.randn(5, 8)
    expected = model(x)
    twin = copy.deepcopy(model)
    assert all(rotation.shared is None for rotation in rotations(twin).values())
    sizes = computed_maps(monkeypatch)
    torch.testing.assert_close(twin(x), expected)
    assert sizes == [1, 1, 1, 1]
    sizes.clear()
    with torch.no_grad():
        model.eval()(x)
        model(x)
    assert sizes == [1, 1, 1, 1]
    inject(twin, config(target_modules="all-linear"))  # which changes nothing else
    sizes.clear()
    rotations(twin)["v"].requires_grad_(False)
    torch.testing.assert_close(twin(x), expected)
    assert sorted(sizes) == [1, 3]


def _per_sample(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    def loss(parameters: dict[str, Tensor], sample: Tensor) -> Tensor:
        return functional_call(model, parameters, (sample[None],)).square().sum()

    trained = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    return vmap(grad(loss), in_dims=(None, 0))(trained, x)


def test_gradients_of_each_sample_and_afterwards_as_before() -> None:
    model, x = _model(), torch.randn(3, 8)
    found = _per_sample(model, x)
    for index in range(3):
        model.zero_grad()
        model(x[index : index + 1]).square().sum().backward()
        for name, gradient in gradients(model).items():
            torch.testing.assert_close(found[f"{name}.oft_R.default.weight"][index], gradient, rtol=1e-4, atol=1e-6)
    model.eval()
    with torch.no_grad():
        plain = model(x)
        torch.testing.assert_close(vmap(lambda sample: model(sample[None])[0])(x), plain)
        torch.testing.assert_close(model(x), plain)


@pytest.mark.parametrize("large", [2**18, 0], ids=["kept", "computed_again"])
def test_a_gradient_is_differentiated_once_more(large: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(functional.maps, "_LARGE", large)
    results = []
    for shared in (True, False):
        model, x = _model(shared), torch.ones(3, 8)
        weights = [rotation.weight for rotation in rotations(model).values()]
        first = torch.autograd.grad(model(x).square().sum(), weights, create_graph=True)
        sum(one.square().sum() for one in first).backward()  # type: ignore[union-attr]
        results.append(gradients(model))
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-4)


# ---- matrices that are computed again ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("exact", [False, True], ids=["series", "exact"])
@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_what_is_computed_again_is_what_would_have_been_kept(
    loss: Loss, exact: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, x = [], torch.randn(50, 8, dtype=dtype)
    monkeypatch.setattr(functional.products, "_SMALL_ON_CPU", 0)
    for large in (2**18, 0):
        monkeypatch.setattr(functional.maps, "_LARGE", large)
        model, own = _model(use_cayley_neumann=not exact), x.clone().requires_grad_()
        loss(model.to(dtype), own).backward()
        found.append((own.grad, gradients(model)))
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=0)


@pytest.mark.parametrize(("dtype", "matrices"), [(torch.float32, 1), (torch.bfloat16, 0)])
def test_of_large_maps_no_copy_is_kept(dtype: torch.dtype, matrices: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In float32 R is kept by the products, in half precision it is computed once more for all of a map."""
    monkeypatch.setattr(functional.maps, "_LARGE", 0)
    monkeypatch.setattr(functional.products, "_SMALL_ON_CPU", 0)
    model, x = _model().to(dtype), torch.randn(5, 8, dtype=dtype)
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.dim() == 3:  # an R, or what one is made of
            kept[tensor.untyped_storage().data_ptr()] = 1
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = model(x)
    assert sum(kept.values()) == matrices
    with torch.no_grad():
        rotations(model)["q"].weight.mul_(2)
    with pytest.raises(RuntimeError, match="changed between its forward and its backward"):
        y.sum().backward()


# ---- a generated token ------------------------------------------------------------------------------------------------


def _hook(layer: Any) -> None:
    layer.oft_R["default"].register_forward_pre_hook(lambda _, args: (3 * args[0],))


def _another(layer: Any) -> None:
    layer.oft_R["default"] = copy.deepcopy(layer.oft_R["default"])
    layer.oft_R["default"].weight.data.mul_(3)


def _shallow(model: Any) -> None:
    model[0] = copy.copy(model[0])
    model[0]._modules = {"oft_R": copy.deepcopy(model[0].oft_R)}
    model[0].oft_R["default"].weight.data.mul_(3)


def _exactly(layer: Any) -> None:
    layer.oft_R["default"].use_map(exact=True)


def _add(model: nn.Module) -> None:
    with pytest.warns(UserWarning, match="not active"):
        inject(model, config(target_modules=["0"]), adapter_name="other")
    for name, parameter in model.named_parameters():
        if "other" in name:
            nn.init.normal_(parameter, std=0.3)
    set_adapter(model, ["default", "other"])


def _copied(layer: Any) -> None:
    rotation = copy.copy(layer.oft_R["default"])
    rotation.use_map(exact=True)
    layer.oft_R["default"] = rotation


def _cut(layer: Any) -> None:
    weight = layer.oft_R["default"].weight
    weight.data = weight.data[:1]


def _late(model: Any) -> None:
    """What is applied changes while a token is rotated."""

    def change(rotation: Any, args: Any, output: Tensor) -> None:
        hook.remove()
        _add(model)

    hook = model[0].oft_R["default"].register_forward_hook(change)
    model(torch.ones(1, 1, 8))


CHANGES: dict[str, Callable[[Any], Any]] = {
    "data": lambda model: model[0].oft_R["default"].weight.data.mul_(3),
    "numpy": lambda model: model[0].oft_R["default"].weight.detach().numpy().__imul__(3),
    "hook": lambda model: _hook(model[0]),
    "rotation": lambda model: _another(model[0]),
    "shallow_copy": _shallow,
    "map": lambda model: _exactly(model[0]),
    "adapters": _add,
    "unloaded": lambda model: unload(model),
    "merged": lambda model: merge(model),
    "half": lambda model: model.bfloat16(),
    "copied_rotation": lambda model: _copied(model[0]),
    "cut": lambda model: _cut(model[0]),
    "late": _late,
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_token_sees_every_change(change: str) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(8, 4)), torch.randn(1, 1, 8)
    inject(model, config(target_modules=["0"]))
    randomize(model)
    model.eval()
    with torch.no_grad():
        first = [model(x) for _ in range(4)]
        assert model[0]._oft.layer.quick is not None
        with disable_adapters(model):
            assert not torch.allclose(model(x), first[0])
        for _ in range(4):
            torch.testing.assert_close(model(x), first[0])
        assert model[0]._oft.layer.quick is not None
        CHANGES[change](model)
        y = x.to(model[0].weight.dtype)
        several = model(y.expand(1, 3, 8))[:, :1]  # what no token's path has a part in
        for _ in range(4):
            torch.testing.assert_close(model(y), several)
    if change not in ("merged", "unloaded", "map", "half", "copied_rotation"):
        assert not torch.allclose(several, first[0], rtol=1e-3)


def test_a_model_read_from_a_file_sees_changes_of_its_memory(tmp_path: Path) -> None:
    """Torch cannot copy such memory on writing, and crashes."""
    model, x = nn.Sequential(nn.Linear(8, 4)), torch.randn(3, 8)
    inject(model, config(target_modules=["0"]))
    randomize(model)
    torch.save(model.eval(), tmp_path / "model.pt")
    model = torch.load(tmp_path / "model.pt", weights_only=False)
    with torch.no_grad():
        before = model(x)
        rotations(model)["0"].weight.data.mul_(3)
        assert not torch.allclose(model(x), before)


def test_training_keeps_nothing_of_a_generation() -> None:
    model, x = nn.Sequential(nn.Linear(8, 4)), torch.randn(1, 8)
    inject(model, config(target_modules=["0"]))
    model.eval()
    with torch.no_grad():
        for _ in range(3):
            model(x)
    layer: Any = model[0]
    kept = weakref.ref(layer.oft_R["default"].cached.matrix)
    model.train()
    assert kept() is None


# ---- the weight instead of the input ---------------------------------------------------------------------------------


def _linear(rows: int = 80) -> tuple[nn.Sequential, Tensor]:
    model = nn.Sequential(nn.Linear(8, 4))
    inject(model, config(target_modules=["0"]))
    randomize(model)
    return model.train(), torch.randn(2, rows // 2, 8, requires_grad=True)


@pytest.fixture
def by_weight(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Calls in which the weight was rotated; no input is small."""
    monkeypatch.setattr(functional.products, "_SMALL_ON_CPU", 0)
    calls: list[int] = []
    plain = functional.RotatedInput.of.__func__  # type: ignore[attr-defined]

    def counted(cls: Any, *args: Any) -> Tensor:
        calls.append(1)
        made: Tensor = plain(cls, *args)
        return made

    monkeypatch.setattr(functional.RotatedInput, "of", classmethod(counted))
    return calls


@pytest.mark.parametrize("rows", [2, 18, 20, 80])
def test_the_weight_is_rotated_where_it_has_fewer_rows_than_the_input(rows: int, by_weight: list[int]) -> None:
    model, x = _linear(rows)
    layer: Any = model[0]
    layer.bias.requires_grad_()
    found = model(x)
    # From its fan-out on, and half the rows whose product with a block takes as long as R^-T.
    assert len(by_weight) == (rows >= 4 + 4 * 4)
    expected = F.linear(functional.rotate(x, layer.oft_R["default"].matrix()), layer.weight, layer.bias)
    torch.testing.assert_close(found, expected)
    inputs = [x, layer.oft_R["default"].weight, layer.bias]
    ours, theirs = (torch.autograd.grad(y.square().sum(), inputs) for y in (found, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


class _Doubled(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(2 * input)


def _replace_forward(layer: Any) -> None:
    forward = layer.forward
    layer.forward = lambda x: forward(2 * x)


OTHERWISE: dict[str, Callable[[nn.Module], Any]] = {
    "a_weight_that_trains": lambda layer: layer.weight.requires_grad_(),  # type: ignore[union-attr, operator]
    "a_hook_before": lambda layer: layer.register_forward_pre_hook(lambda _, args: (2 * args[0],)),
    "a_hook_after": lambda layer: layer.register_forward_hook(lambda _, args, output: output + args[0].sum()),
    "a_backward_hook": lambda layer: layer.register_full_backward_hook(lambda *_: None),
    "a_forward_of_its_own": _replace_forward,
}


@pytest.mark.parametrize("change", OTHERWISE.values(), ids=OTHERWISE)
def test_only_what_is_nothing_but_a_linear_map_has_its_weight_rotated(
    change: Callable[[nn.Module], Any], by_weight: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x = _linear()
    change(model[0])
    found = model(x)
    assert by_weight == []
    monkeypatch.setattr(linear_layers, "_turn_for_linear", lambda *_: None)
    torch.testing.assert_close(found, model(x))


OTHERWISE_BY_ROWS = OTHERWISE | {
    "a_hook_on_the_rotation": lambda layer: layer.oft_R["default"].register_forward_hook(lambda *_: None),
    "a_bias": lambda layer: setattr(layer, "bias", nn.Parameter(torch.randn(64), requires_grad=False)),
}


@pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="measured with MKL")
@pytest.mark.parametrize("change", [None, *OTHERWISE_BY_ROWS.values()], ids=["as it is", *OTHERWISE_BY_ROWS])
def test_an_input_lies_by_columns_only_where_a_linear_map_alone_reads_it(
    change: Callable[[nn.Module], Any] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    calls: list[tuple[int, ...]] = []

    def counted(x: Tensor, rotation: Tensor) -> Tensor:
        calls.append(x.shape)
        return plain(x, rotation)

    plain = functional.rotate_by_columns
    monkeypatch.setattr(functional, "rotate_by_columns", counted)
    model = nn.Sequential(nn.Linear(64, 64, bias=False)).requires_grad_(False)
    x = torch.randn(2, 40, 64, requires_grad=True)
    base = model(x)
    inject(model, config(oft_block_size=16, target_modules="all-linear"))
    assert torch.equal(model(x), base)
    assert len(calls) == 1
    randomize(model)
    calls.clear()
    if change is not None:
        change(model[0])
    found = model(x)
    assert len(calls) == (change is None)
    monkeypatch.setattr(linear_layers, "_turn_for_linear", lambda *_: None)
    torch.testing.assert_close(found, model(x))


def test_whoever_reads_an_input_that_is_to_be_rotated_reads_it_rotated() -> None:
    x, r_nbb = torch.randn(3, 8), functional.rotation_of(0.1 * torch.randn(2, 6), 4, 6)
    expected, later = functional.rotate(x, r_nbb), functional.RotatedInput.of(x, r_nbb)
    assert later.shape == (3, 8)
    weight = torch.randn(2, 8)
    for read in (
        torch.sum,
        lambda y: y + 1,
        Tensor.numpy,
        lambda y: F.linear(y, weight),
        lambda y: F.linear(weight, y),
    ):
        torch.testing.assert_close(read(functional.RotatedInput.of(x, r_nbb)), read(expected))


# ---- how much is computed --------------------------------------------------------------------------------------------

_FREE = {"view", "_unsafe_view", "t", "transpose", "permute", "expand", "slice", "select", "unsqueeze", "squeeze", "detach",
         "alias", "split", "split_with_sizes", "diagonal", "unbind", "empty", "empty_like", "_reshape_alias"}  # fmt: skip
"""Operators that compute nothing: they look at memory or ask for it."""


class Operators(TorchDispatchMode):
    """Counts the operators that compute something."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        self.counts[name] += name not in _FREE
        return func(*args, **(kwargs or {}))


def test_a_gpu_is_told_no_more_to_hold_many_rotations_than_to_hold_two(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(functional.geometry, "_is_told", lambda _: True)
    totals = []
    for layers in (2, 20):
        generators = [torch.randn(3, 6) for _ in range(layers)]
        functional.largest_norms(generators)  # makes a table
        with Operators() as operators:
            functional.largest_norms(generators)
            functional.project_all(generators, 0.5)
        totals.append(operators.counts.total())
    assert totals[0] == totals[1] <= 20


def _llama(tokens: int, exact: bool | None) -> tuple[LlamaForCausalLM, Tensor, int]:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=64, attn_implementation="eager")).requires_grad_(False)
    names = [] if exact is None else inject(model, config(oft_block_size=16, use_cayley_neumann=not exact,
                                                          target_modules="all-linear"))  # fmt: skip
    return model, torch.randn(1, tokens, 64, requires_grad=True), len(names)


def _operators(model: nn.Module, x: Tensor, with_gradient: bool) -> int:
    model.train(with_gradient)
    with torch.set_grad_enabled(with_gradient):
        for _ in range(2):
            counted = Operators()
            with counted:
                logits = model(inputs_embeds=x).logits
                if with_gradient:
                    logits.sum().backward()
            model.zero_grad()
            x.grad = None
    return sum(counted.counts.values())


def test_a_frozen_rotation_costs_no_gradient_of_its_own() -> None:
    model, x = _linear()
    rotations(model)["0"].requires_grad_(False)
    counted = Operators()
    with counted:
        model(x).sum().backward()
    assert x.grad is not None
    assert counted.counts["_linalg_solve_ex"] == 0


@pytest.mark.parametrize("exact", [False, True], ids=["series", "exact"])
@pytest.mark.parametrize("tokens", [1, 16, 256])
def test_operators_above_the_frozen_limit(tokens: int, exact: bool) -> None:
    (base, x, _), (ours, _, layers) = _llama(tokens, None), _llama(tokens, exact)
    for with_gradient, bound in ((True, 10), (False, 2)):
        above = _operators(ours, x, with_gradient) - _operators(base, x, with_gradient)
        assert above / layers <= bound, above / layers
