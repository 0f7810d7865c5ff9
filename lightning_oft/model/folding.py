"""One rotated weight of one layer: its rotations folded in, and taken out again."""

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lightning_oft.codecs import Codec, codec_of, is_sharded, parameter_of
from lightning_oft.layers.base import RotatedWeight
from lightning_oft.layers.rotation import Rotation
from lightning_oft.layers.state import LayerState, rotations_of
from lightning_oft.model.fingerprint import fingerprint

PIECE = 2**24
"""Entries of a weight that are folded at a time: an embedding of gigabytes needs no float32 copy of all of it."""

Device = torch.device | str | None


class FoldedWeight(NamedTuple):
    """One weight of a layer, how it is stored, and the active rotations that turn it, in order."""

    layer: nn.Module
    state: LayerState
    name: str
    part: RotatedWeight
    codec: Codec
    rotations: list[Rotation]

    def read(self) -> Tensor:
        """What this process holds of the weight."""
        return self.codec.read(self.layer, self.name)

    def fingerprint(self) -> str | None:
        """The fingerprint of the weight as it is now; None where it is sharded."""
        parameter = parameter_of(self.layer, self.name)
        return fingerprint(self.read() if parameter is None else parameter)

    def turned(self, turn: Callable[..., Tensor], device: Device = None) -> Tensor:
        """What this process stores of the weight after the layer type's fold or unfold; computed in pieces."""
        home = self.read().device
        where = torch.device(device) if device is not None else home
        matrices = [rotation.matrix().to(where) for rotation in self.rotations]
        row_dim = self.state.layer_type.row_dim

        def change(rows: Tensor, columns: slice) -> Tensor:
            own = [_within(matrix, columns) for matrix in matrices]
            count = max(1, PIECE * rows.shape[row_dim] // max(1, rows.numel()))
            pieces = rows.split(count, row_dim)  # type: ignore[no-untyped-call]
            results = [turn(self.layer, self.part, piece.to(where), own).to(home) for piece in pieces]
            return results[0] if len(results) == 1 else torch.cat(results, row_dim)

        step = math.lcm(*(matrix.shape[-1] for matrix in matrices))
        return self.codec.changed(self.layer, self.name, row_dim, step, change)

    def merge(self, keep: bool, device: Device, shared: set[int]) -> None:
        """Fold the rotations in. A parameter that other modules share is left to them, and this layer gets its own."""
        folded = self.turned(self.state.layer_type.fold, device)
        parameter = parameter_of(self.layer, self.name)
        self._check_overflow(folded, parameter)
        if parameter is not None and id(parameter) in shared:
            self.state.base[self.name] = parameter
            _set_parameter(self.layer, self.name, nn.Parameter(folded, requires_grad=False))
        else:
            self.state.base[self.name] = self.codec.keep(self.layer, self.name) if keep else None
            self.codec.write(self.layer, self.name, folded)
        self.state.merged_fingerprints[self.name] = self.fingerprint()

    def _check_overflow(self, folded: Tensor, parameter: nn.Parameter | None) -> None:
        if parameter is not None and is_sharded(parameter):  # one process that raised would leave the others waiting
            return
        if not bool(folded.isfinite().all()) and bool(self.read().isfinite().all()):
            raise ValueError(
                f"cannot merge: the merged {self.name} overflows {folded.dtype}; nothing was changed: "
                "load an earlier state of the adapter, or merge in float32"
            )

    def unmerge(self) -> None:
        """Give the layer its base weight back, if `merge` got as far as this one."""
        if self.name not in self.state.base:
            return
        base = self.state.base[self.name]
        if isinstance(base, nn.Parameter):  # a tied weight: the layer goes back to sharing it
            base.data = base.data.to(self.read().device)
            _set_parameter(self.layer, self.name, base)
        elif base is not None:
            self.codec.restore(self.layer, self.name, base)
        else:
            self.codec.write(self.layer, self.name, self.turned(self.state.layer_type.unfold))


def folded_weights(layer: nn.Module, state: LayerState) -> Iterator[FoldedWeight]:
    """The weights of a layer that its active adapters rotate."""
    by_adapter = [rotations_of(layer, name) for name in state.active]
    for name, part in state.layer_type.rotated_weights(layer).items():
        rotations = [found[name] for found in by_adapter if name in found]
        codec = codec_of(layer, part.parameter)
        if rotations and codec is not None:
            yield FoldedWeight(layer, state, part.parameter, part, codec, rotations)


def _within(matrix: Tensor, columns: slice) -> Tensor:
    """The blocks of a rotation, (n or 1, b, b), that turn these columns."""
    if columns == slice(None) or matrix.shape[0] == 1:
        return matrix
    return matrix[columns.start // matrix.shape[-1] : columns.stop // matrix.shape[-1]]


def _set_parameter(layer: nn.Module, name: str, parameter: nn.Parameter) -> None:
    owner, _, key = name.rpartition(".")
    layer.get_submodule(owner)._parameters[key] = parameter
