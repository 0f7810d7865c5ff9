"""Which adapters act: several in any order, none at all, and whatever was in flight meanwhile."""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers
from layer_cases import KINDS, Case, config, randomize, relative
from torch import Tensor, nn

from lightning_oft import disable_adapters, inject, merge, oft_layers, project, set_adapter, unload, unmerge
from lightning_oft import functional as maths
from lightning_oft.model.traversal import active_names, adapter_names, walk

pytestmark = [
    pytest.mark.filterwarnings("ignore:adapter .* is not active"),
    pytest.mark.filterwarnings("ignore:block sizes adjusted"),
]
NAMES = ("one", "two", "three")


def _three(model: nn.Module, **options: Any) -> nn.Module:
    for index, (name, size) in enumerate(zip(NAMES, (4, 2, 4), strict=True)):
        inject(model, config(**{**options, "oft_block_size": size}), name)
        randomize(model, 0.2, name, seed=index)
    return model


def _linear(**options: Any) -> nn.Module:
    return _three(nn.Sequential(nn.Linear(8, 6)), target_modules=["0"], **options)


# ---- several adapters ------------------------------------------------------------------------------------------------

ORDERS = [order for length in (1, 2, 3) for order in itertools.permutations(NAMES, length)]
SOME = {key: KINDS[key] for key in ("linear_3d", "embedding_1d", "conv2d_3x3", "attention_kdim_vdim")}


@pytest.mark.parametrize("case", SOME.values(), ids=SOME)
def test_every_order_merges_to_what_it_computes(case: Case) -> None:
    model, inputs = _three(case.build().eval()), case.inputs()
    outputs = []
    for order in ORDERS:
        set_adapter(model, list(order))
        outputs.append(model(*inputs))
        merge(model)
        assert relative(model(*inputs), outputs[-1]) < 1e-5
        unmerge(model)
        assert torch.equal(model(*inputs), outputs[-1])
    for a, b in itertools.combinations(outputs, 2):
        assert relative(a, b) > 1e-3


def test_a_linear_layer_applies_them_in_list_order() -> None:
    model, x = _linear(), torch.randn(3, 8)
    layer: Any = oft_layers(model)["0"]
    set_adapter(model, ["three", "one"])
    full = [torch.block_diag(*layer.oft_R[name].matrix()) for name in ("three", "one")]
    torch.testing.assert_close(model(x), nn.functional.linear(x @ full[0] @ full[1], layer.weight, layer.bias))
    assert adapter_names(walk(model)) == list(NAMES)
    set_adapter(model, [])
    assert torch.equal(model(x), nn.functional.linear(x, layer.weight, layer.bias))


def test_the_order_of_active_adapters_agrees_with_every_layer() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    for name, targets in (("one", ["0"]), ("two", ["0", "1"]), ("three", ["1"])):
        inject(model, config(target_modules=targets), name)
    for order in itertools.permutations(NAMES):
        set_adapter(model, list(order))
        layers = [[name for name in order if name in own.oft_R] for own in model]  # type: ignore[operator, union-attr]
        found = active_names(walk(model))
        assert all(sorted(names, key=found.index) == names for names in layers), (order, found)


@pytest.mark.parametrize(
    ("names", "trainable", "training"),
    [
        ("two", None, {"two"}),
        (["three", "one"], ["three"], {"three"}),
        (["three", "one"], [], set()),
        ([], None, set()),
    ],
)
def test_only_the_trainable_train_and_stale_gradients_go(names: Any, trainable: Any, training: set[str]) -> None:
    model = _linear()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    set_adapter(model, names, trainable)
    for name, parameter in model.named_parameters():
        if "oft_R" in name:
            owner = name.split(".")[2]
            assert parameter.requires_grad == (parameter.grad is not None) == (owner in training)


@pytest.mark.parametrize(
    ("names", "trainable", "message"),
    [
        ("fourth", None, "no adapter 'fourth' here; there are: one, two, three"),
        (["one", "one"], None, "each can be active once"),
        ("one", "two", r"trainable=\['two'\]: only active adapters train, and those are \['one'\]"),
        ("one", ["fourth"], "no adapter 'fourth' here"),
    ],
)
def test_a_choice_that_cannot_be_is_refused_and_nothing_changes(names: Any, trainable: Any, message: str) -> None:
    model, x = _linear(), torch.randn(2, 8)
    before = model(x)
    with pytest.raises(ValueError, match=message):
        set_adapter(model, names, trainable)
    assert torch.equal(model(x), before)


def test_project_holds_every_adapter_and_only_the_constrained() -> None:
    model = nn.Sequential(nn.Linear(8, 6))
    for name, options in (("held", {"max_angle": 5.0}), ("free", {"series_guard": "warn"})):
        inject(model, config(target_modules=["0"], **options), name)
        randomize(model, 1.0, name)
    layer: Any = oft_layers(model)["0"]
    free = layer.oft_R["free"].weight.detach().clone()
    project(model)
    assert float(maths.frobenius_norm(layer.oft_R["held"].weight.detach()).max()) <= maths.angle_radius(5.0)
    assert torch.equal(layer.oft_R["free"].weight, free)
    once = layer.oft_R["held"].weight.detach().clone()
    project(model)
    assert torch.equal(layer.oft_R["held"].weight, once)


def test_a_backward_in_flight_survives_a_switch_of_rotations() -> None:
    model, x = _linear(), torch.randn(3, 8, requires_grad=True)
    set_adapter(model, "one")
    (expected,) = torch.autograd.grad(model(x).square().sum(), x)
    loss = model(x).square().sum()
    set_adapter(model, "two")
    model(x)
    (crossed,) = torch.autograd.grad(loss, x)
    assert torch.equal(crossed, expected)


# ---- disable_adapters ------------------------------------------------------------------------------------------------


def test_nested_disabling_and_an_error_inside_end_as_they_should() -> None:
    model, x = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), torch.randn(3, 8)
    base = model(x)
    inject(model, config(target_modules="all-linear", bias="all"))
    randomize(model)
    nn.init.normal_(model[0].bias)  # type: ignore[arg-type]
    adapted = model(x)
    with disable_adapters(model):
        for part in (model, model[0]):
            with disable_adapters(part):
                assert torch.equal(model(x), base)
            assert torch.equal(model(x), base)
    assert torch.equal(model(x), adapted)
    with contextlib.suppress(ZeroDivisionError), disable_adapters(model):
        assert torch.equal(model(x), base)
        raise ZeroDivisionError
    assert torch.equal(model(x), adapted)


def test_one_branch_can_be_disabled_alone() -> None:
    model, x = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), torch.randn(3, 8)
    inject(model, config(target_modules="all-linear"))
    randomize(model)
    adapted = model(x)
    with disable_adapters(model[0]):
        half = model(x)
        assert torch.equal(half, model[1](nn.functional.linear(x, model[0].weight, model[0].bias)))  # type: ignore[arg-type]
    assert relative(half, adapted) > 1e-3
    assert torch.equal(model(x), adapted)


def test_inside_disable_adapters_nothing_may_be_changed() -> None:
    model = _linear()
    with disable_adapters(model):
        for action in (
            lambda: inject(model, config(target_modules=["0"]), "fourth"),
            lambda: set_adapter(model, "one"),
            lambda: unload(model),
            lambda: merge(model),
        ):
            with pytest.raises(RuntimeError, match="inside disable_adapters: leave its context first"):
                action()


# ---- torch's own encoder ---------------------------------------------------------------------------------------------


def _encoder(**options: Any) -> nn.TransformerEncoder:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0, **options)
    return nn.TransformerEncoder(layer, 2).eval()


_MASK = torch.tensor([[False, False, False, True, True], [False, False, False, False, False]])


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage")
@pytest.mark.parametrize("targets", ["all-linear", ["out_proj"], ["linear1"]], ids=str)
@pytest.mark.parametrize("mask", [None, _MASK], ids=["whole", "padded"])
def test_disabled_takes_the_encoders_own_paths_again(targets: str | list[str], mask: Tensor | None) -> None:
    model, x = _encoder(), torch.randn(2, 5, 8)
    kept = slice(None) if mask is None else ~mask
    with torch.no_grad():
        base = model(x, src_key_padding_mask=mask)
        inject(model, config(target_modules=targets))
        randomize(model, 0.3)
        adapted = model(x, src_key_padding_mask=mask)
        trained = model.train()(x, src_key_padding_mask=mask)
        model.eval()
        assert relative(adapted[kept], trained[kept]) < 1e-5  # type: ignore[index]
        assert relative(adapted[kept], base[kept]) > 1e-2  # type: ignore[index]
        with disable_adapters(model), disable_adapters(model):
            assert torch.equal(model(x, src_key_padding_mask=mask), base)
        assert torch.equal(model(x, src_key_padding_mask=mask), adapted)
        merge(model)
        assert model.use_nested_tensor
        assert relative(model(x, src_key_padding_mask=mask)[kept], adapted[kept]) < 1e-5  # type: ignore[index]
        unmerge(model)
        assert torch.equal(model(x, src_key_padding_mask=mask), adapted)
        unload(model)
        assert torch.equal(model(x, src_key_padding_mask=mask), base)
    assert model.use_nested_tensor


def test_an_encoder_that_never_packed_does_not_start_to() -> None:
    model = _encoder(norm_first=False)
    model.use_nested_tensor = False
    inject(model, config(target_modules="all-linear"))
    with disable_adapters(model):
        assert not model.use_nested_tensor
    unload(model)
    assert not model.use_nested_tensor


@pytest.fixture
def _fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize("first", ["adapted", "base"])
def test_compiled_around_an_encoder_the_first_pass_does_not_decide_the_others(first: str) -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)
    model, x = nn.TransformerEncoder(layer, 1).eval(), torch.randn(2, 5, 8)
    with torch.no_grad():
        base = model(x)
        inject(model, config(target_modules="all-linear"))
        randomize(model, 0.3)
        adapted = model(x)
        compiled = torch.compile(lambda y: model(y), backend="eager")
        for turn in range(2):
            if first == "base" or turn:
                with disable_adapters(model):
                    assert relative(compiled(x), base) < 1e-5
            assert relative(compiled(x), adapted) < 1e-5


# ---- threads, generation ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["attention", "linear_3d", "conv2d_3x3"])
def test_two_threads_through_one_layer_get_what_one_gets(name: str) -> None:
    model = KINDS[name].build().eval()
    inject(model, config())
    randomize(model, 0.3)
    inputs = [KINDS[name].inputs() for _ in range(2)]
    with torch.no_grad():
        expected = [model(*x) for x in inputs]
    wrong: list[str] = []

    def work(index: int) -> None:
        for round_ in range(60):
            with torch.set_grad_enabled(round_ % 2 == 0):
                output = model(*inputs[index])
            if relative(output, expected[index]) > 1e-5:
                wrong.append(f"thread {index}, round {round_}")

    threads = [threading.Thread(target=work, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_generation_under_disabled_adapters_is_the_bases() -> None:
    sizes: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config_ = transformers.LlamaConfig(**sizes, intermediate_size=24, vocab_size=32)
    model, ids = transformers.LlamaForCausalLM(config_).eval(), torch.randint(0, 32, (1, 4))
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    base = model.generate(ids, **options)
    inject(model, config(target_modules="all-linear"))
    randomize(model, 1.0)
    adapted = model.generate(ids, **options)
    with disable_adapters(model):
        assert torch.equal(model.generate(ids, **options), base)
    assert torch.equal(model.generate(ids, **options), adapted)
    merge(model)
    assert torch.equal(model.generate(ids, **options), adapted)
