"""Reading an adapter directory in PEFT's format, without a model: configuration and header first, the tensors after."""

from __future__ import annotations

import hashlib
import json
import math
import re
import warnings
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open
from torch import Tensor

from lightning_oft import functional
from lightning_oft.config import OFTConfig
from lightning_oft.formats.errors import AdapterFileError, first_line, printable
from lightning_oft.formats.peft_keys import (
    CONFIG_FILE,
    OWN_FIELDS,
    OWN_KEY,
    OWN_VERSION,
    PEFT_DEFAULTS,
    PICKLE_FILE,
    TENSOR_FILE,
    Key,
    parse_key,
)
from lightning_oft.model.adapter_state import AdapterState, Base, LayerRotations
from lightning_oft.model.traversal import some

_BYTES = {"F16": 2, "BF16": 2, "F32": 4, "F64": 8, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
_FLOATING = ("F16", "BF16", "F32", "F64")
_CONFIG_LIMIT = 16 * 2**20
"""Bytes of a configuration, which take some twenty times as many in memory; fifty thousand layers' names need six."""
_KEY_LIMIT = 4096
"""Characters of a tensor's name; matching one takes time quadratic in them."""

Header = dict[str, tuple[str, tuple[int, ...]]]
"""dtype and shape by key."""


class _Config(NamedTuple):
    """`adapter_config.json`, checked: ours, the file's own target_modules and modules_to_save, our key, the rest."""

    config: OFTConfig
    known_to_peft: str | list[str]
    modules_to_save: list[str]
    own: dict[str, Any]
    extra: dict[str, Any]


def read_peft(directory: str | Path, adapter_name: str | None = None) -> AdapterState:
    """Read an adapter directory of this library or of PEFT. No model is needed, and nothing but torch is imported.

    Args:
        directory: holds `adapter_config.json` and `adapter_model.safetensors`, or a directory of the adapter's name
            that does, as PEFT writes it.
        adapter_name: the adapter's name; `default` where there is none.

    Raises:
        AdapterFileError: not an adapter, damaged, or of a format that cannot be read; names the file and the remedy.
    """
    place = _locate(Path(directory), adapter_name)
    found = _parse_config(_read_json(place / CONFIG_FILE), place / CONFIG_FILE)
    file = place / TENSOR_FILE
    if not file.is_file():
        pickled = f"{PICKLE_FILE} is a pickle, which may run code: convert it to safetensors with PEFT"
        raise AdapterFileError(
            f"{file}: no such file; {pickled if (place / PICKLE_FILE).is_file() else 'copy it from where the adapter was saved'}"
        )
    _check_digest(file, found.own.get("sha256"))
    header = _read_header(file)
    keys = _parse_keys(file, header, found.own.get("layer_types", {}))
    _check_generators(file, header, {key: meaning for key, meaning in keys.items() if meaning.layer_type})
    tensors = _read_tensors(file, keys)
    return _state(file, found, keys, tensors, adapter_name or "default")


def _state(
    file: Path, found: _Config, keys: dict[str, Key], tensors: dict[str, Tensor], adapter_name: str
) -> AdapterState:
    layers: dict[str, LayerRotations] = {}
    saved: dict[str, Tensor] = {}
    dead: list[str] = []
    known = _known_to_peft(found, [name for name, _, layer_type in keys.values() if layer_type])
    for key, (name, part, layer_type) in keys.items():
        if layer_type is None:
            saved[name] = tensors[key]
        elif tensors[key].shape[1] == 0:
            dead.append(name)
        else:
            told = found.own.get("layer_types", {}).get(name, layer_type)
            one = layers.setdefault(name, LayerRotations(told, name in known, {}, {}))
            one.block_sizes[part] = functional.block_size_of(tensors[key].shape[1])
            one.generators[part] = _ours(tensors[key].float(), found.config)
    if not layers:
        raise AdapterFileError(
            f"{file}: all its blocks are of size 1, which rotate nothing; train with a larger block size"
        )
    if dead:
        warnings.warn(
            printable(f"{file}: {some(dead)} have blocks of size 1, which rotate nothing; left out"), stacklevel=4
        )
    mapping = found.extra.get("auto_mapping")
    mapping = mapping if isinstance(mapping, dict) else {}
    path = found.extra.get("base_model_name_or_path")
    return AdapterState(
        name=adapter_name,
        config=found.config,
        layers=layers,
        root=found.own.get("root"),
        saved=saved,
        modules_to_save=found.modules_to_save,
        fingerprints=found.own.get("fingerprint", {}),
        base=Base(
            str(mapping.get("base_model_class", "")),
            str(mapping.get("parent_library", "")),
            path if isinstance(path, str) else None,
        ),
        has_unique_names=not isinstance(found.known_to_peft, str),
        source=printable(str(file.parent)),
        extra=found.extra,
    )


def _known_to_peft(found: _Config, names: Iterable[str]) -> set[str]:
    """The layers that PEFT rotates too: of a file of PEFT's all, of ours those in the target_modules written for it."""
    targets = found.known_to_peft
    if not found.own:
        return set(names)
    given = set(targets.split("|") if isinstance(targets, str) else map(re.escape, targets))
    return {name for name in names if re.escape(name) in given}


def _read_tensors(file: Path, keys: dict[str, Key]) -> dict[str, Tensor]:
    """The tensors by key, as they are stored. Raises where a generator is not finite."""
    try:
        with safe_open(file, framework="pt") as opened:
            tensors = {key: opened.get_tensor(key).clone() for key in keys}
    except (SafetensorError, OSError, RuntimeError, ValueError) as error:
        raise AdapterFileError(f"{file}: cannot be read ({first_line(error)}); copy the file again") from None
    rotations = {key: meaning.name for key, meaning in keys.items() if meaning.layer_type}
    broken = [name for key, name in rotations.items() if not bool(tensors[key].isfinite().all())]
    if broken:
        raise AdapterFileError(f"{file}: generators of {some(broken)} are NaN or infinite; train the adapter again")
    return tensors


def _ours(generator: Tensor, config: OFTConfig) -> Tensor:
    """A generator as it is stored, in our convention.

    PEFT's exact map is (I - Q)(I + Q)^-1, the transpose of what its series approximates and of our exact map. It
    projects at each forward, so a file written after an optimizer step is not projected yet.
    """
    if not config.use_cayley_neumann:
        generator = -generator
    if config.coft and config.coft_radius == "peft":
        functional.project(generator, functional.eps_radius(config.eps, 1, generator.shape[0]))
    return generator


def _locate(directory: Path, adapter_name: str | None) -> Path:
    """The directory itself, or the one below it that PEFT makes for an adapter of another name than `default`."""
    if not directory.is_dir():
        raise AdapterFileError(f"{directory}: no such directory; give the one that holds {CONFIG_FILE}")
    if (directory / CONFIG_FILE).is_file():
        return directory
    below = sorted(path.parent.name for path in directory.glob(f"*/{CONFIG_FILE}"))
    if adapter_name in below:
        return directory / str(adapter_name)
    hint = (
        f"there are adapters in {some(below)}: give one of these directories" if below else "give the one that holds it"
    )
    raise AdapterFileError(f"{directory / CONFIG_FILE}: no such file, so this is no adapter directory; {hint}")


def _read_json(file: Path) -> dict[str, Any]:
    try:
        if file.stat().st_size > _CONFIG_LIMIT:
            raise ValueError(f"larger than {_CONFIG_LIMIT} bytes")
        raw = json.loads(file.read_bytes().decode("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise AdapterFileError(f"{file}: not a readable JSON file ({first_line(error)}); copy the file again") from None
    if not isinstance(raw, dict):
        raise AdapterFileError(f"{file}: holds a {type(raw).__name__} where an object is expected; copy the file again")
    return raw


def _parse_config(raw: dict[str, Any], file: Path) -> _Config:
    own = raw.get(OWN_KEY, {})
    _check_own(own, file)
    if raw.get("peft_type") != "OFT":
        raise AdapterFileError(f"{file}: peft_type is {raw.get('peft_type')!r}, not 'OFT'; only OFT adapters are read")
    if "oft_block_size" not in raw:
        raise AdapterFileError(
            f"{file}: no oft_block_size, so it was written before PEFT 0.14; train the adapter again"
        )
    if not raw["oft_block_size"] and not raw.get("r"):
        raise AdapterFileError(f"{file}: neither r nor oft_block_size is given; write the one it was trained with")
    lost = [field for field in PEFT_DEFAULTS if OWN_KEY in raw and field not in raw]
    if lost:  # PEFT's default in its place would be another adapter
        raise AdapterFileError(f"{file}: lacks {', '.join(lost)}, which this library writes; copy the file again")
    values = {field: raw.get(field, default) for field, default in PEFT_DEFAULTS.items()}
    for field in ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"):
        if values[field] in ("", []):
            values[field] = None
    if isinstance(values["target_modules"], str):
        values["layers_to_transform"] = values["layers_pattern"] = None  # PEFT ignores them beside a pattern
    values["neumann_series"] = "unhalved" if _is_unhalved(raw, file) else "halved"
    values["coft_radius"] = "peft" if values["coft"] else "paper"
    ours = {key: value for key, value in own.get("config", {}).items() if key in OWN_FIELDS}
    try:
        theirs = OFTConfig(**values)
        config = replace(theirs, **ours)
    except (ValueError, TypeError) as error:
        raise AdapterFileError(f"{file}: {first_line(error)}") from None
    extra = {key: value for key, value in raw.items() if key not in PEFT_DEFAULTS and key != OWN_KEY}
    return _Config(config, theirs.target_modules or [], theirs.modules_to_save or [], own, extra)


def _check_own(own: Any, file: Path) -> None:
    kinds = {"config": dict, "root": str, "fingerprint": dict, "layer_types": dict, "sha256": str, "version": int}
    right = isinstance(own, dict) and all(isinstance(own[key], kind) for key, kind in kinds.items() if key in own)
    right = right and all(isinstance(v, str) and ":" in v for v in own.get("fingerprint", {}).values())
    if not right or not all(isinstance(v, str) for v in own.get("layer_types", {}).values()):
        raise AdapterFileError(f"{file}: {OWN_KEY} has a field of a wrong type; copy the file again")
    if own.get("version", OWN_VERSION) > OWN_VERSION:
        raise AdapterFileError(f"{file}: written by a newer lightning_oft; upgrade it to read this adapter")


def _is_unhalved(raw: dict[str, Any], file: Path) -> bool:
    """Whether PEFT computed another series when it wrote this: it records its version since 0.18, which changed it."""
    version = raw.get("peft_version") or "0.0"
    numbers = re.match(r"(\d{1,6})\.(\d{1,6})", version) if isinstance(version, str) else None
    if numbers is None:
        raise AdapterFileError(
            f"{file}: peft_version={version!r} is no version; write that of the PEFT it was saved with"
        )
    return raw.get("use_cayley_neumann") is True and (int(numbers[1]), int(numbers[2])) < (0, 18)


def _check_digest(file: Path, expected: str | None) -> None:
    if expected is None:
        return
    digest = hashlib.sha256()
    try:
        with file.open("rb") as stream:
            while chunk := stream.read(2**20):
                digest.update(chunk)
    except OSError as error:
        raise AdapterFileError(f"{file}: cannot be read ({first_line(error)}); copy the file again") from None
    if digest.hexdigest() != expected:
        raise AdapterFileError(
            f"{file}: is not the file that {CONFIG_FILE} was written with: an interrupted write, or damaged since; "
            "save or copy the adapter again"
        )


def _read_header(file: Path) -> Header:
    """dtype and shape by key. safetensors itself checks that the header agrees with the size of the file."""
    try:
        with safe_open(file, framework="pt") as tensors:
            slices = {key: tensors.get_slice(key) for key in tensors.keys()}  # noqa: SIM118 - no dictionary
            header = {key: (str(s.get_dtype()), tuple(s.get_shape())) for key, s in slices.items()}
    except (SafetensorError, OSError, RuntimeError, ValueError) as error:
        raise AdapterFileError(
            f"{file}: not a whole safetensors file ({first_line(error)}); copy the file again"
        ) from None
    for key, (dtype, shape) in header.items():
        if len(key) > _KEY_LIMIT:
            raise AdapterFileError(
                f"{file}: {key[:40]}... is no name of a tensor ({len(key)} characters); copy the file again"
            )
        if dtype not in _BYTES:
            raise AdapterFileError(f"{file}: {key} is of dtype {dtype}, which is not read; save it as float32")
        if _BYTES[dtype] * math.prod(shape) > file.stat().st_size:
            raise AdapterFileError(
                f"{file}: {key} declares a shape of {shape}, more than the file holds; copy it again"
            )
    return header


def _parse_keys(file: Path, header: Header, layer_types: dict[str, str]) -> dict[str, Key]:
    """What each key means; those that say nothing new are left out."""
    if any(".oft_r." in f".{key}." for key in header):
        raise AdapterFileError(f"{file}: holds oft_r keys, so it was written by PEFT 0.15 or before; train it again")
    parsed = {key: meaning for key in header if (meaning := parse_key(key, layer_types)) is not None}
    seen: dict[tuple[str, str, bool], str] = {}
    for key, (name, part, layer_type) in parsed.items():
        other = seen.setdefault((name, part, layer_type is None), key)
        if other != key:
            raise AdapterFileError(f"{file}: {key} and {other} mean the same; save one adapter a file")
    if all(meaning.layer_type is None for meaning in parsed.values()):
        raise AdapterFileError(f"{file}: holds no rotation (no key with oft_R); was it saved with another method?")
    return parsed


def _check_generators(file: Path, header: Header, rotations: dict[str, Key]) -> None:
    for key in rotations:
        dtype, shape = header[key]
        if dtype not in _FLOATING:
            raise AdapterFileError(f"{file}: {key} is of dtype {dtype}; generators are floating point, save it again")
        if len(shape) != 2 or shape[0] == 0:
            raise AdapterFileError(f"{file}: {key} has shape {shape}, not (blocks, b(b-1)/2); train the adapter again")
        try:
            functional.block_size_of(shape[1])
        except ValueError as error:
            raise AdapterFileError(f"{file}: {key} has shape {shape}: {error}; train the adapter again") from None
