"""`adapter_model.safetensors`: the keys and the convention of PEFT.

Keys are `base_model.model.<layer>.oft_R.weight`, `.oft_embedding_R.weight` for embeddings, `.oft_R.<part>.weight`
(ours) for the parts of a layer that has several, and plain names for what was trained whole. Magnitudes (ours) have
`magnitude` in place of `weight`.
"""

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import NamedTuple

from safetensors import safe_open
from torch import Tensor

from lightning_oft import functional
from lightning_oft.config import OFTConfig
from lightning_oft.formats.errors import AdapterFileError, refusing
from lightning_oft.layers.base import layer_types
from lightning_oft.model.adapter_state import AdapterState

TENSOR_FILE = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_IMPLIED = {"oft_R": "linear", "oft_embedding_R": "embedding"}
IMPLIED_TYPES = tuple(_IMPLIED.values())  # what a key stands for where the configuration does not say another
_PARTS = ("in_proj", "q_proj", "k_proj", "v_proj", "out_proj")  # in files from before `layer_types`
_WRAPPERS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
_ROTATION = re.compile(
    r"(?:(?P<layer>.+)\.)?(?P<kind>oft_R|oft_embedding_R)(?:\.(?P<inner>.+))?\.(?P<tensor>weight|magnitude)"
)
_DTYPES = {"F16", "BF16", "F32", "F64", "I64", "I32", "I16", "I8", "U8", "BOOL"}
_KEY_LIMIT = 4096  # characters of a tensor's name; matching one takes time quadratic in them


class Key(NamedTuple):
    """What a key means: a tensor's name, or the layer and part of a generator, which alone has a layer type, or of
    magnitudes."""

    name: str
    part: str = ""
    layer_type: str | None = None
    is_magnitude: bool = False


def to_tensors(state: AdapterState) -> dict[str, Tensor]:
    """The tensors of the file by key."""
    sign = 1 if state.config.use_cayley_neumann else -1  # PEFT's exact map is the transpose of ours
    tensors, known = {}, set(state.known_to_peft())
    for name, found in state.layers.items():
        kind = getattr(layer_types().get(found.layer_type), "peft_key", "oft_R")
        for part, generator in found.generators.items():
            key = ".".join(piece for piece in (name, kind, part, "weight") if piece)
            tensors[_PREFIX + key] = (sign * generator.float()).contiguous()
            if part in found.magnitudes:
                magnitudes = found.magnitudes[part].float().contiguous()
                tensors[_PREFIX + key.removesuffix("weight") + "magnitude"] = magnitudes
    for name, tensor in (state.saved | state.carried).items():
        owner, _, key = name.rpartition(".")
        # PEFT wraps the layers it adapts, and keeps the layer itself as `base_layer`.
        place = f"{owner}.base_layer.{key}" if owner and owner in known and key == "bias" else name
        tensors[_PREFIX + place] = tensor.contiguous().clone()  # safetensors refuses two of one memory (tied weights)
    return tensors


def parse_key(key: str, layer_types: Collection[str] = ()) -> Key | None:
    """The meaning of a key, with or without PEFT's prefix and the adapter's name; None where it says nothing new.

    PEFT with bias="all" writes the biases of a module in modules_to_save twice more: trained, and as they were. Layers
    whose type the configuration says, `layer_types`, may have parts.
    """
    name = strip_wrappers(key.removeprefix(_PREFIX))
    if (match := _ROTATION.fullmatch(name)) is None:
        if ".original_module." in f".{name}" or ".modules_to_save." in f".{name}":
            return None
        return Key(name.replace(".base_layer.", ".").removeprefix("base_layer."))
    layer, last = match["layer"] or "", (match["inner"] or "").rsplit(".", 1)[-1]
    part, is_magnitude = last if last in _PARTS or layer in layer_types else "", match["tensor"] == "magnitude"
    return Key(layer, part, None if is_magnitude else _IMPLIED[match["kind"]], is_magnitude)


def strip_wrappers(name: str) -> str:
    """A name without the attributes in which torch's wrappers keep a module."""
    return ".".join(piece for piece in name.split(".") if piece not in _WRAPPERS)


def read_tensors(
    file: Path, layer_types: Collection[str], config: OFTConfig, unprojected: bool = False
) -> dict[Key, Tensor]:
    """The tensors by what their keys mean; generators in this library's convention and float32.

    PEFT's exact map is (I - Q)(I + Q)^-1, the transpose of what its series approximates and of our exact map. It
    projects at each forward, so a file that it has written after an optimizer step is `unprojected`. The header is
    checked before memory is taken. Raises AdapterFileError.
    """
    with refusing("not a whole safetensors file", file), safe_open(file, framework="pt") as opened:
        dtypes = {key: str(opened.get_slice(key).get_dtype()) for key in opened.keys()}  # noqa: SIM118 - no dictionary
        keys = _parse(dtypes, layer_types)
        tensors = {meaning: opened.get_tensor(key).clone() for key, meaning in keys.items()}
        for key, meaning in keys.items():
            if meaning.is_magnitude:
                check_magnitude(key, tensors[meaning])
                tensors[meaning] = tensors[meaning].float()
            elif meaning.layer_type is not None:
                check_generator(key, tensors[meaning])
                generator = tensors[meaning].float() if config.use_cayley_neumann else -tensors[meaning].float()
                if unprojected:
                    functional.project(generator, functional.eps_radius(config.eps, 1, generator.shape[0]))
                tensors[meaning] = generator
    return tensors


def _parse(dtypes: Mapping[str, str], layer_types: Collection[str]) -> dict[str, Key]:
    """What each key means; those that say nothing new are left out. Raises AdapterFileError for other keys."""
    parsed: dict[str, Key] = {}
    seen: dict[tuple[str, str, bool, bool], str] = {}
    for key, dtype in dtypes.items():
        if len(key) > _KEY_LIMIT:
            raise AdapterFileError(f"{key[:40]}... is no name of a tensor ({len(key)} characters); copy the file again")
        if dtype not in _DTYPES:
            raise AdapterFileError(f"{key} is of dtype {dtype}, which is not read; save it as float32")
        if ".oft_r." in f".{key}.":
            raise AdapterFileError("holds oft_r keys, so it was written by PEFT 0.15 or before; train it again")
        if (meaning := parse_key(key, layer_types)) is not None:
            other = seen.setdefault((meaning.name, meaning.part, meaning.layer_type is None, meaning.is_magnitude), key)
            if other != key:
                raise AdapterFileError(f"{key} and {other} mean the same; save one adapter a file")
            parsed[key] = meaning
    if all(meaning.layer_type is None for meaning in parsed.values()):
        raise AdapterFileError("holds no rotation (no key with oft_R); was it saved with another method?")
    return parsed


def check_generator(key: str, tensor: Tensor) -> None:
    """Raise AdapterFileError where a tensor is no generator, or an expanded one: a copy of that would take memory."""
    try:
        functional.block_size_of(tensor.shape[1])
        is_fit = tensor.is_floating_point() and tensor.dim() == 2 and len(tensor) > 0
    except (IndexError, ValueError):  # a tensor of one dimension; entries of no block size
        is_fit = False
    if not is_fit or tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        what = f"{tensor.dtype} of shape {tuple(tensor.shape)}"
        raise AdapterFileError(f"{key} is {what}, no generators of shape (blocks, b(b-1)/2); train the adapter again")
    if not bool(tensor.float().isfinite().all()):
        raise AdapterFileError(f"{key} is NaN or infinite; use an earlier state of the adapter, or train it again")


def check_magnitude(key: str, tensor: Tensor) -> None:
    """Raise AdapterFileError where a tensor holds no logarithms of scales."""
    if not tensor.is_floating_point() or tensor.dim() != 1 or not bool(tensor.float().exp().isfinite().all()):
        what = f"{key} ({tensor.dtype} of shape {tuple(tensor.shape)}) holds no logarithms of scales of neurons"
        raise AdapterFileError(f"{what}; use an earlier state of the adapter, or train it again")
