"""Layers that are not their type's arithmetic: merged is as trained, or the layer and a remedy that works are named."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from layer_cases import Holder, SelfAttention, config, randomize, relative
from torch import Tensor, nn

from lightning_oft import inject, merge, oft_layers, register_layer_type, unmerge
from lightning_oft.layers import LayerType, OwnForward, state_of
from lightning_oft.layers.base import RotatedWeight
from lightning_oft.layers.linear import TransposedLinear
from lightning_oft.model import probe


class Masked(nn.Linear):
    """Some of its weight counts."""

    mask: Tensor

    def __init__(self, inputs: int = 8, outputs: int = 6) -> None:
        super().__init__(inputs, outputs)
        self.register_buffer("mask", (torch.rand(outputs, inputs) > 0.4).float())

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight * self.mask, self.bias)


class MaskedInPlace(Masked):
    """Clears what does not count, as the convolutions of PixelCNN do."""

    def forward(self, input: Tensor) -> Tensor:
        self.weight.data.mul_(self.mask)
        return F.linear(input, self.weight, self.bias)


class Normalised(nn.Linear):
    """Every column of its weight has length 1."""

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, F.normalize(self.weight, dim=0), self.bias)


class Standardised(nn.Conv2d):
    """Weight standardisation."""

    def forward(self, input: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        weight = weight / weight.std((1, 2, 3), keepdim=True)
        return F.conv2d(input, weight, self.bias, self.stride, self.padding)


class MaskedConv(nn.Conv2d):
    """Reads its weight again below forward."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(input, self.weight * self.weight.abs().gt(0.1), bias)


class Centred(nn.ConvTranspose2d):
    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        return F.conv_transpose2d(input, self.weight - self.weight.mean(), self.bias, self.stride)


class NormedEmbedding(nn.Embedding):
    def forward(self, input: Tensor) -> Tensor:
        return F.layer_norm(super().forward(input), (self.embedding_dim,))


class TwoInputs(nn.Linear):
    """What it is called with nobody can guess."""

    def forward(self, input: Tensor, other: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(input + other)


class Cosine(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return F.linear(F.normalize(input, dim=-1), F.normalize(self.weight, dim=-1))


class Equalised(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight * self.in_features**-0.5, self.bias)


class ScaledEmbedding(nn.Embedding):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * self.embedding_dim**0.5


class Frozen(nn.Module):
    """A look-alike of nn.Linear whose weight is a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.in_features, self.out_features = 8, 6
        self.register_buffer("weight", torch.randn(6, 8))

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight)  # type: ignore[arg-type]


FLAT, IMAGE, IDS = torch.randn(3, 8), torch.randn(2, 8, 6, 6), torch.tensor([1, 2, 5])


class RoundedWeight(nn.Linear):
    """Rounds its weight to 8 bits, as quantization-aware training does."""

    def forward(self, input: Tensor) -> Tensor:
        rounded = (self.weight * 128).round() / 128
        return F.linear(input, self.weight + (rounded - self.weight).detach(), self.bias)


RIGHT: dict[str, tuple[Callable[[], nn.Module], tuple[Tensor, ...], bool]] = {
    "masked": (Masked, (FLAT,), True),
    "masked_in_place": (MaskedInPlace, (FLAT,), True),
    "normalised": (lambda: Normalised(8, 6), (FLAT,), True),
    "standardised": (lambda: Standardised(8, 6, 3), (IMAGE,), True),
    "masked_conv": (lambda: MaskedConv(8, 6, 3), (IMAGE,), True),
    "transposed": (lambda: Centred(8, 6, 3), (IMAGE,), True),
    "embedding": (lambda: NormedEmbedding(11, 8), (IDS,), True),
    "rounded_weight": (lambda: RoundedWeight(8, 6), (FLAT,), True),
    "two_inputs": (lambda: TwoInputs(8, 6), (FLAT, FLAT), True),
    "cosine": (lambda: Cosine(8, 6), (FLAT,), False),
    "equalised": (lambda: Equalised(8, 6), (FLAT,), False),
    "scaled_embedding": (lambda: ScaledEmbedding(11, 8), (IDS,), False),
    "weight_in_a_buffer": (Frozen, (FLAT,), False),
}


@pytest.mark.parametrize(("build", "inputs", "own"), RIGHT.values(), ids=RIGHT)
def test_a_layer_with_a_forward_of_its_own_merges_as_it_was_trained(
    build: Callable[[], nn.Module], inputs: tuple[Tensor, ...], own: bool
) -> None:
    """Where its type's arithmetic would do, it is used: it is cheaper, and PEFT computes the same."""
    torch.manual_seed(0)
    model = Holder(build())
    base = model(*inputs)
    assert inject(model, config(use_cayley_neumann=False)) == ["layer"]
    assert torch.equal(model(*inputs), base)
    state: Any = state_of(model.layer)
    assert isinstance(state.layer_type, OwnForward) == own
    randomize(model, 0.3)
    adapted = model(*inputs)
    assert relative(adapted, base) > 0.1
    adapted.square().sum().backward()
    assert all(parameter.grad is not None for parameter in oft_layers(model)["layer"].oft_R.parameters())  # type: ignore
    merge(model)
    assert relative(model(*inputs), adapted) < 1e-5
    if build is not MaskedInPlace:  # which changes its merged weight itself
        unmerge(model)
        assert torch.equal(model(*inputs), adapted)


class Elsewhere(nn.Linear):
    """Has a weight and computes with another."""

    def __init__(self) -> None:
        super().__init__(8, 6)
        self.own = nn.Parameter(torch.randn(6, 8))

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.own, self.bias)


class Dense(nn.Module):
    """x @ W: looks like nn.Linear, and its weight is the other way round."""

    def __init__(self) -> None:
        super().__init__()
        self.in_features, self.out_features = 8, 6
        self.weight = nn.Parameter(torch.randn(8, 6))

    def forward(self, input: Tensor) -> Tensor:
        return input @ self.weight


class LowRank(nn.Module):
    """Looks like nn.Linear and has no weight."""

    def __init__(self) -> None:
        super().__init__()
        self.in_features, self.out_features = 8, 6
        self.down, self.up = nn.Parameter(torch.randn(8, 2)), nn.Parameter(torch.randn(2, 6))

    def forward(self, input: Tensor) -> Tensor:
        return input @ self.down @ self.up


class DenseType(TransposedLinear):
    name = "dense"


class DownType(DenseType):
    """Rotates what meets the input first."""

    def rotated_weights(self, layer: nn.Module) -> dict[str, RotatedWeight]:
        return {"": RotatedWeight("down", 8)}


class OwnType(DenseType):
    def rotated_weights(self, layer: nn.Module) -> dict[str, RotatedWeight]:
        return {"": RotatedWeight("own", 8)}

    def to_matrix(self, layer: nn.Module, weight: Tensor) -> Tensor:
        return weight

    def from_matrix(self, layer: nn.Module, matrix: Tensor, weight: Tensor) -> Tensor:
        return matrix


REFUSED: dict[str, tuple[type[nn.Module], LayerType, str]] = {
    "another_weight": (
        Elsewhere,
        OwnType(),
        "a Elsewhere does not compute from its weight what a layer of type linear",
    ),
    "transposed": (Dense, DenseType(), "a Dense does not compute from its weight what a layer of type linear does"),
    "no_weight": (LowRank, DownType(), "a LowRank looks like a known layer and has no parameter `weight`"),
}


@pytest.mark.parametrize(("cls", "remedy", "message"), REFUSED.values(), ids=REFUSED)
def test_what_no_rotation_of_its_weight_fits_is_refused_and_the_remedies_work(
    cls: type[nn.Module], remedy: LayerType, message: str
) -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"layer": cls(), "linear": nn.Linear(8, 6)})
    names = list(model.state_dict())
    with pytest.raises(ValueError, match=f"layer: {re.escape(message)}.*exclude_modules"):
        inject(model, config(target_modules="all-linear"))
    assert list(model.state_dict()) == names
    assert inject(model, config(target_modules="all-linear", exclude_modules=["layer"])) == ["linear"]
    held, x = Holder(cls()), torch.randn(3, 8)
    base = held(x)
    with register_layer_type(cls, like=remedy):
        inject(held, config(use_cayley_neumann=False))
        assert torch.equal(held(x), base)
        randomize(held)
        adapted = held(x)
        assert relative(adapted, base) > 0.05
        merge(held)
        assert relative(held(x), adapted) < 1e-5


class Squared(nn.Module):
    """Of a kind that nobody else knows."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.randn(8, 6))

    def forward(self, input: Tensor) -> Tensor:
        return (input @ self.down).square()


class SquaredType(DenseType):
    """Matches instances instead of a class, and has no example to try one with."""

    def matches(self, module: nn.Module, is_registered: bool) -> bool:
        return hasattr(module, "down")

    def rotated_weights(self, layer: nn.Module) -> dict[str, RotatedWeight]:
        return {"": RotatedWeight("down", 8)}

    def example(self, layer: nn.Module) -> None:  # type: ignore[override]
        return None


def test_a_type_without_an_example_is_taken_at_its_word() -> None:
    mine = SquaredType()
    with register_layer_type(None, like=mine):
        model = _adapted(Squared())
    assert state_of(model.layer).layer_type is mine  # type: ignore[union-attr]


def test_a_registered_class_is_taken_at_its_word() -> None:
    model = Holder(Masked())
    with register_layer_type(Masked, like=nn.Linear):
        inject(model, config())
    assert state_of(model.layer).layer_type is state_of(_adapted(nn.Linear(8, 6)).layer).layer_type  # type: ignore


def _adapted(layer: nn.Module) -> Holder:
    model = Holder(layer)
    inject(model, config())
    return model


def _put(layer: Any, forward: Callable[[Any, Tensor], Tensor]) -> None:
    bound, weight = layer.forward, layer.weight
    layer.forward = lambda x: forward((bound, layer, weight), x)


HARMLESS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "behind": lambda its, x: its[0](x).relu() if x.is_floating_point() else its[0](x) * 3,
    "scaled": lambda its, x: its[0](2 * x) if x.is_floating_point() else its[0](x) * 2,
    "its_own": lambda its, x: type(its[1]).forward(its[1], x),
}
HARMFUL: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "gated": lambda its, x: its[0](x * torch.arange(8.0)),
    "normalised": lambda its, x: F.linear(x, F.normalize(its[1].weight, dim=0)),
    "residual": lambda its, x: its[0](x) + x[:, :6],
    "captured": lambda its, x: F.linear(x, its[2]),
    "absolute": lambda its, x: F.linear(x, its[1].weight.abs()),
}


@pytest.mark.parametrize("first", ["inject", "forward"])
@pytest.mark.parametrize("forward", HARMLESS.values(), ids=HARMLESS)
def test_a_forward_that_was_put_on_an_instance_is_tried(forward: Any, first: str) -> None:
    for layer, x in ((nn.Linear(8, 6), FLAT), (nn.Embedding(11, 8), IDS)):
        model, weight = Holder(layer), layer.weight
        steps = (lambda model=model: inject(model, config(use_cayley_neumann=False)), lambda m=layer: _put(m, forward))
        for step in steps if first == "inject" else reversed(steps):
            step()
        assert layer.weight is weight
        randomize(model)
        adapted = model(x)
        merge(model)
        assert relative(model(x), adapted) < 1e-5


@pytest.mark.parametrize("forward", HARMFUL.values(), ids=HARMFUL)
def test_one_that_a_merge_would_change_is_refused_before_and_when_it_came_later_by_the_merge(forward: Any) -> None:
    what = "layer: the forward that was put on it does not compute the same.*exclude_modules"
    model = Holder(nn.Linear(8, 6))
    _put(model.layer, forward)
    with pytest.raises(ValueError, match=f"^{what}"):
        inject(model, config())
    assert not oft_layers(model)
    later = _adapted(nn.Linear(8, 6))
    _put(later.layer, forward)
    randomize(later)
    adapted = later(FLAT)
    with pytest.raises(ValueError, match=f"^cannot merge {what}; nothing was changed"):
        merge(later)
    assert torch.equal(later(FLAT), adapted)


def test_one_that_cannot_be_tried_is_said_and_one_that_hides_a_class_is_refused() -> None:
    model = Holder(nn.Linear(8, 6))
    _put(model.layer, lambda its, x: its[0](x[:, :, 0]))
    with pytest.warns(UserWarning, match=r"the forward of layer was replaced on the instance.*exclude_modules"):
        inject(model, config())
    attention, x = SelfAttention(), torch.randn(5, 2, 8)
    bound = attention.layer.forward
    attention.layer.forward = lambda *args: bound(*args)  # type: ignore[method-assign]
    with pytest.raises(
        ValueError, match=r"layer: its forward was replaced on the instance.*adapt the layer before that"
    ):
        inject(attention, config())
    attention.layer.forward = bound  # type: ignore[method-assign]  # the class's own, as accelerate leaves it behind
    base = attention(x)
    inject(attention, config())
    randomize(attention)
    adapted = attention(x)
    assert relative(adapted, base) > 0.01
    merge(attention)
    assert relative(attention(x), adapted) < 1e-5


class Counting(nn.Linear):
    """Leaves traces of every call."""

    calls: Tensor
    seen: list[int] = []

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.register_buffer("calls", torch.zeros(()))
        self.last: Tensor | None = None

    def forward(self, input: Tensor) -> Tensor:
        self.calls.add_(1)
        self.seen.append(1)
        self.last = input
        noise = 0 if not self.training else torch.randn(1) + random.random()
        return super().forward(input) + noise


def test_trying_leaves_no_trace_and_happens_once_for_layers_of_a_kind() -> None:
    model = nn.Sequential(*(Counting(8, 8) for _ in range(20))).train()
    hooks = [0]
    for layer in model:
        layer.register_forward_hook(lambda *_: hooks.append(1))
    before, state = torch.get_rng_state(), {name: value.clone() for name, value in model.state_dict().items()}
    Counting.seen.clear()
    inject(model, config(target_modules="all-linear"))
    assert len(Counting.seen) < 8
    assert hooks == [0]
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in state.items())
    assert all(layer.training and layer.last is None for layer in model)


def test_layers_on_meta_are_tried_with_random_weights() -> None:
    model = nn.ModuleDict({"masked": Masked(), "cosine": Cosine(8, 6), "plain": nn.Linear(8, 6)}).to("meta")
    inject(model, config(target_modules="all-linear"))
    types = {name: type(state_of(layer).layer_type).__name__ for name, layer in model.items()}  # type: ignore[union-attr]
    assert types == {"masked": "OwnForward", "cosine": "LinearLike", "plain": "LinearLike"}
    assert all(parameter.is_meta for parameter in model.parameters())


def test_a_forward_of_torch_is_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    class Named(nn.Linear):
        pass

    monkeypatch.setattr(probe, "_confirmed_type", None)
    layers = [nn.Linear(8, 8), Named(8, 8), nn.Conv2d(4, 4, 3), nn.Embedding(4, 8), nn.MultiheadAttention(8, 2)]
    model = nn.Sequential(*layers)
    assert inject(model, config(target_modules=["0", "1", "2", "3", "4"])) == ["0", "1", "2", "3", "4"]


def test_neither_injection_nor_merge_draws_from_the_random_numbers_of_a_run() -> None:
    class Passed(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input)

    model = nn.Sequential(Passed(8, 8))
    before = torch.get_rng_state()
    inject(model, config(target_modules=["0"]))
    assert torch.equal(torch.get_rng_state(), before)
    merge(model)
    assert torch.equal(torch.get_rng_state(), before)
