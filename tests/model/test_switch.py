"""Which adapters act: several in any order, none at all, and whatever was in flight meanwhile."""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import transformers
from layer_cases import KINDS, Case, config, randomize, relative
from torch import Tensor, nn

from lightning_oft import (
    OFTConfig,
    disable_adapters,
    inject,
    merge,
    oft_layers,
    project,
    set_adapter,
    unload,
    unmerge,
)
from lightning_oft import functional as maths
from lightning_oft.model import saved_modules
from lightning_oft.model.traversal import adapter_names, walk

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


def _tiny_llama(**options: Any) -> Any:
    sizes: dict[str, Any] = {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 24,
    }
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, vocab_size=32, **options)).eval()


# ---- several adapters ------------------------------------------------------------------------------------------------

ORDERS = [order for length in (1, 2, 3) for order in itertools.permutations(NAMES, length)]
SOME = {key: KINDS[key] for key in ("linear_3d", "conv1d_hf", "embedding_2d", "conv2d_3x3", "attention_kdim_vdim")}


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
    model, x = _three(nn.Sequential(nn.Linear(8, 6)), target_modules=["0"]), torch.randn(3, 8)
    layer: Any = oft_layers(model)["0"]
    set_adapter(model, ["three", "one"])
    full = [torch.block_diag(*layer.oft_R[name].matrix()) for name in ("three", "one")]
    torch.testing.assert_close(model(x), nn.functional.linear(x @ full[0] @ full[1], layer.weight, layer.bias))


def test_names_are_in_order_of_injection() -> None:
    assert adapter_names(walk(_three(nn.Sequential(nn.Linear(8, 6)), target_modules=["0"]))) == list(NAMES)


@pytest.mark.parametrize(
    ("names", "trainable", "training"),
    [
        ("two", None, {"two"}),
        (["three", "one"], None, {"three", "one"}),
        (["three", "one"], "one", {"one"}),
        (["three", "one"], ["three"], {"three"}),
        (["three", "one"], [], set()),
        ([], None, set()),
    ],
)
def test_only_the_trainable_train_and_stale_gradients_go(names: Any, trainable: Any, training: set[str]) -> None:
    model = _three(nn.Sequential(nn.Linear(8, 6)), target_modules=["0"])
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    set_adapter(model, names, trainable)
    for name, parameter in model.named_parameters():
        if "oft_R" in name:
            owner = name.split(".")[2]
            assert parameter.requires_grad == (owner in training)
            assert (parameter.grad is not None) == (owner in training)


def test_no_adapter_at_all_is_the_base() -> None:
    base = nn.Sequential(nn.Linear(8, 6))
    x = torch.randn(3, 8)
    expected = base(x)
    model = _three(base, target_modules=["0"])
    set_adapter(model, [])
    assert torch.equal(model(x), expected)


def test_project_holds_every_adapter_and_only_the_constrained() -> None:
    model = nn.Sequential(nn.Linear(8, 6))
    inject(model, config(target_modules=["0"], max_angle=5.0), "held")
    inject(model, config(target_modules=["0"]), "free")
    randomize(model, 1.0, "held")
    randomize(model, 1.0, "free")
    layer: Any = oft_layers(model)["0"]
    free = layer.oft_R["free"].weight.detach().clone()
    project(model)
    assert float(maths.frobenius_norm(layer.oft_R["held"].weight.detach()).max()) <= maths.angle_radius(5.0)
    assert torch.equal(layer.oft_R["free"].weight, free)
    once = layer.oft_R["held"].weight.detach().clone()
    project(model)
    assert torch.equal(layer.oft_R["held"].weight, once)


# ---- trained biases and modules --------------------------------------------------------------------------------------


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.fc, self.head = nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.head(self.fc(self.norm(self.conv(x)).relu().mean((2, 3))))
        return output


def _fit(model: nn.Module, steps: int = 3) -> None:
    model.train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(4, 3, 6, 6)).square().sum().backward()
        optimizer.step()
    model.eval()


OWNING: list[dict[str, Any]] = [
    {},
    {"bias": "all"},
    {"bias": "oft_only"},
    {"modules_to_save": ["head"]},
    {"modules_to_save": ["head", "norm"], "bias": "all"},
]


@pytest.mark.parametrize("options", OWNING, ids=str)
@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
def test_disabled_is_the_base_to_the_bit_and_afterwards_nothing_has_changed(
    options: dict[str, Any], train: bool
) -> None:
    model, x = Net(), torch.randn(4, 3, 6, 6)
    _fit(model)
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        expected = model(x)
    inject(model, OFTConfig(**{"oft_block_size": 4, "target_modules": ["conv", "fc"], **options}))
    _fit(model)
    model.train(train)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    pointers = {name: id(parameter) for name, parameter in model.named_parameters()}
    for _ in range(2):
        with disable_adapters(model), torch.no_grad():
            # a frozen base is always in eval where its statistics are concerned
            assert torch.equal(model(x), expected)
            now = model.state_dict()
            assert all(torch.equal(now[name], tensor) for name, tensor in base.items())
        now = model.state_dict()
        assert list(now) == list(state)
        assert all(torch.equal(now[name], tensor) for name, tensor in state.items())
        assert {name: id(parameter) for name, parameter in model.named_parameters()} == pointers
        assert model.head.training == train
        assert (model.head[1].training == train) == (not train or "modules_to_save" in options)


def test_nested_disabling_and_an_error_inside_end_as_they_should() -> None:
    model, x = Net().eval(), torch.randn(4, 3, 6, 6)
    base = model(x)
    inject(model, OFTConfig(oft_block_size=4, target_modules=["fc"], bias="all", modules_to_save=["head"]))
    _fit(model)
    adapted = model(x)
    with disable_adapters(model):
        with disable_adapters(model):
            assert torch.equal(model(x), base)
        assert torch.equal(model(x), base)
        with disable_adapters(model.fc):
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


def test_a_backward_in_flight_survives_disabling() -> None:
    model, x = Net().eval(), torch.randn(4, 3, 6, 6)
    inject(model, OFTConfig(oft_block_size=4, target_modules=["fc"], bias="all", modules_to_save=["head"]))
    _fit(model)

    def gradients(meanwhile: Callable[[], None]) -> list[Tensor]:
        model.zero_grad()
        loss = model(x).square().sum()
        meanwhile()
        loss.backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    def reference_pass() -> None:
        with disable_adapters(model), torch.no_grad():
            model(x)

    plain, crossed = gradients(lambda: None), gradients(reference_pass)
    assert len(plain) > 5
    assert all(torch.equal(a, b) for a, b in zip(plain, crossed, strict=True))


def test_a_backward_in_flight_raises_where_another_adapter_took_its_weights() -> None:
    model, x = Net().eval(), torch.randn(4, 3, 6, 6)
    inject(model, OFTConfig(oft_block_size=4, target_modules=["fc"], modules_to_save=["head"]), "one")
    inject(model, OFTConfig(oft_block_size=4, target_modules=["fc"]), "two")
    loss = model(x).square().sum()
    set_adapter(model, "two")
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_backward_in_flight_survives_a_switch_of_rotations() -> None:
    model, x = _three(nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 6)), target_modules=["0", "1"]), torch.randn(3, 8)
    set_adapter(model, "one")
    x.requires_grad_()
    (expected,) = torch.autograd.grad(model(x).square().sum(), x)
    loss = model(x).square().sum()
    set_adapter(model, "two")
    model(x)
    (crossed,) = torch.autograd.grad(loss, x)
    assert torch.equal(crossed, expected)


def test_each_adapter_keeps_its_own_biases_and_modules() -> None:
    model, x = Net().eval(), torch.randn(4, 3, 6, 6)
    base = model(x)
    outputs, values = {}, {}
    for name in ("one", "two"):
        inject(model, OFTConfig(oft_block_size=4, target_modules=["fc"], bias="all", modules_to_save=["head"]), name)
        set_adapter(model, name)
        with disable_adapters(model):
            assert torch.equal(model(x), base)
        _fit(model)
        outputs[name] = model(x)
        values[name] = {key: tensor.clone() for key, tensor in saved_modules.values_of(walk(model), name).items()}
        assert {"head.0.weight", "head.1.running_mean", "conv.bias", "fc.bias"} <= set(values[name])
    for name in ("one", "two", "one"):
        set_adapter(model, name)
        assert torch.equal(model(x), outputs[name])
        for other in ("one", "two"):
            now = saved_modules.values_of(walk(model), other)
            assert all(torch.equal(now[key], tensor) for key, tensor in values[other].items())
    with pytest.raises(ValueError, match=r"'one' and 'two' both train conv.bias: only one of them can be active"):
        set_adapter(model, ["one", "two"])
    assert torch.equal(model(x), outputs["one"])
    unload(model)
    assert torch.equal(model(x), base)


def test_values_inside_disable_adapters_are_those_of_the_adapter() -> None:
    model = Net().eval()
    inject(model, OFTConfig(oft_block_size=4, target_modules=["fc"], modules_to_save=["head"]))
    _fit(model)
    outside = {key: tensor.clone() for key, tensor in saved_modules.values_of(walk(model), "default").items()}
    with disable_adapters(model):
        inside = saved_modules.values_of(walk(model), "default")
        assert all(torch.equal(inside[key], tensor) for key, tensor in outside.items())


# ---- torch's own encoder ---------------------------------------------------------------------------------------------


def _encoder(**options: Any) -> nn.TransformerEncoder:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0, **options)
    return nn.TransformerEncoder(layer, 2).eval()


_MASK = torch.tensor([[False, False, False, True, True], [False, False, False, False, False]])


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage")
@pytest.mark.parametrize("targets", ["all-linear", ["self_attn"], ["out_proj"], ["linear1"]], ids=str)
@pytest.mark.parametrize("mask", [None, _MASK], ids=["whole", "padded"])
def test_disabled_takes_the_encoders_own_paths_again(targets: str | list[str], mask: Tensor | None) -> None:
    model, x = _encoder(), torch.randn(2, 5, 8)
    with torch.no_grad():
        base = model(x, src_key_padding_mask=mask)
    inject(model, config(target_modules=targets))
    randomize(model, 0.3)
    kept = slice(None) if mask is None else ~mask
    with torch.no_grad():
        adapted = model(x, src_key_padding_mask=mask)
        trained_output = model.train()(x, src_key_padding_mask=mask)
        model.eval()
        assert relative(adapted[kept], trained_output[kept]) < 1e-5  # type: ignore[index]
        assert relative(adapted[kept], base[kept]) > 1e-2  # type: ignore[index]
        with disable_adapters(model):
            assert torch.equal(model(x, src_key_padding_mask=mask), base)
            with disable_adapters(model):
                assert torch.equal(model(x, src_key_padding_mask=mask), base)
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
    model, x = _encoder(), torch.randn(2, 5, 8)
    with torch.no_grad():
        base = model(x)
        inject(model, config(target_modules="all-linear"))
        randomize(model, 0.3)
        adapted = model(x)
        compiled = torch.compile(lambda y: model(y), backend="eager")
        for turn in range(3):
            if first == "base" or turn:
                with disable_adapters(model):
                    assert relative(compiled(x), base) < 1e-5
            assert relative(compiled(x), adapted) < 1e-5


# ---- threads ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["attention_batch_first", "linear_3d", "conv2d_3x3"])
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
    model, ids = _tiny_llama(), torch.randint(0, 32, (1, 4))
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
