"""Tensors of which a process holds a part (DTensor: FSDP2 and tensor parallel), worked on part by part.

A change works row by row, so a process changes the rows that it owns; of a weight that is cut along its columns, the
blocks that it owns, and where the cut goes through a block the weight is cut along its rows first. No process holds a
whole weight for it, where the backend has an all-to-all (gloo on CPUs has none).
"""

import functools
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from typing_extensions import override

from lightning_oft.codecs.base import Change, Codec, parameter_of, register_codec


def is_sharded(tensor: Tensor) -> bool:
    """Whether this is a DTensor; asked without importing torch.distributed."""
    return hasattr(tensor, "to_local")


def is_scattered(tensor: Tensor) -> bool:
    """Whether a process holds a part of this only: a DTensor, or the view of an FSDP1 unit's flat parameter."""
    return is_sharded(tensor) or hasattr(tensor, "_fsdp_flattened")


def whole(tensor: Tensor) -> Tensor:
    """The whole of a tensor; a collective call where it is sharded. For generators, never for base weights."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def local_part(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor, sharing its memory."""
    return tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def cut_like(values: Tensor, tensor: Tensor) -> Tensor:
    """What this process holds of whole values that are cut as a tensor is."""
    if not is_sharded(tensor) or is_sharded(values):
        return local_part(values)
    from torch.distributed.tensor import distribute_tensor

    model: Any = tensor
    return local_part(distribute_tensor(values.to(tensor.device), model.device_mesh, model.placements))


def reshard(modules: Iterable[Any]) -> None:
    """Give back what FSDP2 has gathered for a forward and kept, so that parameters are shards again."""
    for module in modules:
        if hasattr(module, "reshard") and hasattr(module, "unshard"):
            module.reshard()


class DTensorCodec(Codec):
    """A parameter that is a DTensor of floating-point numbers."""

    @override
    def matches(self, module: nn.Module, parameter: str) -> bool:
        weight = parameter_of(module, parameter)
        return weight is not None and is_sharded(weight) and type(local_part(weight.data)) is Tensor

    @override
    def read(self, module: nn.Module, parameter: str) -> Tensor:
        return local_part(module.get_parameter(parameter).detach())

    @override
    def write(self, module: nn.Module, parameter: str, values: Tensor) -> None:
        self.read(module, parameter).copy_(values)

    @override
    def changed(self, module: nn.Module, parameter: str, row_dim: int, step: int, change: Change) -> Tensor:
        from torch.distributed.tensor import DTensor, Replicate, Shard

        weight: Any = module.get_parameter(parameter).detach()
        mine, mesh = weight.to_local(), weight.device_mesh
        across = [dim for dim, place in enumerate(weight.placements) if getattr(place, "dim", row_dim) != row_dim]
        columns: slice | None = slice(None)

        def cut(whole: Tensor, placements: Any = weight.placements) -> Tensor:
            by_rows = [place if getattr(place, "dim", None) == row_dim else Replicate() for place in placements]
            everywhere = DTensor.from_local(whole, mesh, [Replicate()] * mesh.ndim, run_check=False)
            own: Tensor = everywhere.redistribute(placements=by_rows).to_local()
            return own

        if across:  # whole blocks, where every cut along the fan-in is between blocks of `step`
            parts, size = mesh.size(across[0]), weight.shape[weight.placements[across[0]].dim]
            width = -(-size // parts)  # torch cuts into equal parts; the last ones may be smaller or empty
            first = mesh.get_local_rank(across[0]) * width
            is_whole = len(across) == 1 and weight.dim() == 2 and width % step == 0
            columns = slice(first, min(first + width, size)) if is_whole else None
        if columns is not None:
            return change(mine, columns, cut) if mine.numel() else mine
        by_rows = [Shard(row_dim) if dim in across else place for dim, place in enumerate(weight.placements)]
        rows = weight.redistribute(placements=by_rows)
        local, like = rows.to_local(), {"shape": rows.shape, "stride": rows.stride()}
        changed = change(local, slice(None), functools.partial(cut, placements=by_rows)) if local.numel() else local
        del rows, local  # so as not to hold them while the changed rows are traded for columns
        again = DTensor.from_local(changed, mesh, by_rows, run_check=False, **like)
        return again.redistribute(placements=weight.placements).to_local()


register_codec(DTensorCodec())
