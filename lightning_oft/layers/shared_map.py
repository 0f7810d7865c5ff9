"""Rotations that are called together are computed together: one Cayley map for the layers below one module."""

import weakref
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_oft import functional


class _Waiting(NamedTuple):
    """One R that was computed with others, and what must still hold when it is asked for."""

    key: tuple[Any, ...]
    matrix: Any


class SharedMap:
    """R of several rotations of one block size and map, computed when the first of them is called, each used once.

    What waits is valid for the generator that it was made from, before any backward has gone through it, and within the
    same activation checkpoint. A member that others have computed in vain is left out from then on.
    """

    def __init__(self, members: Iterable[Any]) -> None:
        self.members = {id(member): member for member in members}
        self._waiting: dict[int, _Waiting] = {}
        self._opener: tuple[int, int] | None = None  # whose call computed the last ones, at which version

    def matrix(self, rotation: Any, dtype: torch.dtype) -> Tensor:
        """R of one member, (n or 1, b, b) in `dtype`; differentiable. Only for one that `can_share`."""
        waiting = self._waiting.pop(id(rotation), None)
        if waiting is None or waiting.key != _key(rotation, dtype) or waiting.matrix.grad_fn.is_spent:
            return self._compute(rotation, dtype)
        found: Tensor = waiting.matrix
        return found

    def _compute(self, rotation: Any, dtype: torch.dtype) -> Tensor:
        """R of one member; those of the others wait. Another thread may do the same meanwhile."""
        self._leave_out_idle(rotation)
        together = [one for one in self.members.values() if one is rotation or _are_alike(one, rotation)]
        generators, size = [one.weight for one in together], rotation.block_size
        found = functional.rotations_of(generators, size, rotation.terms, dtype, whole=True)
        matrices = dict(zip(map(id, together), found, strict=True))
        mine = matrices.pop(id(rotation))
        self._waiting |= {
            id(one): _Waiting(_key(one, dtype), matrices[id(one)]) for one in together if one is not rotation
        }
        return mine

    def _leave_out_idle(self, rotation: Any) -> None:
        """Not before the generators have changed: an activation checkpoint must find the same members once more."""
        opener = (id(rotation), rotation.weight._version)
        if self._opener is not None and self._opener[0] == opener[0] and self._opener != opener:
            for idle in list(self._waiting):
                if (member := self.members.pop(idle, None)) is not None:
                    member.shared = None
            self._waiting = {}
        self._opener = opener


def _key(rotation: Any, dtype: torch.dtype) -> tuple[Any, ...]:
    weight = rotation.weight
    hooks: Any = torch._C._autograd._top_saved_tensors_default_hooks(True)  # an activation checkpoint has its own
    stamp = (dtype, rotation.terms, id(weight), weight.data_ptr(), weight._version)
    return (*stamp, None if hooks is None else weakref.ref(hooks[0]))


def _are_alike(one: Any, other: Any) -> bool:
    same = one.training == other.training and one.terms == other.terms and one.weight.device == other.weight.device
    return same and can_share(one)


def can_share(rotation: Any) -> bool:
    """Whether R may be computed with others' now: the generator is whole, plain and trained, its map has a kernel."""
    weight = rotation.weight
    is_plain = type(weight) is nn.Parameter and weight.dtype == torch.float32 and not weight.is_meta
    return (
        is_plain
        and weight.requires_grad
        and not weight.is_inference()
        and functional.has_kernel(rotation.terms, rotation.halve_last)
    )


def share_maps(rotations: Iterable[tuple[Any, Any]]) -> None:
    """Let rotations of one group and block size share their map. Takes (group, rotation) pairs; groups are hashable."""
    groups: dict[Any, list[Any]] = {}
    for group, rotation in rotations:
        groups.setdefault((group, rotation.block_size, rotation.halve_last), []).append(rotation)
    for members in groups.values():
        shared = SharedMap(members) if len(members) > 1 else None
        for member in members:
            member.shared = shared
