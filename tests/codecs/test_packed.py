from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_oft.codecs import PlainCodec, codec_of, packed_codec
from lightning_oft.codecs.packed import LayerCodec
from tests.quantized import KINDS, error_of, quantized_linear, relative


@pytest.mark.parametrize("kind", KINDS)
def test_a_packed_weight_is_read_as_its_layer_computes(kind: str) -> None:
    layer, plain = quantized_linear(kind)
    codec = packed_codec(layer)
    assert codec is not None
    weight = codec.read(layer, "weight")
    x = torch.randn(5, 64)
    with torch.no_grad():  # in training mode: int8 rounds its inputs in eval
        assert relative(nn.functional.linear(x, weight, plain.bias), layer.train()(x)) < 1e-6
    assert 1e-4 < relative(weight, plain.weight.detach()) < error_of(kind)
    assert relative(LayerCodec().read(layer, "weight"), weight) < 4e-3, "the forward says the same"


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_weight_is_written_in_its_format_and_comes_back_to_the_bit(kind: str) -> None:
    layer, _ = quantized_linear(kind)
    codec = packed_codec(layer)
    assert codec is not None
    x, before = torch.randn(5, 64), codec.read(layer, "weight").clone()
    output = layer.train()(x)
    kept, storage = codec.keep(layer, "weight", "cpu"), codec.storage(layer)
    other = torch.randn(96, 64)
    codec.write(layer, "weight", other)
    assert relative(codec.read(layer, "weight"), other) < error_of(kind) * 1.1
    assert relative(layer(x), nn.functional.linear(x, other, layer.bias)) < error_of(kind) * 1.2
    assert codec.storage(layer) == storage
    codec.restore(layer, "weight", kept)
    assert torch.equal(codec.read(layer, "weight"), before)
    assert torch.equal(layer(x), output)


class Ternary(nn.Module):
    """A layer of a package that nobody knows."""

    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.in_features, self.out_features = 300, 5
        self.register_buffer("codes", torch.randint(-1, 2, (5, 300), dtype=torch.int8))
        self.bias = nn.Parameter(torch.randn(5)) if bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.codes.float(), self.bias)


@pytest.mark.parametrize("bias", [True, False])
def test_an_unknown_layer_of_codes_is_read_through_its_forward(bias: bool) -> None:
    layer = Ternary(bias)
    codec = packed_codec(layer)
    assert codec is not None
    assert not codec.can_write(layer)
    assert torch.allclose(codec.read(layer, "weight"), layer.codes.float(), atol=1e-5)


@pytest.mark.parametrize("layer", [nn.Linear(4, 4), nn.Linear(4, 4, dtype=torch.bfloat16), nn.Conv2d(1, 1, 1)])
def test_a_plain_layer_is_not_packed(layer: nn.Module) -> None:
    assert packed_codec(layer) is None
    assert isinstance(codec_of(layer, "weight"), PlainCodec)
