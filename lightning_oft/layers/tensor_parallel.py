"""Rotations of activations that tensor parallelism has spread over processes (DTensors).

Each process rotates what it holds: whole rows, or the blocks of the columns that are its own. Generators stay whole on
every process, so gradients of parts are added up and all processes take the same step. Shapes: (..., n*b).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor


class Cut(NamedTuple):
    """What a process rotates: its blocks, and the mesh dimensions over which generator gradients add up."""

    blocks: slice
    mesh: Any
    adds: tuple[int, ...]

    def of(self, per_block: Tensor) -> Tensor:
        """The entries of this process's blocks; all of them where one entry stands for every block."""
        return per_block if per_block.shape[0] == 1 else per_block[self.blocks]

    def generators(self, generator: Tensor) -> Tensor:
        """The generators of this process's blocks, whose gradients are those of all processes."""
        from torch.distributed.tensor import DTensor, Partial, Replicate

        whole = [Replicate()] * self.mesh.ndim
        parts = [Partial() if dim in self.adds else Replicate() for dim in range(self.mesh.ndim)]
        shared = DTensor.from_local(generator, self.mesh, whole, run_check=False)
        return self.of(shared.to_local(grad_placements=parts))


def rotate_spread(fan_in: int, block_size: int, rotate_local: Callable[[Tensor, Cut], Tensor], x: Any) -> Tensor:
    """The rotation of a DTensor, (..., n*b), spread as it was; `rotate_local` rotates what this process holds of it.
    Partial sums are added up first. Raises ValueError where the last dimension is cut inside a block."""
    from torch.distributed.tensor import DTensor, Replicate

    whole = [Replicate() if place.is_partial() else place for place in x.placements]
    if list(x.placements) != whole:
        x = x.redistribute(placements=whole)
    local, mesh, blocks = x.to_local(), x.device_mesh, slice(None)
    adds = tuple(dim for dim, place in enumerate(x.placements) if not place.is_replicate())
    across = [dim for dim in adds if getattr(x.placements[dim], "dim", None) in (x.dim() - 1, -1)]
    if across:
        parts, count = mesh.size(across[0]), local.shape[-1] // block_size
        if len(across) > 1 or fan_in != x.shape[-1] or not divides(block_size, parts, fan_in):
            raise ValueError(cut_inside(fan_in, parts, block_size))
        first = mesh.get_local_rank(across[0]) * count
        blocks = slice(first, first + count)
    rotated = rotate_local(local, Cut(blocks, mesh, adds))
    result: Tensor = DTensor.from_local(rotated, mesh, x.placements, run_check=False, shape=x.shape, stride=x.stride())
    return result


def gathered(parameter: Any) -> Tensor:
    """A parameter; gathered where it is a DTensor, as outside the FSDP2 unit that gathers it."""
    whole: Tensor = parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter
    return whole


def local_part(parameter: Any) -> Tensor:
    """What this process holds of a parameter, sharing its memory."""
    values: Tensor = parameter.detach()
    return values.to_local() if hasattr(values, "to_local") else values


def spread_like(values: Tensor, x: Any) -> Tensor:
    """Values that all processes have, as what meets a tensor that may be a DTensor; their gradients add up."""
    if not hasattr(x, "device_mesh"):
        return values
    from torch.distributed.tensor import DTensor, Replicate

    return DTensor.from_local(values, x.device_mesh, [Replicate()] * x.device_mesh.ndim, run_check=False)


def divides(block_size: int, parts: int, fan_in: int) -> bool:
    """Whether blocks stay whole when a fan-in is cut into equal parts."""
    return fan_in % (parts * block_size) == 0


def cut_inside(fan_in: int, parts: int, block_size: int) -> str:
    """The message for a cut that goes through a block."""
    cut = f"tensor parallelism cuts {fan_in} features into {parts} parts"
    remedy = f"take an oft_block_size that divides {fan_in // parts}, or leave the layer out with exclude_modules"
    return f"{cut}, which blocks of {block_size} do not divide: {remedy}"
