"""One rotated weight of one layer: its rotations folded in, and taken out again."""

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from lightning_oft import functional
from lightning_oft.codecs import Codec, codec_of, is_sharded, parameter_of
from lightning_oft.layers import LayerState, RotatedWeight, Rotation, rotations_of
from lightning_oft.model.fingerprint import weight_fingerprint
from lightning_oft.model.traversal import adapted

CPU_PIECE, PIECE = 2**19, 2**24
"""Entries of a weight that are folded at a time: what a core's cache holds, and what fills a GPU without a float32 copy
of all of a large weight."""

Device = torch.device | str | None
Keep = Literal["host", "here"] | None
"""Where a merge keeps the base: on the CPU, on the weight's own device, or nowhere."""


class FoldedWeight(NamedTuple):
    """One weight of a layer, how it is stored, and the active rotations that turn it, in order."""

    layer: nn.Module
    state: LayerState
    part: RotatedWeight
    codec: Codec
    rotations: list[Rotation]

    def read(self) -> Tensor:
        """What this process holds of the weight."""
        return self.codec.read(self.layer, self.part.parameter)

    def fingerprint(self) -> str | None:
        """The fingerprint of the weight as it is now; None where it is sharded."""
        return weight_fingerprint(self.layer, self.part.parameter)

    def folded(self, device: Device = None, undo: bool = False, dtype: torch.dtype | None = None) -> Tensor:
        """What this process stores of the weight after the layer type's fold, or its undoing; in memory of its own, as
        others may hold the weight. In the weight's dtype by default."""
        weight = self.read()
        where = torch.device(device) if device is not None else weight.device
        matrices = [rotation.matrix() for rotation in self.rotations]
        if undo:
            matrices = [functional.inverse(matrix) for matrix in reversed(matrices)]
        exact = torch.promote_types(weight.dtype, torch.float32)
        matrices = [matrix.to(where, exact) for matrix in matrices]
        layer_type, entries = self.state.layer_type, CPU_PIECE if where.type == "cpu" else PIECE

        def change(rows: Tensor, columns: slice) -> Tensor:
            own = matrices
            if columns != slice(None):  # the blocks of these columns; a shared block turns all of them
                cuts = [slice(columns.start // m.shape[-1], columns.stop // m.shape[-1]) for m in matrices]
                own = [m if m.shape[0] == 1 else m[cut] for m, cut in zip(matrices, cuts, strict=True)]
            result = torch.empty_like(rows, dtype=dtype)
            count = max(1, entries * rows.shape[layer_type.row_dim] // max(1, rows.numel()))
            pieces = (whole.split(count, layer_type.row_dim) for whole in (rows, result))  # type: ignore[no-untyped-call]
            for piece, place in zip(*pieces, strict=True):
                layer_type.fold(self.layer, self.part, piece.to(where), own, place)
            return result

        step = math.lcm(*(matrix.shape[-1] for matrix in matrices))
        return self.codec.changed(self.layer, self.part.parameter, layer_type.row_dim, step, change)

    def merge(self, keep: Keep, device: Device, holders: Counter[int]) -> float:
        """Fold the rotations in, and return how far outputs are off by what quantizing has lost, relative to them. A
        parameter that other modules share is left to them."""
        name, folded = self.part.parameter, self.folded(device)
        parameter = parameter_of(self.layer, name)
        # Not of a sharded weight: one process that raised would leave the others waiting.
        is_whole = parameter is None or not is_sharded(parameter)
        if is_whole and not is_finite(folded) and is_finite(self.read()):
            what = f"cannot merge: the merged {name} overflows {folded.dtype}; nothing was changed"
            raise ValueError(f"{what}: load an earlier state of the adapter, or merge in float32")
        if parameter is not None and holders[id(parameter)] > 1 and self.codec.is_exact:
            self.state.base[name] = parameter
            self._set_parameter(nn.Parameter(folded, requires_grad=False))
        else:
            place = "cpu" if keep == "host" else folded.device
            self.state.base[name] = None if keep is None else self.codec.keep(self.layer, name, place)
            self.codec.write(self.layer, name, folded)
        assert self.state.merged is not None  # a layer is merged before its weights are
        self.state.merged[name] = self.fingerprint()
        return 0.0 if self.codec.is_exact else output_error(self.read(), folded)

    def unmerge(self) -> None:
        """Give the layer its base weight back, if `merge` got as far as this one."""
        name = self.part.parameter
        if name not in self.state.base:
            return
        base = self.state.base[name]
        if isinstance(base, nn.Parameter):  # a tied weight: the layer goes back to sharing it
            base.data = base.data.to(self.read().device)
            self._set_parameter(base)
        elif base is not None:
            self.codec.restore(self.layer, name, base)
        else:
            self.codec.write(self.layer, name, self.folded(undo=True))

    def _set_parameter(self, parameter: nn.Parameter) -> None:
        owner, _, key = self.part.parameter.rpartition(".")
        self.layer.get_submodule(owner)._parameters[key] = parameter


def folded_weights(layer: nn.Module, state: LayerState) -> Iterator[FoldedWeight]:
    """The weights of a layer that its active adapters rotate."""
    by_adapter = [rotations_of(layer, name) for name in state.active]
    for name, part in state.layer_type.rotated_weights(layer).items():
        rotations = [found[name] for found in by_adapter if name in found]
        codec = codec_of(layer, part.parameter)
        if rotations and codec is not None:
            yield FoldedWeight(layer, state, part, codec, rotations)


def exact_codecs(layer: nn.Module, state: LayerState) -> dict[str, Codec] | None:
    """The codecs of a layer's rotated weights; None where one of them gives back other values than it was given."""
    parts = [part.parameter for part in state.layer_type.rotated_weights(layer).values()]
    codecs = {parameter: codec_of(layer, parameter) for parameter in parts}
    exact = {parameter: codec for parameter, codec in codecs.items() if codec is not None and codec.is_exact}
    return exact if len(exact) == len(parts) else None


def packed_layers(layers: Mapping[str, nn.Module]) -> list[str]:
    """Names of the adapted layers whose weights are quantized or packed, so that nothing can be folded into them."""
    return [name for name, layer, state in adapted(layers) if exact_codecs(layer, state) is None]


def output_error(stored_oi: Tensor, wanted_oi: Tensor) -> float:
    """How far x W^T is off, relative to its norm, where another weight is stored than is wanted; for normal x (64, i)."""
    x = torch.randn(64, wanted_oi.shape[1], generator=torch.Generator().manual_seed(0)).to(wanted_oi.device)
    wanted = x @ wanted_oi.float().mT
    return float((x @ stored_oi.to(wanted_oi.device).float().mT - wanted).norm() / wanted.norm())


def is_finite(tensor: Tensor) -> bool:
    """Whether all entries are finite. A finite sum says so in a single fast pass; where it is not, as it may be of
    large entries too, the extremes say it exactly."""
    if math.isfinite(tensor.sum()):
        return True
    return math.isfinite(tensor.amin()) and math.isfinite(tensor.amax())
