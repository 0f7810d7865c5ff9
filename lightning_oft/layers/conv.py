"""Convolutions: the weight is rotated, which is exact for any kernel; rotating the input would not be."""

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from lightning_oft.layers.base import LayerType, RotatedWeight, SwappedClass, in_format_of, register_layer_type
from lightning_oft.layers.own_forward import TurnedOutput
from lightning_oft.layers.state import rotated_weight


class _RotatedConv(SwappedClass):
    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(input, rotated_weight(self, "", weight), bias)  # type: ignore


def _example(layer: Any) -> tuple[Tensor, ...]:
    """One input that the kernel fits into."""
    padding = max(getattr(layer, "_reversed_padding_repeated_twice", [0]))
    sizes = zip(layer.kernel_size, layer.dilation, strict=True)
    return (torch.randn(1, layer.in_channels, *(2 + padding + dilation * (kernel - 1) for kernel, dilation in sizes)),)


class Conv(LayerType):
    """nn.Conv1d, Conv2d, Conv3d: the weight is rotated over in/groups . kernel, which is exact for any kernel."""

    name = "convolution"
    mixin = _RotatedConv

    @override
    def rotated_weights(self, layer: Any) -> dict[str, RotatedWeight]:
        return {
            "": RotatedWeight("weight", layer.weight.shape[1:].numel(), neurons=getattr(layer, "out_channels", None))
        }

    @override
    def is_known_to_peft(self, layer: nn.Module) -> bool:
        """PEFT folds overlapping patches, which is another map for kernels larger than 1 (2.5x off at the identity)."""
        return isinstance(layer, nn.Conv2d) and set(layer.kernel_size) == {1} and layer.groups == 1

    @override
    def example(self, layer: nn.Module) -> tuple[Tensor, ...]:
        return _example(layer)

    @functools.cached_property
    @override
    def turned(self) -> LayerType:
        return _ConvOutput(self)


class _TurnedConv(SwappedClass):
    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(input, rotated_weight(self, "", weight, "output"), bias)  # type: ignore


class _ConvOutput(TurnedOutput):
    """The weight is rotated over the output channels. Of several groups blocks may reach from one into the next: then
    that is a rotation of the weight, as other libraries have it, and none of the output."""

    mixin = _TurnedConv


class _RotatedConvTranspose(SwappedClass):
    def forward(self: Any, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        dims = self.weight.dim() - 2
        sizes = (self.stride, self.padding, self.kernel_size, dims, self.dilation)
        padding = self._output_padding(input, output_size, *sizes)
        convolve = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[dims - 1]
        weight = rotated_weight(self, "", self.weight)
        return convolve(input, weight, self.bias, self.stride, self.padding, padding, self.groups, self.dilation)


class ConvTranspose(LayerType):
    """nn.ConvTranspose1d/2d/3d: weight (in, o/groups, kernel); an output neuron reads in/groups . kernel entries."""

    name = "transposed convolution"
    row_dim = 1
    mixin = _RotatedConvTranspose

    @override
    def rotated_weights(self, layer: Any) -> dict[str, RotatedWeight]:
        shape = layer.weight.shape
        fan = shape[0] // layer.groups * shape[2:].numel()
        return {"": RotatedWeight("weight", fan, neurons=getattr(layer, "out_channels", None))}

    @override
    def example(self, layer: nn.Module) -> tuple[Tensor, ...]:
        return _example(layer)

    @override
    def to_matrix(self, layer: Any, weight: Tensor) -> Tensor:
        grouped = weight.reshape(layer.groups, -1, *weight.shape[1:]).flatten(3)
        return grouped.transpose(1, 2).flatten(2).flatten(0, 1)

    @override
    def from_matrix(self, layer: Any, matrix: Tensor, weight: Tensor) -> Tensor:
        grouped = matrix.view(layer.groups, weight.shape[1], weight.shape[0] // layer.groups, -1).transpose(1, 2)
        return in_format_of(grouped.reshape(weight.shape), weight)

    @override
    def scale_of(self, layer: Any, scale_o: Tensor, weight: Tensor) -> Tensor:
        """(in, o/groups, 1, ..): each group of the inputs has the scales of its own outputs."""
        by_group = scale_o.view(layer.groups, -1).repeat_interleave(weight.shape[0] // layer.groups, 0)
        return by_group[(..., *[None] * (weight.dim() - 2))]


register_layer_type(nn.modules.conv._ConvNd, Conv())
register_layer_type(nn.modules.conv._ConvTransposeNd, ConvTranspose())
