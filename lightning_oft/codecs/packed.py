"""Weights that are quantized or packed: what all their codecs share, and the reading of a layer that no codec knows."""

import functools
from abc import abstractmethod
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_oft.codecs.base import Codec, codec_of, parameter_of, register_codec


class PackedCodec(Codec):
    """The weight of a quantized layer, found by the layer's class or by the type of the weight.

    `layers` and `tensors` are written `package.Class`: where in its package a class lives has changed before.
    """

    is_exact = False
    has_own_reading = True
    """Whether `read` needs no forward, so that it costs little and cannot fail."""
    passes_gradient = False
    """Whether the input gets a gradient whatever is in the weight, so that nobody needs to try."""
    sharded_by: tuple[str, ...] = ()
    """Lightning's strategies that can cut the weight and put it together again (measured)."""
    layers: tuple[str, ...] = ()
    tensors: tuple[str, ...] = ()

    @override
    def matches(self, module: nn.Module, parameter: str) -> bool:
        if parameter != "weight":
            return False
        if self.layers and not _names(module).isdisjoint(self.layers):
            return True
        weight = parameter_of(module, parameter) if self.tensors else None
        # A Parameter of a subclass shows that of the tensor in its data alone, and one that is a subclass itself only there.
        return weight is not None and not (_names(weight) | _names(weight.data)).isdisjoint(self.tensors)

    @abstractmethod
    def storage(self, module: nn.Module) -> str | None:
        """The name of the format, such as `nf4`; None where the weight is still to be quantized."""

    def enable_gradients(self, module: nn.Module) -> None:
        """Keep the layer from storing its weight in a way that gives its input no gradient."""

    def survives_cast(self, module: nn.Module, dtype: torch.dtype) -> bool:
        """Whether the weight means the same after `module.to(dtype)`, or says that it does not."""
        return True

    def can_write(self, module: nn.Module) -> bool:
        """Whether `write` knows this weight's format."""
        return True

    @override
    def read(self, module: nn.Module, parameter: str) -> Tensor:
        """As most quantized tensors say it themselves."""
        weight: Any = module._parameters[parameter]
        values: Tensor = weight.dequantize()
        return values

    def lasting(self, module: nn.Module, parameter: str) -> tuple[str | None, Tensor]:
        """What a fingerprint is taken of, which is the same however the layer was used, and its name: here the format's,
        and the values."""
        return self.storage(module), self.read(module, parameter)

    @override
    def write(self, module: nn.Module, parameter: str, values: Tensor) -> None:
        """Quantize values as the weight was quantized. What `keep` returned is not changed by it. Raises TypeError where
        `can_write` says no."""
        raise TypeError(f"{type(module).__name__}: nothing writes the format of its {parameter}")

    @override
    def nbytes(self, module: nn.Module, parameter: str) -> int:
        return 0  # it stays where it is, and is small

    @override
    def keep(self, module: nn.Module, parameter: str, device: torch.device | str) -> Any:
        return (module._parameters[parameter],)

    @override
    def restore(self, module: nn.Module, parameter: str, kept: Any) -> None:
        (module._parameters[parameter],) = kept


class LayerCodec(PackedCodec):
    """The weight of any layer with in_features and tensors of codes, read through its forward: W = (f(I) - f(0))^T.
    Of whole numbers or float8, since any float tensor else could be a weight."""

    has_own_reading = False
    sharded_by = ("ModelParallelStrategy", "FSDPStrategy")  # nobody knows, and buffers are not cut
    ROWS = 256
    """Rows of the identity that a layer sees at once."""

    @override
    def matches(self, module: nn.Module, parameter: str) -> bool:
        sizes = (getattr(module, size, None) for size in ("in_features", "out_features"))
        weight = parameter_of(module, "weight") if parameter == "weight" else None
        if parameter != "weight" or not all(isinstance(size, int) for size in sizes):
            return False
        return (weight is None or _is_code(weight)) and any(_is_code(tensor) for tensor in _tensors(module))

    @override
    def storage(self, module: nn.Module) -> str | None:
        return type(module).__name__

    @override
    def can_write(self, module: nn.Module) -> bool:
        return False

    @override
    @torch.no_grad()
    def read(self, module: nn.Module, parameter: str) -> Tensor:
        layer: Any = module
        tensors = list(_tensors(module))
        dtype = next((t.dtype for t in tensors if t.is_floating_point() and not _is_code(t)), torch.float32)
        zero = torch.zeros(1, layer.in_features, dtype=dtype, device=tensors[0].device)
        bias = layer.forward(zero)  # below the hooks, so without rotations
        columns = []
        for first in range(0, layer.in_features, self.ROWS):
            index = torch.arange(first, min(first + self.ROWS, layer.in_features), device=zero.device)
            rows = zero.expand(len(index), -1).clone()
            rows[torch.arange(len(index), device=zero.device), index] = 1
            columns.append((layer.forward(rows) - bias).mT)
        return torch.cat(columns, 1)


def packed_codec(module: nn.Module, parameter: str = "weight") -> PackedCodec | None:
    """The codec of a module's quantized or packed weight; None where the module has none."""
    codec = codec_of(module, parameter)
    return codec if isinstance(codec, PackedCodec) else None


def _names(thing: object) -> frozenset[str]:
    cls: Any = type(thing)
    return _names_of(cls)


@functools.cache
def _names_of(cls: Any) -> frozenset[str]:
    return frozenset(f"{base.__module__.split('.')[0]}.{base.__qualname__}" for base in cls.__mro__)


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    return (tensor for tensor in (*module._parameters.values(), *module._buffers.values()) if tensor is not None)


def _is_code(tensor: Tensor) -> bool:
    return tensor.element_size() == 1 or not tensor.is_floating_point()


register_codec(LayerCodec(), last=True)
