"""The registry: what a module class is rotated like, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from layer_cases import Holder, config, randomize, relative
from torch import Tensor, nn

from lightning_oft import inject, merge, register_layer_type
from lightning_oft.codecs import PlainCodec, codec_of, register_codec
from lightning_oft.layers import LayerType, RotatedWeight
from lightning_oft.layers.base import layer_type_of


class Scaled(nn.Module):
    """x @ W.T times a number: it has no sizes, so that nothing would take it for a linear layer by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 8))

    @property
    def in_features(self) -> int:
        return 8

    def forward(self, x: Tensor) -> Tensor:
        return 2 * x @ self.weight.T


class Finer(Scaled):
    pass


def test_a_class_and_its_subclasses_are_known_until_the_handle_is_removed() -> None:
    assert layer_type_of(Scaled()) is None
    handle = register_layer_type(Scaled, like=nn.Linear)
    try:
        assert layer_type_of(Scaled()) is layer_type_of(Finer()) is layer_type_of(nn.Linear(2, 2))
        model, x = Holder(Finer()), torch.randn(3, 8)
        assert inject(model, config()) == ["layer"]
        randomize(model)
        expected = model(x)
        merge(model)
        assert relative(model(x), expected) < 1e-5
    finally:
        handle.remove()
    assert layer_type_of(Scaled()) is None


def test_the_nearest_class_and_the_last_registration_count() -> None:
    with register_layer_type(Scaled), register_layer_type(Finer, like=nn.Embedding):
        assert layer_type_of(Finer()) is layer_type_of(nn.Embedding(2, 2))
        with register_layer_type(Finer, like=nn.Linear):
            assert layer_type_of(Finer()) is layer_type_of(Scaled())
        assert layer_type_of(Finer()) is layer_type_of(nn.Embedding(2, 2))


class Inert(LayerType):
    """Says what is to rotate, and has nothing that does."""

    def rotated_weights(self, layer: nn.Module) -> dict[str, RotatedWeight]:
        return {"": RotatedWeight("weight", 8)}


class Rotating(Inert):
    input_hook = staticmethod(lambda layer, args, kwargs: None)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((Scaled(),), TypeError, "takes a subclass of nn.Module"),
        ((int,), TypeError, "takes a subclass of nn.Module"),
        ((Scaled, nn.ReLU), ValueError, "`like` itself cannot be adapted"),
        ((Scaled, Inert), TypeError, r"like=Inert.: takes an instance, Inert\(\)"),
        (
            (Scaled, Inert()),
            TypeError,
            r"like=Inert\(\).: nothing of it rotates; give it a mixin, an input_hook, .* attach",
        ),
    ],
    ids=["a module", "no module", "nothing like it", "the class of a type", "a type that does nothing"],
)
def test_what_cannot_be_registered_is_refused(arguments: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        register_layer_type(*arguments)
    assert layer_type_of(Scaled()) is None
    with register_layer_type(Scaled, like=Rotating()):
        assert layer_type_of(Scaled()) is not None


def test_a_codec_is_registered_as_an_instance() -> None:
    for wrong in (PlainCodec, PlainCodec.matches):
        with pytest.raises(TypeError, match=r"register_codec\(\w+\): takes an instance of a subclass of Codec"):
            register_codec(wrong)  # type: ignore[arg-type]
    register_codec(PlainCodec()).remove()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.int8], ids=str)
@pytest.mark.parametrize("is_buffer", [False, True], ids=["parameter", "buffer"])
def test_a_plain_weight_is_a_parameter_or_buffer_of_whole_precision(dtype: torch.dtype, is_buffer: bool) -> None:
    """Float8 is a storage that a merge would round into a second time."""
    layer, weight = nn.Module(), torch.ones(2, 2).to(dtype)
    if is_buffer:
        layer.register_buffer("weight", weight)
    else:
        layer.weight = nn.Parameter(weight, requires_grad=False)
    codec = codec_of(layer, "weight")
    if dtype in (torch.float8_e4m3fn, torch.int8):
        assert codec is None
        return
    assert isinstance(codec, PlainCodec)
    codec.write(layer, "weight", 2 * codec.read(layer, "weight"))
    assert torch.equal(layer.state_dict()["weight"], torch.full_like(weight, 2))
