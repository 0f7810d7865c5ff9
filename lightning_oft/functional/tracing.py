"""Who is watching: torch.compile, torch.func, tracers and autocast each change what an operator may be; and who else has a
tensor's memory and writes to it."""

import contextlib
import ctypes
import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.optim.optimizer import register_optimizer_step_post_hook

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


def is_batched(grad: Tensor) -> bool:
    """Whether a backward is given several gradients at once, by torch.autograd.grad(is_grads_batched=True) or
    torch.autograd.functional.jacobian(vectorize=True): operators that write to a tensor of one's own cannot take them."""
    return _is_batched is not None and bool(_is_batched(grad))


_is_batched: Any = getattr(torch._C._functorch, "is_legacy_batchedtensor", None)


def is_recorded() -> bool:
    """Whether autograd takes note of operators; in inference mode it never does, whatever was enabled within. In compiled
    code, which cannot ask for that mode, whether gradients are enabled."""
    return torch.is_grad_enabled() and (torch.compiler.is_compiling() or not torch.is_inference_mode_enabled())


_CHECKPOINTS = ("torch.utils.checkpoint", "deepspeed.runtime.activation_checkpointing.checkpointing")


def is_checkpointed() -> bool:
    """Whether an activation checkpoint (not a reentrant one, which records nothing) takes note of what is kept for the
    backward: when it computes that again, it asks for as many tensors, of the same shapes."""
    hooks: Any = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return hooks is not None and getattr(hooks[0], "__module__", None) in _CHECKPOINTS


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


def is_autocast(like: Tensor) -> bool:
    """Whether autocast is on for the device of a tensor. What asks between two large products finds neither its code nor its
    objects in a cache, so one question comes first that needs no device."""
    if (like.is_cpu or like.is_cuda) and not torch._C._is_any_autocast_enabled():  # which knows not of every device
        return False
    kind = like.device.type
    return torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)


def without_autocast(like: Tensor) -> AbstractContextManager[object]:
    """Autocast switched off on the device of a tensor; nothing where it is off already, which saves 6 microseconds a call."""
    if not torch.compiler.is_compiling() and not is_autocast(like):
        return NOTHING
    kind = like.device.type
    return torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else NOTHING


def full_float32(like: Tensor) -> AbstractContextManager[object]:
    """Neither autocast nor TF32 on the device of a tensor: a rotation of a reduced mantissa is not orthogonal."""
    return _without_tf32(like) if like.is_cuda else without_autocast(like)


@contextlib.contextmanager
def _without_tf32(like: Tensor) -> Iterator[None]:
    with without_autocast(like):
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
    """Whether no other tensor has this one's storage; False where torch cannot count them, as builds of old versions for the
    CPU alone."""
    count: Any = getattr(torch._C, "_storage_Use_Count", None)
    return count is not None and count(tensor.untyped_storage()._cdata) == _owners_of_new(count)


@functools.cache
def _owners_of_new(count: Callable[[int], int]) -> int:
    """Those of a new tensor's storage: the tensor and who asks."""
    new = torch.UntypedStorage(0)  # type: ignore[no-untyped-call]
    return 1 + count(new._cdata)


address: Any = getattr(torch._C, "_data_address", Tensor.data_ptr)
"""Where a tensor's memory is. Reading `data_ptr()` counts as writing to memory that is copied on writing."""


@functools.cache
def optimizer_steps() -> list[int]:
    """[optimizer steps of this process] since the first call: fused ones change parameters without a new `_version`."""
    steps = [0]

    def count(*_: Any) -> None:
        steps[0] += 1

    register_optimizer_step_post_hook(count)
    return steps


class Snapshot:
    """What generators are, to be asked later whether they still are.

    On a CPU they share their memory with a copy of them, and part from it when anything writes there, by autograd, past
    it or through numpy: they are what they were where they still share it. Memory that torch does not share so, or that
    others write to unseen, is compared byte by byte, and so is what is soon asked. Elsewhere that would wait for the device:
    identity, version and the count of optimizer steps stand for it, and `weight.data[0] = 1` counts from the next change of
    mode on.
    """

    __slots__ = ("_address", "_copy", "_memory")

    def __init__(self, weight: Tensor, briefly: bool = False) -> None:
        """`briefly` for one that is asked once and soon, where the bytes cost less than sharing them."""
        self._memory: Any = None
        self._copy: Any = _identity(weight)
        if _is_on_host(weight):
            self._copy = None if briefly else _shared_copy(weight)
            if self._copy is None:  # numpy would do too, and keep FSDP from freeing the storage
                self._memory = (ctypes.c_char * weight.nbytes).from_address(address(weight))
                self._copy = bytearray(self._memory)  # compares with a buffer by memcmp
        self._address = address(weight)

    def is_of(self, weight: Tensor) -> bool:
        """Whether these are the generators as they were."""
        if address(weight) != self._address:  # of memory that was given back nothing is read
            return False
        return type(self._copy) is Tensor or self._copy == (self._memory or _identity(weight))


_COPYING = threading.Lock()
"""Held while memory is made to be copied on writing, which torch takes for a change of the tensor."""


def _shared_copy(weight: Tensor) -> Tensor | None:
    """The generators in the same memory until somebody writes to theirs; None where torch cannot, and where arrays or
    other tensors have that memory already."""
    copied: Any = getattr(torch, "_lazy_clone", None)
    if copied is None or address is Tensor.data_ptr:
        return None
    if not is_alone(weight) or weight._use_count() > 1:  # type: ignore[attr-defined]
        return None
    # Memory read from a file has no allocator, without which torch crashes at the first write.
    if not weight.untyped_storage().resizable():
        return None
    try:
        with _COPYING:
            found: Tensor = copied(weight.detach())
    except RuntimeError:  # memory that is not torch's own: numpy's, a file's, shared with other processes
        return None
    return found if address(found) == address(weight) else None


def _identity(weight: Tensor) -> tuple[int, ...]:
    return (id(weight), weight.get_device(), 0 if weight.is_inference() else weight._version, *optimizer_steps())


def _is_on_host(tensor: Tensor) -> bool:
    """Whether comparing the tensor waits for no device."""
    return tensor.device.type == "cpu"
