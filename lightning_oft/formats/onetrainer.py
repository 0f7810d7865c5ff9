"""OneTrainer's OFT_2: the input side by a series of five terms, in one file.

`<prefix><layer>.oft_R.weight` is the upper triangle of Q, (n or 1, b(b-1)/2), and R = I + 2Q + 2Q^2 + 2Q^3 + Q^4 as here with
`num_cayley_neumann_terms=5`. A linear layer gets x R, so W R^T; a convolution W R, of which ours is the negative. Where there
is an `.oft_R.scaled_oft`, Q is divided by 2 sqrt(b-1). https://github.com/Nerogar/OneTrainer: modules/module/oft_utils.py and
LoRAModule.py. Early branches wrote the same mark and divided by sqrt(b(b-1)/2).
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from lightning_oft import functional
from lightning_oft.config import OFTConfig
from lightning_oft.formats.errors import AdapterFileError, printable, refusing
from lightning_oft.formats.peft_tensors import check_generator
from lightning_oft.formats.prefixes import placed, prefix_of, split_prefix
from lightning_oft.formats.tensor_file import keys_of, metadata_of, read_tensors, write_tensors
from lightning_oft.model.adapter_state import AdapterState, LayerRotations
from lightning_oft.model.traversal import some

_TERMS = 5
_WEIGHT, _MARK = "oft_R.weight", "oft_R.scaled_oft"
_TYPES = ("linear", "convolution", "")
"""Layers that OneTrainer adapts; of a file no type is known."""
Scale = Literal["release", "branch"]
"""What a mark of scaling stands for: 2 sqrt(b-1), or sqrt(b(b-1)/2) of the branches before 4 March 2026."""


def is_onetrainer(path: Path) -> bool:
    """Whether a path is such a file; PEFT's keys alone begin otherwise."""
    return any(key.endswith(f".{_WEIGHT}") and not key.startswith("base_model.") for key in keys_of(path))


def read_onetrainer(file: Path, name: str | None = None, scale: Scale | None = None) -> list[AdapterState]:
    """The adapters of a file, one for each of its models, named by what their keys begin with.

    `scale` says what a mark of scaling stands for, where the file does not: it does where the mark kept its type, and
    where the file names the branch `master`, which never had another. Raises AdapterFileError.
    """
    entries: dict[tuple[str, str], dict[str, Tensor]] = {}
    for key, tensor in read_tensors(file).items():
        kind = next((one for one in (_WEIGHT, _MARK) if key.endswith(f".{one}")), None)
        if kind is None:
            what = "no part of an OFT_2 adapter as OneTrainer's master writes it (DoRA, clipping and embeddings are not read)"
            raise AdapterFileError(f"{file}: {key}: {what}; train it without")
        entries.setdefault(split_prefix(file, key.removesuffix(f".{kind}")), {})[kind] = tensor
    is_release = scale == "release" or (scale is None and metadata_of(file).get("ot_branch") == "master")
    found: dict[str, dict[str, LayerRotations]] = {}
    for (prefix, layer), tensors in entries.items():
        with refusing("cannot be read", f"{file}: {layer}"):
            generator = _generator(tensors, "release" if is_release else scale)
        if generator.shape[1]:  # blocks of size 1 rotate nothing
            sizes = {"": functional.block_size_of(generator.shape[1])}
            found.setdefault(prefix, {})[layer] = LayerRotations("", False, sizes, {"": generator})
    return [
        AdapterState(
            name=prefix.rstrip("_."),
            config=_config(layers),
            layers=layers,
            has_flat_names=prefix.endswith("_"),
            inverse_types=("convolution",),
            source=printable(str(file)),
            extra={"prefix": prefix},
        )
        for prefix, layers in found.items()
    ]


def _generator(tensors: Mapping[str, Tensor], scale: Scale | None) -> Tensor:
    """The upper triangles of Q, in OneTrainer's convention and float32."""
    if _WEIGHT not in tensors:
        raise AdapterFileError(f"has no {_WEIGHT}; copy the file again")
    check_generator(_WEIGHT, tensors[_WEIGHT])
    generator, mark = tensors[_WEIGHT].float(), tensors.get(_MARK)
    if mark is None or not generator.shape[1]:
        return generator
    b = functional.block_size_of(generator.shape[1])
    if scale is None and (mark.dtype == torch.bool or (b > 1 and float(mark) == b)):
        scale = "release"
    if scale is None:
        what = "is scaled, by 2 sqrt(b-1) or, from a branch before 4 March 2026, by sqrt(b(b-1)/2), and the file does not say"
        raise AdapterFileError(f"{what}: give read_onetrainer its scale, 'release' or 'branch', and put the state in")
    return generator / (2 * math.sqrt(b - 1) if scale == "release" else math.sqrt(b * (b - 1) / 2))


def _config(layers: Mapping[str, LayerRotations]) -> OFTConfig:
    """That of layers in a file. One row each is one shared block, or all there is of it, which is the same."""
    is_shared = all(len(one.generators[""]) == 1 for one in layers.values())
    size = max(one.block_sizes[""] for one in layers.values())
    return OFTConfig(size, target_modules=list(layers), block_share=is_shared, num_cayley_neumann_terms=_TERMS)


def write_onetrainer(state: AdapterState, file: str | Path) -> Path:
    """Write an adapter of linear layers and convolutions, unscaled. One of another map is written where the five terms
    are orthogonal to float32, so that all maps are one.

    Raises:
        AdapterFileError: the format cannot say what the adapter does, nothing says what the names begin with, or the file
            cannot be written.
    """
    if refusal := _refusal(state):
        raise AdapterFileError(refusal)
    state = state if _has_its_map(state) else state.in_exact_map()
    if worst := _furthest(state):
        what = f"{worst}: five terms, which is all that OneTrainer computes, are no rotation that far"
        raise AdapterFileError(
            f"{what}; train with num_cayley_neumann_terms=5, or write what it changes of the weights (--format comfyui)"
        )
    prefix = prefix_of(state)
    return write_tensors(
        file,
        {
            f"{placed(prefix, name)}.{_WEIGHT}": _signed(one, state).float().contiguous()
            for name, one in state.layers.items()
        },
    )


def _signed(one: LayerRotations, state: AdapterState) -> Tensor:
    is_ours = one.layer_type == "convolution" and not state.inverse_types
    return -one.generators[""] if is_ours else one.generators[""]


def _has_its_map(state: AdapterState) -> bool:
    config, is_left = state.config, any(one.exact_parts for one in state.layers.values())
    return (
        config.use_cayley_neumann
        and config.num_cayley_neumann_terms == _TERMS
        and config.neumann_series == "halved"
        and not is_left
    )


def _furthest(state: AdapterState) -> str:
    """The layer, of an adapter of another map, whose five terms are furthest from a rotation; empty where none is off by
    more than float32."""
    if _has_its_map(state):
        return ""
    errors = {
        name: functional.error_bound(one.generators[""].float(), one.block_sizes[""], _TERMS)
        for name, one in state.layers.items()
    }
    worst = max(errors, key=errors.__getitem__)
    return worst if errors[worst] > functional.SERIES_TOLERANCE else ""


def _refusal(state: AdapterState) -> str:
    """Why an adapter cannot be written; empty where it can."""
    if state.config.side == "output":
        return "it rotates outputs, and OneTrainer rotates inputs: write it as oft_blocks (--format oft_blocks)"
    if others := [name for name, one in state.layers.items() if one.layer_type not in _TYPES]:
        return f"{some(others)}: OneTrainer rotates linear layers and convolutions; leave them out with exclude_modules"
    if scaled := [name for name, one in state.layers.items() if one.magnitudes]:
        return f"{some(scaled)}: OFT_2 has no magnitudes; write what it changes of the weights (--format comfyui)"
    if state.saved:
        return f"{some(state.saved)} were trained whole, and OFT_2 holds rotations alone; write a merged model"
    return ""
