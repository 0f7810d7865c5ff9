"""One rotated weight of one layer: its rotations folded in, and taken out again."""

import ctypes
import functools
import math
import mmap
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from lightning_oft import functional
from lightning_oft.codecs import Codec, codec_of, is_sharded, parameter_of, whole
from lightning_oft.layers import LayerState, RotatedWeight, Rotation, rotations_of
from lightning_oft.model.fingerprint import weight_fingerprint
from lightning_oft.model.traversal import adapted

CPU_PIECE, PIECE = 2**19, 2**22
"""Entries of a weight that are folded at a time: what a core's cache holds, and what fills a GPU without two float32
copies of all of a large weight."""
LARGE_PAGE = 2**21
"""Bytes of the pages in which Linux hands out memory on request."""
_MAPPED = 2**25
"""Bytes from which on glibc's malloc gives a tensor pages of its own, whatever it has learnt."""

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
        matrices, scale = self._matrices(where, undo), self._scale(where, undo)

        def change(rows: Tensor, columns: slice, cut: Callable[[Tensor], Tensor]) -> Tensor:
            own = matrices
            if columns != slice(None):  # the blocks of these columns; a shared block turns all of them
                cuts = [slice(columns.start // m.shape[-1], columns.stop // m.shape[-1]) for m in matrices]
                own = [m if m.shape[0] == 1 else m[cut] for m, cut in zip(matrices, cuts, strict=True)]
            result = _fresh(rows, dtype or rows.dtype)
            pieces = [self._pieces(every, where) for every in (rows, result)]
            scales = self._scale_pieces(None if scale is None else cut(scale), pieces[0])
            for piece, place, factor in zip(*pieces, scales, strict=True):
                self.state.layer_type.fold(self.layer, self.part, _times(piece.to(where), factor), own, place)
            return result

        step = math.lcm(*(matrix.shape[-1] for matrix in matrices))
        return self.codec.changed(self.layer, self.part.parameter, self.state.layer_type.row_dim, step, change)

    def merge(self, keep: Keep, device: Device, holders: Counter[int]) -> float:
        """Fold the rotations in, and return how far outputs are off by what quantizing has lost, relative to them. A
        parameter that other modules share is left to them."""
        name, parameter = self.part.parameter, parameter_of(self.layer, self.part.parameter)
        is_tied = parameter is not None and holders[id(parameter)] > 1
        if keep is None and not is_tied and self._fold_in_place(device):
            self.state.base[name] = None
            return self._merged()
        folded = self.folded(device)
        # Not of a sharded weight: one process that raised would leave the others waiting.
        is_whole = parameter is None or not is_sharded(parameter)
        if is_whole and not is_finite(folded) and is_finite(self.read()):
            what = f"cannot merge: the merged {name} overflows {folded.dtype}; nothing was changed"
            raise ValueError(f"{what}: load an earlier state of the adapter, or merge in float32")
        if parameter is not None and is_tied and self.codec.is_exact:
            self.state.base[name] = parameter
            self._set_parameter(nn.Parameter(folded, requires_grad=False))
        else:
            place = "cpu" if keep == "host" else folded.device
            self.state.base[name] = None if keep is None else self.codec.keep(self.layer, name, place)
            self.codec.write(self.layer, name, folded)
        return self._merged(folded)

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
        elif not self._fold_in_place(undo=True):
            self.codec.write(self.layer, name, self.folded(undo=True))

    def _matrices(self, where: torch.device, undo: bool) -> list[Tensor]:
        """The rotations in the precision in which they are folded, or their inverses, the last one first."""
        matrices = [rotation.matrix() for rotation in self.rotations]
        if undo:
            matrices = [functional.inverse(matrix) for matrix in reversed(matrices)]
        exact = torch.promote_types(self.read().dtype, torch.float32)
        return [matrix.to(where, exact) for matrix in matrices]

    def _scale(self, where: torch.device, undo: bool) -> Tensor | None:
        """What magnitudes multiply the weight by, or its inverse, of as many dimensions; None where there are none. It
        does not matter whether that is done before or after the rotations, which turn the columns."""
        logarithms = [one.magnitude.detach() for one in self.rotations if one.magnitude is not None]
        if not logarithms:
            return None
        parameter, values = parameter_of(self.layer, self.part.parameter), self.read()
        weight = parameter if parameter is not None and is_sharded(parameter) else values  # of the whole shape
        exact = torch.promote_types(values.dtype, torch.float32)
        total = torch.stack([whole(one).to(where, exact) for one in logarithms]).sum(0)
        return self.state.layer_type.scale_of(self.layer, (-total if undo else total).exp(), weight)

    def _scale_pieces(self, scale: Tensor | None, pieces: tuple[Tensor, ...]) -> tuple[Tensor | None, ...]:
        """The scales of the rows in each of the pieces of a weight."""
        if scale is None or not pieces:
            return (None,) * len(pieces)
        row_dim = self.state.layer_type.row_dim
        return scale.split(pieces[0].shape[row_dim], row_dim)  # type: ignore[no-untyped-call, no-any-return]

    def _pieces(self, weight: Tensor, where: torch.device) -> tuple[Tensor, ...]:
        """Views of the rows of a weight that are folded at a time on a device."""
        entries, row_dim = CPU_PIECE if where.type == "cpu" else PIECE, self.state.layer_type.row_dim
        count = max(1, entries * weight.shape[row_dim] // max(1, weight.numel()))
        count -= count % 8 if count > 8 else 0  # by eights, as rotate_weight likes them best
        return weight.split(count, row_dim)  # type: ignore[no-untyped-call, no-any-return]

    def _fold_in_place(self, device: Device = None, undo: bool = False) -> bool:
        """Fold, or undo it, in the memory of the weight, and say whether that could be done: fresh memory takes longer
        to get than a fold takes. An error midway turns back what was folded, as `unmerge` would."""
        weight = self.codec.own_memory(self.layer, self.part.parameter)
        if weight is None or (device is not None and torch.device(device) != weight.device):
            return False
        matrices, scale = self._matrices(weight.device, undo), self._scale(weight.device, undo)
        if not undo and not _stays_finite(
            weight, matrices, scale
        ):  # to be told after the fold, while the base is there
            return False
        pieces, start = self._pieces(weight, weight.device), weight._version
        try:
            self._turn(pieces, matrices, scale)
        except BaseException:
            done = weight._version - start  # counted by torch with each piece: no interrupt comes in between
            back = self._matrices(weight.device, not undo), self._scale(weight.device, not undo)
            self._turn(pieces[:done], *back)
            if undo:
                self._merged()
            raise
        return True

    def _turn(self, pieces: tuple[Tensor, ...], matrices: list[Tensor], scale: Tensor | None) -> None:
        for piece, factor in zip(pieces, self._scale_pieces(scale, pieces), strict=False):  # those of all rows
            self.state.layer_type.fold(self.layer, self.part, _times(piece, factor), matrices, piece)

    def _merged(self, wanted: Tensor | None = None) -> float:
        """Note what the weight is now, and return how far its outputs are off those of a weight that was to be stored."""
        assert self.state.merged is not None  # a layer is merged before its weights are
        self.state.merged[self.part.parameter] = self.fingerprint()
        return 0.0 if wanted is None or self.codec.is_exact else output_error(self.read(), wanted)

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


def _fresh(like: Tensor, dtype: torch.dtype) -> Tensor:
    """`torch.empty_like` of another dtype, in memory that Linux hands out 2 MiB at a time where it can: in pages of 4 KiB the
    first writing costs more than the fold, and reading it for every token some hundredths more."""
    size = like.numel() * dtype.itemsize
    is_plain = type(like) in (Tensor, nn.Parameter) and like.device.type == "cpu" and like.is_contiguous()
    if sys.platform != "linux" or not is_plain or size < LARGE_PAGE:
        return torch.empty_like(like, dtype=dtype)
    if size < _MAPPED:  # from a multiple of 2 MiB on: between others most would cover no such page whole
        memory = mmap.mmap(-1, size + LARGE_PAGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        offset = -ctypes.addressof(ctypes.c_char.from_buffer(memory)) % LARGE_PAGE
        fresh = torch.frombuffer(memory, dtype=dtype, count=like.numel(), offset=offset).view(like.shape)
    else:
        fresh = torch.empty_like(like, dtype=dtype)
    start = fresh.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE  # from where the allocator's own note of it lies
    length = fresh.data_ptr() + size - start
    _c_library().madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), mmap.MADV_HUGEPAGE)
    # One thread writes to each of them first: two that come to a page at once both clear it.
    fresh.as_strided((size // LARGE_PAGE,), (LARGE_PAGE // dtype.itemsize,)).zero_()
    return fresh


@functools.cache
def _c_library() -> ctypes.CDLL:
    return ctypes.CDLL(None)


def _times(piece: Tensor, factor: Tensor | None) -> Tensor:
    """Rows scaled in the precision of the scales, which is that of the fold."""
    return piece if factor is None else piece.to(factor.dtype) * factor


def _stays_finite(weight: Tensor, matrices: list[Tensor], scale: Tensor | None) -> bool:
    """Whether a fold cannot overflow, told before it: no entry grows by more than a row or column of a block sums up to
    in magnitude, which of a rotation is at most the root of its size. Twice that leaves room for rounding."""
    low, high = weight.aminmax()
    growth = math.prod(max(float(m.abs().sum(dim).amax()) for dim in (-2, -1)) for m in matrices)
    growth *= 1.0 if scale is None else max(1.0, float(scale.amax()))
    return 2 * growth * max(-float(low), float(high)) < torch.finfo(weight.dtype).max


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
