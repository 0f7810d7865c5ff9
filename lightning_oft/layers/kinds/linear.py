"""Layers whose input or output is rotated by a hook: linear layers, transformers' Conv1D, embeddings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from typing_extensions import override

from lightning_oft.layers.state import applied_rotations

from .base import Kind, Part, add_hook, drop_hook

_INPUT_NAMES = ("input", "x", "hidden_states")


def _rotate_input(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    rotations = applied_rotations(layer, "")
    if not rotations:
        return None
    name = "" if args else next((key for key in _INPUT_NAMES if key in kwargs), None)
    if name is None:
        raise TypeError(f"{type(layer).__name__} called with {sorted(kwargs)}: pass its input as the first argument")
    x = args[0] if args else kwargs[name]
    for rotation in rotations:
        x = rotation(x)
    return ((x, *args[1:]), kwargs) if args else (args, {**kwargs, name: x})


class LinearLike(Kind):
    """nn.Linear and whatever computes like it: the input is rotated, and the layer called as it is."""

    name = "linear"

    @override
    def parts(self, layer: nn.Module) -> dict[str, Part]:
        return {"": Part("weight", int(layer.in_features))}  # type: ignore[arg-type]

    @override
    def attach(self, layer: nn.Module) -> None:
        add_hook(layer._forward_pre_hooks, layer.register_forward_pre_hook, _rotate_input, with_kwargs=True)

    @override
    def detach(self, layer: nn.Module) -> None:
        drop_hook(layer, _rotate_input)


class TransposedLinear(LinearLike):
    """transformers' Conv1D, a linear layer that stores its weight as (i, o)."""

    name = "Conv1D"
    row_dim = 1

    @override
    def parts(self, layer: nn.Module) -> dict[str, Part]:
        return {"": Part("weight", int(layer.weight.shape[0]))}  # type: ignore[index]

    @override
    def to_matrix(self, layer: nn.Module, weight: Tensor) -> Tensor:
        return weight.t()

    @override
    def from_matrix(self, layer: nn.Module, matrix: Tensor, weight: Tensor) -> Tensor:
        return matrix.t().contiguous()


def _rotate_output(layer: nn.Module, args: Any, output: Tensor) -> Tensor:
    for rotation in applied_rotations(layer, ""):
        output = rotation(output)
    return output


class Embedding(Kind):
    """nn.Embedding: the vectors looked up are rotated, E' = E . blockdiag(R)."""

    name = "embedding"
    file_key = "oft_embedding_R"

    @override
    def parts(self, layer: nn.Module) -> dict[str, Part]:
        return {"": Part("weight", int(layer.embedding_dim))}  # type: ignore[arg-type]

    @override
    def attach(self, layer: nn.Module) -> None:
        # First of all: a hook that was there before sees the vectors that a merged layer would give it.
        add_hook(layer._forward_hooks, layer.register_forward_hook, _rotate_output, prepend=True)

    @override
    def detach(self, layer: nn.Module) -> None:
        drop_hook(layer, _rotate_output)

    @override
    def factors(self, matrices: Sequence[Tensor]) -> list[Tensor]:
        return [matrix.mT for matrix in matrices]


LINEAR, CONV1D, EMBEDDING = LinearLike(), TransposedLinear(), Embedding()
