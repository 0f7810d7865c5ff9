"""Who is watching: torch.compile, torch.func, tracers and autocast each change what an operator may be; and who else has a
tensor's memory."""

import contextlib
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

NOTHING: AbstractContextManager[object] = contextlib.nullcontext()
"""The context in which nothing is switched off."""


def is_traced(*tensors: Tensor) -> bool:
    """Whether formulas must be plain operators: under torch.compile, torch.func, torch.jit.trace and forward-mode
    differentiation, and for tensors of other kinds (DTensor, a subclass). Otherwise hand-written functions may stand for them."""
    if (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or torch._C._get_tracing_state() is not None
        or forward_ad._current_level >= 0
    ):
        return True
    for tensor in tensors:  # noqa: SIM110 - a generator costs as much as all of the rest
        if type(tensor) is not Tensor and type(tensor) is not torch.nn.Parameter:
            return True
    return False


def is_recorded() -> bool:
    """Whether autograd takes note of operators; in inference mode it never does, whatever was enabled within. In compiled
    code, which cannot ask for that mode, whether gradients are enabled."""
    return torch.is_grad_enabled() and (torch.compiler.is_compiling() or not torch.is_inference_mode_enabled())


def is_checkpointed() -> bool:
    """Whether an activation checkpoint (not a reentrant one, which records nothing) takes note of what is kept for the
    backward: when it computes that again, it asks for as many tensors, of the same shapes."""
    hooks: Any = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return hooks is not None and "checkpoint" in (getattr(hooks[0], "__module__", None) or "")


def constant_in_onnx() -> AbstractContextManager[object]:
    """Within, the TorchScript exporter to ONNX writes down results and not how they came about: it knows no solve."""
    state = torch._C._get_tracing_state()
    return _untraced(state) if state is not None and torch.onnx.is_in_onnx_export() else NOTHING


@contextlib.contextmanager
def _untraced(state: object) -> Iterator[None]:
    torch._C._set_tracing_state(None)  # type: ignore[attr-defined]
    try:
        with torch.no_grad():
            yield
    finally:
        torch._C._set_tracing_state(state)  # type: ignore[attr-defined]


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Autocast switched off on a device; nothing where it is off already, which saves 6 microseconds a call."""
    kind = device.type
    if kind in ("cpu", "cuda"):  # the meta device has none, and asking costs as much as knowing
        if not torch.is_autocast_enabled(kind) and not torch.compiler.is_compiling():
            return NOTHING
    elif not torch.amp.is_autocast_available(kind):
        return NOTHING
    return torch.autocast(kind, enabled=False)


def full_float32(device: torch.device) -> AbstractContextManager[object]:
    """Neither autocast nor TF32: a rotation of a reduced mantissa is not orthogonal."""
    return _without_tf32(device) if device.type == "cuda" else without_autocast(device)


@contextlib.contextmanager
def _without_tf32(device: torch.device) -> Iterator[None]:
    with without_autocast(device):
        matmul = torch.backends.cuda.matmul
        if torch.compiler.is_compiling() or not hasattr(matmul, "fp32_precision"):
            yield
            return
        before = matmul.fp32_precision
        matmul.fp32_precision = "ieee"
        try:
            yield
        finally:
            matmul.fp32_precision = before


def is_alone(tensor: Tensor) -> bool:
    """Whether no other tensor has this one's storage, as none has that of a new one; False where torch cannot count them,
    as builds of old versions for the CPU alone."""
    count: Any = getattr(torch._C, "_storage_Use_Count", None)
    new = torch.empty(1)
    ours, one = (count and count(each.untyped_storage()._cdata) for each in (tensor, new))
    return count is not None and ours == one
