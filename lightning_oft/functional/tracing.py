"""Who is watching: torch.compile, torch.func and autocast each change what an operator may be."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

_NOTHING: AbstractContextManager[object] = nullcontext()


def is_traced(*tensors: Tensor) -> bool:
    """Whether formulas must be plain operators: under torch.compile and torch.func, and for tensors of other kinds
    (DTensor, a subclass). Otherwise hand-written functions may stand for them."""
    return (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or any(type(tensor) not in (Tensor, torch.nn.Parameter) for tensor in tensors)
    )


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Autocast switched off on a device; nothing where it is off already, which saves 6 microseconds a call."""
    kind = device.type
    if not torch.compiler.is_compiling():
        if not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
            return _NOTHING
    elif not torch.amp.is_autocast_available(kind):
        return nullcontext()
    return torch.autocast(kind, enabled=False)
