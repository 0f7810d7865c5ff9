"""R that need not be computed: made together with those of the layers beside, or kept from the last forward."""

import functools
import itertools
import threading
import weakref
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, bmm, is_grad_enabled, nn
from torch._C import _get_tracing_state, _is_any_autocast_enabled

from lightning_oft import functional
from lightning_oft.functional import address

_TOGETHER = {"cpu": 9 * 2**15, "cuda": 2**21}
"""Entries of R up to which modules are computed in one go, by kind of device (measured): on a CPU the matrices leave the
caches beyond; on a GPU, where launching costs more than computing, they would take tens of MB."""
_MANY = 100
"""Optimizer steps after which no graph of before is waiting for its backward."""

_LEARNT_FROM = 2**25 - 2**16
"""Bytes of the largest block that glibc learns from, nearly."""


class _Waiting(NamedTuple):
    """One R that was computed with others, by whom, and what must still hold when it is asked for."""

    key: tuple[Any, ...]
    matrix: Any
    by: "SharedMap"
    generator: functional.Snapshot

    def serves(self, rotation: Any, dtype: torch.dtype) -> bool:
        is_same = self.key == _key(rotation, dtype) and self.generator.is_of(rotation.weight)
        return is_same and not self.matrix.grad_fn.is_spent


class _Moment(NamedTuple):
    """When a rotation was called: the state of its generator, and the optimizer steps until then."""

    rotation: Any
    version: int
    steps: int

    @classmethod
    def of(cls, rotation: Any) -> "_Moment":
        return cls(rotation, rotation.weight._version, *functional.optimizer_steps())

    def is_past(self) -> bool:
        """Whether the generator was trained since; fused optimizers do that uncounted."""
        return self.rotation.weight._version != self.version or functional.optimizer_steps()[0] >= self.steps + _MANY


class SharedMap:
    """R of the rotations below one module that have one block size and map, computed when the first of them is called,
    together with those of the modules after it while these are few; each used once.

    What waits is valid for the generator that it was made from, before any backward has gone through it, in the same
    thread and the same activation checkpoint. Whoever was computed in vain is left to himself, once the generators have
    been trained.
    """

    def __init__(self, members: Iterable[Any]) -> None:
        self.members = {id(member): member for member in members}
        self.after: SharedMap | None = None  # of the module after this one
        self._size = sum(len(one.weight) * one.block_size**2 for one in self.members.values())
        self._waiting: dict[int, _Waiting] = {}
        self._opened: _Moment | None = None  # when a call computed the last ones, and whose
        self._refused: _Moment | None = None  # when a member first had no use for what those before computed

    def matrix(self, rotation: Any, dtype: torch.dtype) -> Tensor:
        """R of one member, (n or 1, b, b) in `dtype`; differentiable. Only for one that can be shared."""
        waiting = self._waiting.pop(id(rotation), None)
        if waiting is not None:
            if waiting.serves(rotation, dtype):
                found: Tensor = waiting.matrix
                return found
            if waiting.by is not self and self._refused is None:
                self._refused = _Moment.of(rotation)
        return self._compute(rotation, dtype)

    def _compute(self, rotation: Any, dtype: torch.dtype) -> Tensor:
        """R of one member; those of the others wait. Another thread may do the same meanwhile."""
        self._leave_out_idle(rotation)
        company = self._company(rotation)
        together = {
            id(one): (one, shared)
            for shared in company
            for one in list(shared.members.values())
            if one is rotation or _are_alike(one, rotation)
        }
        generators, size = [one.weight for one, _ in together.values()], rotation.block_size
        found = functional.rotations_of(generators, size, rotation.terms, dtype, whole=True)
        matrices = dict(zip(together, found, strict=True))
        mine = matrices.pop(id(rotation))
        for key, matrix in matrices.items():
            one, shared = together[key]
            snapshot = functional.Snapshot(one.weight, briefly=True)
            shared._waiting[key] = _Waiting(_key(one, dtype), matrix, self, snapshot)
        return mine

    def _company(self, rotation: Any) -> "list[SharedMap]":
        """This one and those after it with which it is computed."""
        most = _TOGETHER.get(rotation.weight.device.type, 0)
        company, size, after = [self], self._size, self.after
        while after is not None and size + after._size < most and not (after._refused and after._refused.is_past()):
            company.append(after)
            size, after = size + after._size, after.after
        return company

    def _leave_out_idle(self, rotation: Any) -> None:
        """Let go of what still waits for being called since this rotation computed it the last time."""
        opened = self._opened
        if opened is not None and opened.rotation is rotation:
            if not opened.is_past():
                return
            for shared in self._company(rotation):
                idle = [key for key, waiting in list(shared._waiting.items()) if waiting.by is self]
                if shared is not self and len(idle) == len(shared.members):
                    shared._refused = shared._refused or opened
                    continue
                for key in idle:
                    if (member := shared.members.pop(key, None)) is not None:
                        member.shared = None
                    shared._waiting.pop(key, None)
        self._opened = _Moment.of(rotation)


def _key(rotation: Any, dtype: torch.dtype) -> tuple[Any, ...]:
    weight = rotation.weight
    hooks: Any = torch._C._autograd._top_saved_tensors_default_hooks(True)  # an activation checkpoint has its own
    stamp = (dtype, rotation.terms, id(weight), weight._version, *functional.optimizer_steps(), threading.get_ident())
    return (*stamp, None if hooks is None else _loosely(hooks[0]))


def _loosely(hook: Any) -> Any:
    """What equals itself alone, without keeping alive what a hook knows where Python can do that."""
    try:
        return weakref.ref(hook)
    except TypeError:
        return hook


def _are_alike(one: Any, other: Any) -> bool:
    same = one.training == other.training and one.terms == other.terms and one.weight.device == other.weight.device
    return same and _can_share(one)


def is_plain(rotation: Any) -> bool:
    """Whether the generator is whole, plain and trained, so that a backward can read it, and its map has a kernel."""
    weight = rotation.weight
    return (
        type(weight) is nn.Parameter
        and weight.dtype == torch.float32
        and not weight.is_meta
        and weight.requires_grad
        and not weight.is_inference()
        and functional.has_kernel(rotation.terms, rotation.halve_last)
    )


def _can_share(rotation: Any) -> bool:
    """Whether R may be computed with others' now."""
    return is_plain(rotation) and not _is_heard(rotation.weight)


def _is_heard(weight: Any) -> bool:
    """Whether somebody is called when the gradient is there, who would be called in each backward of the others too."""
    return bool(weight._backward_hooks or weight._post_accumulate_grad_hooks)


def recorded_matrix(rotation: Any, dtype: torch.dtype) -> Tensor:
    """R of a rotation that `is_plain`, (n or 1, b, b) in `dtype`, where gradients are recorded; differentiable."""
    if rotation.shared is not None and not _is_heard(rotation.weight):
        found: Tensor = rotation.shared.matrix(rotation, dtype)
        return found
    return functional.rotations_of([rotation.weight], rotation.block_size, rotation.terms, dtype, whole=True)[0]


def share_maps(rotations: Iterable[tuple[Any, Any, Any]]) -> None:
    """Let rotations of one block size share their map. Takes (series, module, rotation): those of one module share it, and
    those of the modules of a series, which stand in the order in which they are called."""
    _keep_freed_memory()
    found: dict[Any, dict[Any, list[Any]]] = {}
    for series, module, rotation in rotations:
        modules = found.setdefault((series, rotation.block_size, rotation.halve_last), {})
        modules.setdefault(module, []).append(rotation)
    for modules in found.values():
        maps = [SharedMap(members) for members in modules.values()]
        for one, after in itertools.pairwise(maps):
            one.after = after
        for one in maps:
            for member in one.members.values():
                member.shared = one if len(maps) > 1 or len(one.members) > 1 else None


@functools.cache
def _keep_freed_memory() -> None:
    """Let glibc's malloc keep what a step frees. It learns from the largest block that was freed so far how much to give
    back to the kernel; if that is a matrix of a map, each step asks the kernel for a thousand pages anew (measured). Up
    to 64 MiB more stay with the process so. Who has set malloc himself, by MALLOC_ variables, has it as he set it."""
    torch.empty(_LEARNT_FROM, dtype=torch.uint8, device="cpu")


class Cached(functional.Snapshot):
    """R of a rotation, and what it was made from."""

    __slots__ = ("_dtype", "_is_inference", "_size", "_weight", "matrix")

    def __init__(self, rotation: Any, matrix: Tensor) -> None:
        weight = rotation.weight
        super().__init__(weight)
        self.matrix: Tensor | None = matrix
        self._dtype, self._is_inference = matrix.dtype, matrix.is_inference()
        self._weight, self._size = weight, weight.numel()  # and not the rotation, which keeps this: cycles keep memory

    def forget(self) -> None:
        """Serve nobody any more, whoever has it, and keep no memory."""
        self._address = self._copy = self._memory = self.matrix = None

    def serves(self, weight: Any, dtype: torch.dtype) -> bool:
        """Whether R is of this generator as it is now, and can be used in this mode. Read `matrix` before: another
        thread may let it be forgotten."""
        return (
            weight is self._weight
            and dtype is self._dtype
            and type(weight) is nn.Parameter
            and weight.numel() == self._size
            # A tensor made in inference mode cannot be used where gradients are recorded later.
            and (not self._is_inference or torch.is_inference_mode_enabled())
            and self.is_of(weight)
        )


class NextToken:
    """Rotates single vectors, of the next token of a generation, by the R of the only rotation that a layer applies.

    From one layer to the next the caches have lost what Python reads, and the look-ups of a token cost as much as its
    product. So whatever must be as it was lies here, each a step away, and all is asked in one function, even what
    `Cached.serves` and `is_traced` ask too. The layer's state keeps this, and forgets it when what is applied changes.
    """

    __slots__ = ("_adapters", "_cached", "_dropout", "_dtype", "_entries", "_fan", "_hooks", "_modules", "_name", "_number",
                 "_parameters", "_pre_hooks", "_rotation", "_rows", "_size", "_weight")  # fmt: skip

    def __init__(self, layer: nn.Module, adapter_name: str, rotation: Any, cached: Cached) -> None:
        """For a rotation whose blocks are not shared, and its R."""
        adapters: Any = layer._modules["oft_R"]
        self._modules, self._adapters, self._entries = layer._modules, adapters, adapters._modules
        self._name, self._rotation = adapter_name, rotation
        self._parameters, self._dropout = rotation._parameters, rotation.dropout
        self._hooks, self._pre_hooks = rotation._forward_hooks, rotation._forward_pre_hooks
        self._cached, self._weight = cached, cached._weight
        self._size, self._dtype, self._number = cached._size, cached._dtype, cached._weight.get_device()
        self._fan, self._rows = rotation.fan_in, (rotation.blocks, 1, rotation.block_size)

    def vector(self, layer: nn.Module, x: Tensor) -> Tensor | None:
        """x . blockdiag(R) without gradients; None where x is no such vector, R does not serve, or that is not all there
        is to do. A shallow copy of the layer has the same state, and may have other rotations."""
        cached, weight, modules = self._cached, self._weight, self._modules
        matrix, rotation = cached.matrix, self._rotation
        if (
            matrix is None
            or type(x) is not Tensor
            or x.numel() != self._fan
            or is_grad_enabled()
            or x.dtype is not self._dtype
            or x.get_device() != self._number  # what hooks of accelerate's on the rotation would move
            or layer._modules is not modules
            or modules.get("oft_R") is not self._adapters
            or self._entries.get(self._name) is not rotation
            or self._parameters.get("weight") is not weight
            or weight.numel() != self._size
            or address(weight) != cached._address
            or (type(cached._copy) is not Tensor and not cached.is_of(weight))
            or self._hooks
            or self._pre_hooks
            or (self._dropout and rotation.training)
            or _is_any_autocast_enabled()
            or _get_tracing_state() is not None
        ):
            return None
        return bmm(x.view(self._rows), matrix).view_as(x)
