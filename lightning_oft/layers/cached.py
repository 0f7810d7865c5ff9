"""R as it was last computed, and whether it still is that of its generators. Shapes: n blocks of size b, fan-in n*b."""

import ctypes
import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from lightning_oft import functional

_address: Any = getattr(torch._C, "_data_address", Tensor.data_ptr)
"""Where a tensor's memory is. Reading `data_ptr()` counts as writing to memory that is copied on writing."""


@functools.cache
def _steps() -> list[int]:
    """[optimizer steps of this process] since the first call: fused ones change parameters without a new `_version`."""
    steps = [0]

    def count(*_: Any) -> None:
        steps[0] += 1

    register_optimizer_step_post_hook(count)
    return steps


class Cached:
    """R of a rotation, and what it was made from.

    On a CPU the generators share their memory with a copy of them, and part from it when anything writes there, by
    autograd, past it or through numpy: they are what they were where they still share it. Memory that torch does not
    share so, or that others write to unseen, is compared byte by byte. Elsewhere that would wait for the device:
    identity, version and the count of optimizer steps stand for it, and `weight.data[0] = 1` counts from the next change
    of mode on.
    """

    __slots__ = ("_address", "_blocks", "_copy", "_dtype", "_hooks", "_is_inference", "_kind", "_memory", "_number",
                 "_parameters", "_size", "_weight", "_width", "matrix")  # fmt: skip

    def __init__(self, rotation: Any, matrix: Tensor) -> None:
        weight = rotation.weight
        self.matrix, self._dtype, self._is_inference = matrix, matrix.dtype, matrix.is_inference()
        self._weight, self._size = weight, weight.numel()
        self._kind, self._number = weight.device.type, weight.get_device()
        self._parameters, self._hooks = rotation._parameters, (rotation._forward_hooks, rotation._forward_pre_hooks)
        self._blocks, self._width, _ = matrix.shape
        self._memory: Any = None
        self._copy: Any = _identity(weight)
        if _is_on_host(weight):
            self._copy = _shared_copy(weight)
            if self._copy is None:  # numpy would do too, and keep FSDP from freeing the storage
                self._memory = (ctypes.c_char * weight.nbytes).from_address(weight.data_ptr())
                self._copy = bytearray(self._memory)  # compares with a buffer by memcmp
        self._address = _address(weight)

    def forget(self) -> None:
        """Serve nobody any more, whoever has it."""
        self._address = None

    def serves(self, weight: Any, dtype: torch.dtype) -> bool:
        """Whether R is of this generator as it is now, and can be used in this mode."""
        return (
            weight is self._weight
            and dtype is self._dtype
            and type(weight) is nn.Parameter
            and _address(weight) == self._address
            and weight.numel() == self._size
            # A tensor made in inference mode cannot be used where gradients are recorded later.
            and (not self._is_inference or torch.is_inference_mode_enabled())
            and (type(self._copy) is Tensor or self._copy == (self._memory or _identity(weight)))
        )

    def vector(self, x: Tensor) -> Tensor | None:
        """x . blockdiag(R) of a single vector, (..., n*b) with one row; None where R does not serve, or where there is
        anything else to heed. This is a rotation's `forward` for a generated token, for which a dozen calls in Python
        and what they read cost more than the product."""
        hooks, pre_hooks = self._hooks
        if (
            torch.is_grad_enabled()
            or functional.is_traced(x)
            or not self.serves(self._parameters.get("weight"), x.dtype)
            or self._blocks == 1  # shared by all of x
            or x.numel() != self._blocks * self._width
            or x.size(-1) != x.numel()
            or x.get_device() != self._number  # a replica of the layer elsewhere
            or hooks
            or pre_hooks
            or torch.is_autocast_enabled(self._kind)
        ):
            return None
        return torch.bmm(x.view(self._blocks, 1, self._width), self.matrix).view_as(x)


def _shared_copy(weight: Tensor) -> Tensor | None:
    """The generators in the same memory until somebody writes to theirs; None where torch cannot, and where arrays or
    other tensors have that memory already."""
    copied, owners = getattr(torch, "_lazy_clone", None), getattr(torch._C, "_storage_Use_Count", None)
    if copied is None or owners is None or _address is Tensor.data_ptr:
        return None
    if owners(weight.untyped_storage()._cdata) > _ALONE:
        return None
    try:
        found: Tensor = copied(weight.detach())
    except RuntimeError:  # memory that is not torch's own: numpy's, a file's, shared with other processes
        return None
    return found if _address(found) == _address(weight) else None


_ALONE = 2
"""Owners of a storage that nobody but its parameter has: the parameter, and who asks."""


def _identity(weight: Tensor) -> tuple[int, ...]:
    return (id(weight), weight.get_device(), 0 if weight.is_inference() else weight._version, *_steps())


def _is_on_host(tensor: Tensor) -> bool:
    """Whether comparing the tensor waits for no device."""
    return tensor.device.type == "cpu"
