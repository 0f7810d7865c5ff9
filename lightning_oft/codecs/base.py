"""Codec: how one storage of a weight is read (to floating point) and written, and the table in which it is looked up.

Nothing here knows of rotations. A codec is asked about a module and the name of one of its parameters, because some
storages spread a weight over several tensors of the module.
"""

import functools
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from typing_extensions import override

from lightning_oft.functional import is_alone

Change = Callable[[Tensor, slice, Callable[[Tensor], Tensor]], Tensor]
"""From some rows of a weight, the columns that they are cut to, and what takes of a tensor that has as many rows as the
whole weight those that these are, to the same rows, changed."""


class Codec(ABC):
    """One storage of a weight: a subclass needs `matches`, `read` and `write`."""

    is_exact = True  # whether what is written is read again as it was; of a quantized storage it is not

    @abstractmethod
    def matches(self, module: nn.Module, parameter: str) -> bool:
        """Whether a module stores this parameter in this way."""

    @abstractmethod
    def read(self, module: nn.Module, parameter: str) -> Tensor:
        """The values in floating point, as far as this process holds them; they may share the parameter's memory."""

    @abstractmethod
    def write(self, module: nn.Module, parameter: str, values: Tensor) -> None:
        """Store new values of the shape and dtype that `read` gave."""

    def nbytes(self, module: nn.Module, parameter: str) -> int:
        """The bytes that `keep` takes on another device."""
        return self.read(module, parameter).nbytes

    def changed(self, module: nn.Module, parameter: str, row_dim: int, step: int, change: Change) -> Tensor:
        """What `write` takes after a row-wise change. Rows are counted by `row_dim`: of a linear layer 0, of
        transformers' Conv1D 1; `step` columns must stay together, in a storage that is cut along them."""
        return change(self.read(module, parameter), slice(None), lambda whole: whole)

    def own_memory(self, module: nn.Module, parameter: str) -> Tensor | None:
        """The weight as it lies in memory that nobody else has, so that new values may be written over the old ones;
        None where others may have it, or that cannot be told."""
        return None

    def keep(self, module: nn.Module, parameter: str, device: torch.device | str) -> Any:
        """What `restore` needs to bring the values of now back to the bit, on a device."""
        return self.read(module, parameter).detach().to(device, copy=True)

    def restore(self, module: nn.Module, parameter: str, kept: Any) -> None:
        """Store what `keep` returned."""
        values = self.read(module, parameter)
        self.write(module, parameter, kept.to(device=values.device, dtype=values.dtype))


_codecs: OrderedDict[int, Codec] = OrderedDict()


def register_codec(codec: Codec, last: bool = False) -> RemovableHandle:
    """Add a storage; the last one registered is asked first, or with `last` after all others. Returns a handle whose
    `remove()` undoes it. Raises TypeError where it is no codec, or the class of one."""
    given: Any = codec
    if not isinstance(given, Codec):
        name = (given if isinstance(given, type) else type(given)).__name__
        raise TypeError(
            f"register_codec({name}): takes an instance of a subclass of Codec, as in register_codec({name}())"
        )
    handle = RemovableHandle(_codecs)
    _codecs[handle.id] = codec
    if last:
        _codecs.move_to_end(handle.id, last=False)
    return handle


_FORMATS = {"bitsandbytes": "bitsandbytes", "hqq": "hqq", "optimum": "quanto", "torchao": "torchao"}
"""Packages whose layers or tensors have codecs, and the files of these, imported when the first such layer is seen."""


def codec_of(module: nn.Module, parameter: str) -> Codec | None:
    """The codec of a module's parameter; None where its storage is not known."""
    weight = module._parameters.get(parameter)
    kinds: tuple[Any, ...] = (type(module), type(weight), type(None if weight is None else weight.data))
    for package in {package for kind in kinds for package in _packages(kind)}:
        import_module(f"lightning_oft.codecs.{_FORMATS[package]}")
    return next((codec for codec in reversed(_codecs.values()) if codec.matches(module, parameter)), None)


@functools.cache
def _packages(kind: Any) -> frozenset[str]:
    return frozenset(base.__module__.split(".")[0] for base in kind.__mro__) & _FORMATS.keys()


def parameter_of(module: nn.Module, parameter: str) -> Tensor | None:
    """The parameter of a dotted name below a module, or the buffer that stands for a frozen one; None where there is
    neither."""
    owner, _, key = parameter.rpartition(".")
    holder = module.get_submodule(owner)
    return holder._parameters.get(key, holder._buffers.get(key))


def _plain(module: nn.Module, parameter: str) -> Tensor:
    weight = parameter_of(module, parameter)
    assert weight is not None  # a codec is asked about what it matches
    return weight


class PlainCodec(Codec):
    """A floating-point parameter or buffer, also as the view of an FSDP1 unit's flat parameter. Float8 is none: it is
    what weights are kept in to be small, and a merged one would be rounded to it a second time."""

    @override
    def matches(self, module: nn.Module, parameter: str) -> bool:
        weight = parameter_of(module, parameter)
        is_plain = weight is not None and type(weight.data) is Tensor and weight.is_floating_point()
        return is_plain and weight.element_size() > 1  # type: ignore[union-attr]

    @override
    def read(self, module: nn.Module, parameter: str) -> Tensor:
        return _plain(module, parameter).data

    @override
    def write(self, module: nn.Module, parameter: str, values: Tensor) -> None:
        """By exchange of `.data`, so that a kept base needs no copy; in place in the memory of a flat parameter."""
        weight = _plain(module, parameter)
        if hasattr(weight, "_fsdp_flattened"):
            weight.data.copy_(values)
        else:
            weight.data = values

    @override
    def own_memory(self, module: nn.Module, parameter: str) -> Tensor | None:
        weight = _plain(module, parameter)
        if not weight.is_contiguous() or weight.numel() == 0 or weight.is_inference():
            return None
        # A view, a kept state dict or a backward in flight holds the storage too, and is to see the values that it was
        # given. Memory that torch did not allocate may be an array's, or a file's whose pages would be copied as they are
        # written; shared memory, which all of a GPU's counts as, may be open in another process.
        storage = weight.untyped_storage()
        if not storage.resizable() or storage.is_shared() or not is_alone(weight):
            return None
        return weight.detach()

    @override
    def keep(self, module: nn.Module, parameter: str, device: torch.device | str) -> Any:
        weight = _plain(module, parameter)
        return weight.data.to(device, copy=hasattr(weight, "_fsdp_flattened"))


register_codec(PlainCodec())
