"""Tensors that a process holds only a part of (DTensor: FSDP2 and tensor parallel), worked on part by part.

A rotation turns each row of a weight by itself, so a process folds the rows it owns and needs nothing but the
generators of that one layer from the others. Where a weight is cut along the fan-in, a process folds the blocks it owns,
and where the cut goes through a block, columns are traded for rows first. No process ever holds a whole weight.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


def is_sharded(tensor: Tensor) -> bool:
    """Whether this is a DTensor; asked without importing torch.distributed."""
    return hasattr(tensor, "to_local")


def is_part(tensor: Tensor) -> bool:
    """Whether the tensor's memory belongs to shards, and values must be written into it: a DTensor, or a view of an
    FSDP1 unit's flat parameter."""
    return is_sharded(tensor) or getattr(tensor, "_fsdp_flattened", False)


def whole(tensor: Tensor) -> Tensor:
    """The whole of a tensor; a collective call where it is sharded. For generators, never for base weights."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def part(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor, sharing its memory."""
    return tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


@torch.no_grad()
def by_rows(weight: Tensor, row_dim: int, step: int, change: Callable[[Tensor, slice], Tensor]) -> Tensor:
    """Apply a row-wise change to a weight; returns what this process holds of the result.

    Args:
        weight: the weight, sharded or not.
        row_dim: the dimension that counts rows: of a linear layer 0, of transformers' Conv1D 1.
        step: how many columns of a matrix must stay together; a multiple of every block size.
        change: from some rows, and the columns that they are cut to, to the same, changed.
    """
    everything = slice(None)
    if not is_sharded(weight):
        return change(weight.data, everything)
    sharded: Any = weight.detach()
    mine: Tensor = sharded.to_local()
    across = [dim for dim, place in enumerate(sharded.placements) if getattr(place, "dim", row_dim) != row_dim]
    if len(across) > 1:
        raise ValueError(f"a weight cut twice along its fan-in ({sharded.placements}) cannot be merged")
    columns = everything if not across else _own_columns(sharded, row_dim, across[0], step)
    if columns is not None:
        return change(mine, columns) if mine.numel() else mine
    column_dim = sharded.placements[across[0]].dim
    widths = _chunks(sharded.shape[column_dim], sharded.device_mesh.size(across[0]))
    exchange = _Exchange(sharded.device_mesh, across[0], row_dim, column_dim, widths)
    rows = exchange.to_rows(mine)
    return exchange.to_columns(change(rows, everything) if rows.numel() else rows, mine.shape[row_dim])


class _Exchange(NamedTuple):
    """Trades, within one dimension of a mesh, pieces of the columns of all rows for all columns of some rows."""

    mesh: Any
    mesh_dim: int
    row_dim: int
    column_dim: int
    widths: list[int]

    def to_rows(self, mine: Tensor) -> Tensor:
        heights = _chunks(mine.shape[self.row_dim], len(self.widths))
        height = heights[self.mesh.get_local_rank(self.mesh_dim)]
        shapes = [self._shape(mine, height, width) for width in self.widths]
        return torch.cat(self._trade(mine.split_with_sizes(heights, self.row_dim), shapes), self.column_dim)

    def to_columns(self, rows: Tensor, height: int) -> Tensor:
        width = self.widths[self.mesh.get_local_rank(self.mesh_dim)]
        shapes = [self._shape(rows, own, width) for own in _chunks(height, len(self.widths))]
        return torch.cat(self._trade(rows.split_with_sizes(self.widths, self.column_dim), shapes), self.row_dim)

    def _shape(self, like: Tensor, height: int, width: int) -> list[int]:
        shape = list(like.shape)
        shape[self.row_dim], shape[self.column_dim] = height, width
        return shape

    def _trade(self, pieces: Sequence[Tensor], shapes: list[list[int]]) -> list[Tensor]:
        sizes = [math.prod(shape) for shape in shapes]
        sent = torch.cat([piece.reshape(-1) for piece in pieces])
        received = sent.new_empty(sum(sizes))
        torch.distributed.all_to_all_single(
            received, sent, sizes, [piece.numel() for piece in pieces], self.mesh.get_group(self.mesh_dim)
        )
        return [flat.view(shape) for flat, shape in zip(received.split_with_sizes(sizes), shapes, strict=True)]


def _chunks(size: int, parts: int) -> list[int]:
    """The sizes of the parts that torch cuts a dimension into; the last ones may be smaller or empty."""
    each = -(-size // parts)
    return [max(0, min(each, size - part * each)) for part in range(parts)]


def _own_columns(sharded: Any, row_dim: int, across: int, step: int) -> slice | None:
    """The columns of a matrix that this process holds, or None where a cut goes through a block."""
    size = -(-sharded.shape[1 - row_dim] // sharded.device_mesh.size(across)) if sharded.dim() == 2 else 1
    first = sharded.device_mesh.get_local_rank(across) * size
    return slice(first, first + size) if size % step == 0 else None


@torch.no_grad()
def write(tensor: Tensor, values: Tensor) -> None:
    """Put what this process holds of new values into a tensor: by exchange of `.data`, or in place where it is a part."""
    if is_part(tensor):
        part(tensor).copy_(values)
    else:
        tensor.data = values


def cut_like(values: Tensor, tensor: Tensor) -> Tensor:
    """What this process holds of whole values that are cut as a tensor is."""
    if not is_sharded(tensor) or is_sharded(values):
        return part(values)
    from torch.distributed.tensor import distribute_tensor

    model: Any = tensor
    return part(distribute_tensor(values.to(tensor.device), model.device_mesh, model.placements))


def gather_back(model: nn.Module) -> None:
    """Return to shards what FSDP2 has gathered for a forward and kept, so that parameters are shards again."""
    module: Any
    for module in model.modules():
        if hasattr(module, "reshard") and hasattr(module, "unshard"):
            module.reshard()
