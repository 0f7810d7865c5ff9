"""What every kind of layer has: rotated weights, a way to attach the rotation, and a way to fold it in.

Base parameter names and classes never change, so a plain checkpoint still loads and a merged model is a plain one.
Shapes: o fan-out, i fan-in; every weight is folded as a matrix (rows, i) whose last dimension the rotation turns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_oft import rotation as maths
from lightning_oft.layers.in_place import take_off
from lightning_oft.layers.state import applied_rotations


class Part(NamedTuple):
    """One rotated weight of a layer: its parameter, and the size of the dimension that is rotated."""

    parameter: str
    fan_in: int


class Kind:
    """A kind of arithmetic. Subclasses say which weights a layer has and how a rotation reaches them."""

    name = ""
    file_key = "oft_R"
    row_dim = 0  # the dimension of the weight whose entries are rotated each by itself

    def parts(self, layer: nn.Module) -> dict[str, Part]:
        """The rotated weights by part name; one nameless part where a layer has a single rotation."""
        raise AssertionError("every kind names its parts")

    def attach(self, layer: nn.Module) -> None:
        """Make the layer's forward rotate; once, however often it is called."""
        raise AssertionError("every kind attaches")

    def detach(self, layer: nn.Module) -> None:
        """Give the layer its own forward back."""
        take_off(layer)

    def to_matrix(self, layer: nn.Module, weight: Tensor) -> Tensor:
        """The weight as (rows, fan-in)."""
        return weight.flatten(1)

    def from_matrix(self, layer: nn.Module, matrix: Tensor, weight: Tensor) -> Tensor:
        """A matrix of to_matrix in the shape and memory format of the weight."""
        return like(matrix.view(weight.shape), weight)

    def factors(self, matrices: Sequence[Tensor]) -> list[Tensor]:
        """Rotations in the order and orientation in which `rotate_weight` applies them: y = base(x . Ra . Rb)."""
        return list(reversed(matrices))

    def fold(self, layer: nn.Module, weight: Tensor, matrices: Sequence[Tensor]) -> Tensor:
        """The weight that does alone what it did behind the rotations. Any floating dtype, computed in float32."""
        matrix = self.to_matrix(layer, weight).to(torch.promote_types(weight.dtype, torch.float32))
        for factor in self.factors(matrices):
            matrix = maths.rotate_weight(matrix, factor.to(matrix.dtype))
        return self.from_matrix(layer, matrix.to(weight.dtype), weight)

    def unfold(self, layer: nn.Module, weight: Tensor, matrices: Sequence[Tensor]) -> Tensor:
        """The inverse of fold, by solving."""
        matrix = self.to_matrix(layer, weight).to(torch.promote_types(weight.dtype, torch.float32))
        for factor in reversed(self.factors(matrices)):
            matrix = maths.unrotate_weight(matrix, factor)
        return self.from_matrix(layer, matrix.to(weight.dtype), weight)


def like(tensor: Tensor, model: Tensor) -> Tensor:
    """The tensor in the memory format of another: a channels_last convolution must not become a slow one."""
    for dims, memory_format in ((4, torch.channels_last), (5, torch.channels_last_3d)):
        if model.dim() == dims and not model.is_contiguous() and model.is_contiguous(memory_format=memory_format):
            return tensor.contiguous(memory_format=memory_format)
    return tensor.contiguous()


def rotated_weight(layer: nn.Module, kind: Kind, part: str, weight: Tensor) -> Tensor:
    """The weight as a forward uses it now; through Rotation.__call__, so that FSDP gathers what it must."""
    rotations = applied_rotations(layer, part)
    if not rotations:
        return weight
    matrix = kind.to_matrix(layer, weight)
    for rotation in reversed(rotations):
        matrix = rotation(matrix, transpose=True)
    return kind.from_matrix(layer, matrix, weight)


def add_hook(hooks: dict[int, Any], add: Callable[..., Any], hook: Callable[..., Any], **options: Any) -> None:
    """Register a hook, unless it is there."""
    if hook not in hooks.values():
        add(hook, **options)


def drop_hook(layer: nn.Module, hook: Callable[..., Any]) -> None:
    """Unregister a hook of a layer."""
    for hooks in (layer._forward_pre_hooks, layer._forward_hooks):
        for key in [key for key, value in hooks.items() if value is hook]:
            del hooks[key]
            layer._forward_pre_hooks_with_kwargs.pop(key, None)
