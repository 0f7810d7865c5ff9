"""Tensors that a process holds only a part of (DTensor: FSDP2 and tensor parallel), worked on part by part.

A rotation turns each row of a weight by itself, so a process folds the rows it owns and needs nothing but the
generators of that one layer from the others. Where a weight is cut along the fan-in, its rows are exchanged for
columns first (one all-to-all), and no process ever holds a whole weight.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

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
def by_rows(weight: Tensor, row_dim: int, change: Callable[[Tensor], Tensor]) -> Tensor:
    """Apply a row-wise change to a weight; returns what this process holds of the result.

    Args:
        weight: the weight, sharded or not.
        row_dim: the dimension that counts rows: of a linear layer 0, of transformers' Conv1D 1.
        change: from some rows to the same rows, changed.
    """
    if not is_sharded(weight):
        return change(weight.data)
    from torch.distributed.tensor import DTensor, Shard

    sharded: Any = weight.detach()
    along_rows = [Shard(row_dim) if place.is_shard() else place for place in sharded.placements]
    rows = sharded.redistribute(placements=along_rows)
    changed = DTensor.from_local(
        change(rows.to_local()), rows.device_mesh, rows.placements, shape=rows.shape, stride=rows.stride()
    )
    back: Tensor = changed.redistribute(placements=sharded.placements).to_local()
    return back


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
