"""Merging an adapter into the files of a base, tensor by tensor: the memory of one weight, and files cut as the base's.

The format: 8 bytes that say how long the header is, the header in JSON, then the tensors one after another
(https://github.com/huggingface/safetensors#format).
"""

import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor, nn

from lightning_oft.codecs import codec_of
from lightning_oft.formats.pretrained import write_model
from lightning_oft.layers.base import layer_type_of
from lightning_oft.layers.rotation import Rotation
from lightning_oft.layers.state import LayerState
from lightning_oft.model import AdapterState
from lightning_oft.model.fingerprint import fingerprint, same_base
from lightning_oft.model.folding import CPU_PIECE, FoldedWeight
from lightning_oft.model.placement import Place, find_place
from lightning_oft.model.traversal import Modules, joined, walk

_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_PIECE = 2**24
"""Bytes that are copied at a time."""


class _Stored(NamedTuple):
    """Where a tensor lies in a file."""

    file: Path
    start: int
    nbytes: int
    dtype: str
    shape: tuple[int, ...]

    def read(self) -> Tensor:
        data = bytearray(self.nbytes)
        with open(self.file, "rb") as opened:
            opened.seek(self.start)
            opened.readinto(data)
        return torch.frombuffer(data, dtype=_DTYPES[self.dtype]).view(self.shape)

    def rows(self, count: int) -> "Iterator[_Stored]":
        """So many rows at a time."""
        width = self.nbytes // self.shape[0]
        for first in range(0, self.shape[0], count):
            number = min(count, self.shape[0] - first)
            yield self._replace(
                start=self.start + first * width, nbytes=number * width, shape=(number, *self.shape[1:])
            )


@dataclass
class StreamedMerge:
    """An adapter and the files of a base that it can be folded into one by one."""

    base: Path
    files: list[Path]
    tensors: dict[str, _Stored]
    folds: dict[str, FoldedWeight]
    saved: dict[str, Tensor]
    other_bases: list[str]
    """Names of the layers whose weights are not those that the adapter was trained on."""
    layers: set[str] = field(default_factory=set)

    def write(self, directory: Path, dtype: torch.dtype | None, companions: Iterable[Any] = ()) -> None:
        """Write the merged model; raises as `write_pretrained`."""

        def save(place: Path) -> None:
            total = sum(self._write_file(file, place / file.name, dtype) for file in self.files)
            config = _read_json(self.base / "config.json")
            if dtype is not None:
                config.pop("torch_dtype", None)
                config["dtype"] = str(dtype).removeprefix("torch.")
            _write_json(place / "config.json", config)
            for index in self.base.glob("*.safetensors.index.json"):
                found = _read_json(index)
                _write_json(place / index.name, {**found, "metadata": {**found["metadata"], "total_size": total}})

        write_model(directory, save, companions)

    def _write_file(self, source: Path, target: Path, dtype: torch.dtype | None) -> int:
        """Write one file of tensors; returns their bytes."""
        header, place = {}, 0
        own = {name: one for name, one in self.tensors.items() if one.file == source}
        for name, one in own.items():
            wanted = _NAMES[dtype] if dtype is not None and one.dtype in _DTYPES else one.dtype
            size = one.nbytes * _itemsize(wanted) // _itemsize(one.dtype)
            header[name] = {"dtype": wanted, "shape": one.shape, "data_offsets": [place, place + size]}
            place += size
        text = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
        text += b" " * (-len(text) % 8)
        with open(target, "wb") as opened:
            opened.write(len(text).to_bytes(8, "little") + text)
            for name, one in own.items():
                for piece in self._pieces(name, one, dtype):
                    opened.write(piece)
        return place

    def _pieces(self, name: str, one: _Stored, dtype: torch.dtype | None) -> Iterator[Any]:
        """The bytes of a tensor as they are written."""
        own = _DTYPES.get(one.dtype)
        if name in self.folds:
            for piece in _row_pieces(self.folds[name], one):
                yield _bytes(_folded(self.folds[name], piece.read(), dtype or own))
        elif name in self.saved and own is not None:
            yield _bytes(self.saved[name].to(own).to(dtype or own))
        elif own is not None and dtype not in (None, own):
            yield _bytes(one.read().to(dtype))
        else:
            with open(one.file, "rb") as opened:
                yield from _copied(opened, one.start, one.nbytes)


def stream_merge(base: str | Path, state: AdapterState) -> StreamedMerge | None:
    """The merge of an adapter with the files of a base, ready to be written; None where these are no plain files with
    the names of a transformers model's own tensors (a hub id, magnitudes, a quantized base, a rotated weight that is tied).
    Raises AdapterError where the adapter does not fit."""
    folder, model = Path(base), None
    files = sorted(folder.glob("*.safetensors"))
    if (folder / "config.json").is_file() and files:
        model = _skeleton(_read_json(folder / "config.json"))
    if model is None:
        return None
    tensors = {name: one for file in files for name, one in _header(file)}
    modules = walk(model)
    place = find_place(modules, state)
    if place.magnitudes or not _fits(modules, place, tensors):  # pieces of rows do not say which neurons they are
        return None
    folds = _folds(modules, place, state)
    names = {id(module): name for name, module in modules.items()}
    saved = {joined(names[id(one.module)], one.key): one.value for one in place.saved.values()}
    if not (folds.keys() | saved.keys()) <= tensors.keys():
        return None
    prints = {joined(place.root, name): value for name, value in state.fingerprints.items()}
    firsts = {name: next(key for key in folds if key.startswith(f"{name}.")) for name in place.layers}
    others = [
        n for n, key in firsts.items() if n in prints and not same_base(fingerprint(tensors[key].read()), prints[n])
    ]
    return StreamedMerge(folder, files, tensors, folds, saved, others, set(place.layers))


def _skeleton(config: dict[str, Any]) -> nn.Module | None:
    """A transformers model whose parameters take no memory; None where there is no such class, or it is quantized."""
    import transformers

    cls: Any = getattr(transformers, next(iter(config.get("architectures") or []), ""), None)
    if cls is None or "quantization_config" in config:
        return None
    with torch.device("meta"):
        model: nn.Module = cls(cls.config_class.from_dict(config))
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for key, p in module._parameters.items():
            if p is not None:
                nothing = torch.zeros((), dtype=p.dtype, device="cpu").expand(p.shape)
                module._parameters[key] = made.setdefault(id(p), nn.Parameter(nothing, requires_grad=False))
    return model


def _header(file: Path) -> Iterator[tuple[str, _Stored]]:
    with open(file, "rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        header = json.loads(opened.read(length))
    header.pop("__metadata__", None)
    for name, one in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        start, end = one["data_offsets"]
        yield name, _Stored(file, 8 + length + start, end - start, one["dtype"], tuple(one["shape"]))


def _fits(modules: Modules, place: Place, tensors: dict[str, _Stored]) -> bool:
    """Whether the files have the model's own tensors in one dtype, and nothing that changes is shared."""
    own = {joined(name, key): p for name, m in modules.items() for key, p in m._parameters.items() if p is not None}
    holders = Counter(id(p) for p in own.values())
    changed = [joined(layer, w.part.parameter) for layer in place.layers for w in _weights(modules[layer])]
    changed_ids = {id(own[name]) for name in changed if name in own} | {
        id(one.tensor()) for one in place.saved.values()
    }
    shapes = all(name in own and tuple(own[name].shape) == one.shape for name, one in tensors.items())
    is_whole = {id(own[name]) for name in tensors if name in own} == set(holders)
    dtypes = {one.dtype for one in tensors.values()}
    return (
        shapes
        and is_whole
        and len(dtypes) == 1
        and dtypes <= _DTYPES.keys()
        and all(holders[i] == 1 for i in changed_ids)
    )


def _weights(layer: nn.Module) -> list[FoldedWeight]:
    layer_type = layer_type_of(layer)
    parts = layer_type.rotated_weights(layer).values() if layer_type is not None else ()
    return [FoldedWeight(layer, LayerState(layer_type), part, codec_of(layer, part.parameter), []) for part in parts]  # type: ignore[arg-type]


def _folds(modules: Modules, place: Place, state: AdapterState) -> dict[str, FoldedWeight]:
    """What becomes of each rotated weight, by the name of its tensor."""
    folds = {}
    for name, sizes in place.layers.items():
        layer_type = layer_type_of(modules[name], state.config.side)
        assert layer_type is not None  # a place has no other layers
        weights = layer_type.rotated_weights(modules[name])
        for part, size in sizes.items():
            rotation = Rotation(weights[part].fan, size, state.config, "cpu").requires_grad_(False)
            rotation.weight.copy_(place.generators[name, part])
            rotation.use_map(exact=(name, part) in place.exact or not state.config.use_cayley_neumann)
            codec = codec_of(modules[name], weights[part].parameter)
            assert codec is not None  # the skeleton's parameters are plain
            fold = FoldedWeight(modules[name], LayerState(layer_type), weights[part], codec, [rotation])
            folds[joined(name, weights[part].parameter)] = fold
    return folds


def _row_pieces(fold: FoldedWeight, one: _Stored) -> Iterator[_Stored]:
    """Rows that are folded one by one, in pieces of whole steps of a fold, so that no bit depends on it."""
    if fold.state.layer_type.row_dim != 0:
        return iter([one])
    step = max(1, CPU_PIECE * one.shape[0] // max(1, math.prod(one.shape)))
    return one.rows(8 * step)


def _folded(fold: FoldedWeight, values: Tensor, dtype: torch.dtype | None) -> Tensor:
    parameter = fold.layer.get_parameter(fold.part.parameter)
    parameter.data, skeleton = values, parameter.data
    try:
        return fold.folded(dtype=dtype)
    finally:
        parameter.data = skeleton


def _copied(opened: BinaryIO, start: int, nbytes: int) -> Iterator[bytes]:
    opened.seek(start)
    while nbytes > 0:
        piece = opened.read(min(nbytes, _PIECE))
        nbytes -= len(piece)
        yield piece


def _bytes(tensor: Tensor) -> Any:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().data


def _itemsize(dtype: str) -> int:
    return torch.empty(0, dtype=_DTYPES[dtype]).element_size() if dtype in _DTYPES else 1


def _read_json(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
