"""Adapter directories in PEFT's format. What PEFT cannot say stands in `adapter_config.json` under our own key."""

import hashlib
import json
import os
import re
import warnings
from collections.abc import Mapping
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor

from lightning_oft import __version__, functional
from lightning_oft.config import OFTConfig
from lightning_oft.formats.atomic import write_directory
from lightning_oft.formats.card import CARD_FILE, is_own_card, model_card
from lightning_oft.formats.errors import AdapterFileError, first_line, printable, refusing
from lightning_oft.formats.peft_tensors import IMPLIED_TYPES, TENSOR_FILE, Key, read_tensors, to_tensors
from lightning_oft.model.adapter_state import AdapterState, Base, LayerRotations
from lightning_oft.model.traversal import some

CONFIG_FILE = "adapter_config.json"
OWN_KEY = "lightning_oft"
OWN_VERSION = 1  # of what stands under our own key; a reader refuses a higher one
PEFT_VERSION = "0.21.2"  # whose format we write
UNHALVED_VERSION = "0.17.1"  # the last whose series did not halve its last term

_UNKNOWN_TO_PEFT = ("side", "max_angle", "magnitude", "series_guard", "coft_radius", "neumann_series")
PEFT_DEFAULTS: dict[str, Any] = {
    **{field.name: field.default for field in fields(OFTConfig) if field.name not in _UNKNOWN_TO_PEFT},
    "target_modules": None,
    "num_cayley_neumann_terms": 5,
}
"""Fields of OFTConfig that are PEFT's too, and what PEFT takes where a file lacks them."""
_SELECTION = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
OWN_FIELDS = (*_SELECTION, "modules_to_save", "fan_in_fan_out", "coft", "eps", *_UNKNOWN_TO_PEFT)
"""Fields whose true value stands under our own key: PEFT has none of them, or is told something else."""
_OWN_TYPES = {"config": dict, "root": str, "fingerprint": dict, "layer_types": dict, "sha256": str, "version": int}

_SIZE_LIMIT = 16 * 2**20
"""Bytes of a configuration, which take some twenty times as many in memory; fifty thousand layers' names need six."""


def write_peft(
    state: AdapterState,
    directory: str | Path,
    metrics: Mapping[str, float] | None = None,
    place: str = "path/to/this/directory",
) -> Path:
    """Write an adapter as `save_adapter` does; `place` is where its card loads it from. Raises AdapterFileError where
    the directory cannot be written."""
    if state.has_flat_names or state.inverse_types:
        what = "its file leaves the types of its layers, or the dots in their names, to the model"
        raise AdapterFileError(f"{what}: put it into the model with load_adapter, and save_adapter")
    state = state.in_one_map()
    tensors, limits = save(to_tensors(state), metadata={"format": "pt"}), _limits(state)
    files = {
        CARD_FILE: model_card(state, limits, metrics or {}, place).encode(),
        TENSOR_FILE: tensors,
        CONFIG_FILE: to_json(state, hashlib.sha256(tensors).hexdigest()).encode(),
    }

    def write(scratch: Path) -> None:
        for name, content in files.items():
            (scratch / name).write_bytes(content)

    remedy = "what was there is unchanged: free space there or give another directory"
    with refusing("the adapter cannot be written", directory, remedy=remedy):
        if os.path.lexists(Path(directory, CARD_FILE)) and not is_own_card(Path(directory, CARD_FILE)):
            del files[CARD_FILE]
        write_directory(Path(directory), write, order=tuple(files))
    for limit in limits:
        warnings.warn(limit, stacklevel=3)
    return Path(directory)


def _limits(state: AdapterState) -> list[str]:
    """What PEFT cannot do with an adapter, a sentence each."""
    limits = []
    if unknown := [name for name, one in state.layers.items() if not one.is_known_to_peft]:
        limits.append(
            f"PEFT cannot represent the rotations of {some(unknown)}: they are in the file for this library, and PEFT "
            + ("will load the adapter without them" if state.known_to_peft() else "cannot load this adapter")
        )
    if state.config.neumann_series == "unhalved":
        limits.append(
            "this adapter uses the series of PEFT before 0.18, kept under our own key; PEFT 0.18 and later halve its "
            "last term and compute a slightly different rotation"
        )
    return limits


def to_json(state: AdapterState, sha256: str) -> str:
    """The content of `adapter_config.json` beside tensors of this digest; sorted: equal adapters are equal files."""
    values, known, base = asdict(state.config), sorted(state.known_to_peft()), state.base or Base("", "", None)
    has_class = base.class_name and not state.config.task_type
    types = {name: one.layer_type for name, one in state.layers.items() if one.layer_type not in IMPLIED_TYPES}
    content = {
        "peft_type": "OFT",
        "auto_mapping": {"base_model_class": base.class_name, "parent_library": base.library} if has_class else None,
        "base_model_name_or_path": base.name_or_path,
        "inference_mode": True,
        "peft_version": PEFT_VERSION if state.config.neumann_series == "halved" else UNHALVED_VERSION,
        **{field: values[field] for field in PEFT_DEFAULTS},
        "target_modules": known if state.has_unique_names else "|".join(map(re.escape, known)),
        **dict.fromkeys(("exclude_modules", "layers_to_transform", "layers_pattern", "revision")),
        "modules_to_save": sorted(state.modules_to_save) or None,
        "fan_in_fan_out": False,
        "coft": False,  # the projection is in the tensors; PEFT would project again, into a smaller ball
        OWN_KEY: {
            "version": OWN_VERSION,
            "written_by": __version__,
            "root": state.root or "",
            "config": {field: values[field] for field in OWN_FIELDS},
            "fingerprint": dict(state.fingerprints),
            **({"layer_types": types} if types else {}),
            "sha256": sha256,
        },
    }
    return json.dumps(content, indent=2, allow_nan=False, sort_keys=True) + "\n"


def read_peft(directory: str | Path, adapter_name: str | None = None) -> AdapterState:
    """Read a directory of this library's or of PEFT's, or one below it of the adapter's name, as PEFT writes it.

    No model is needed, and nothing but torch is imported.

    Raises:
        AdapterFileError: not an adapter, damaged, or of a format that cannot be read; names the file and the remedy.
    """
    place = _locate(Path(directory), adapter_name)
    file, (config, raw) = place / TENSOR_FILE, read_config(place / CONFIG_FILE)
    own = raw.get(OWN_KEY, {})
    with refusing("cannot be read", file):
        if not file.is_file():
            pickled = "adapter_model.bin is a pickle, which may run code: convert it to safetensors with PEFT"
            there = (place / "adapter_model.bin").is_file()
            raise AdapterFileError(f"no such file; {pickled if there else 'copy it from where the adapter was saved'}")
        if "sha256" in own:
            digest = hashlib.sha256()
            with file.open("rb") as stream:
                while chunk := stream.read(2**20):
                    digest.update(chunk)
            if digest.hexdigest() != own["sha256"]:
                raise AdapterFileError(
                    f"is not the file that {CONFIG_FILE} was written with: an interrupted write, or damaged since; "
                    "save or copy the adapter again"
                )
    tensors = read_tensors(file, own.get("layer_types", {}), config, unprojected=raw.get("coft") is True)
    base, path = raw.get("auto_mapping"), raw.get("base_model_name_or_path")
    base = base if isinstance(base, dict) else {}
    class_name, library = str(base.get("base_model_class", "")), str(base.get("parent_library", ""))
    return AdapterState(
        name=adapter_name or "default",
        config=config,
        layers=_layers(file, raw, tensors),
        root=own.get("root"),
        saved={key.name: one for key, one in tensors.items() if key.layer_type is None and not key.is_magnitude},
        modules_to_save=raw.get("modules_to_save") or [],
        fingerprints=own.get("fingerprint", {}),
        base=Base(class_name, library, path if isinstance(path, str) else None),
        has_unique_names=not isinstance(raw.get("target_modules") or [], str),
        source=printable(str(place)),
        extra={key: value for key, value in raw.items() if key not in PEFT_DEFAULTS and key != OWN_KEY},
    )


def _layers(file: Path, raw: dict[str, Any], tensors: dict[Key, Tensor]) -> dict[str, LayerRotations]:
    """The rotations by layer. PEFT rotates all layers of a file of its own; of ours, the target_modules of the file."""
    own, targets = raw.get(OWN_KEY, {}), raw.get("target_modules") or []
    known = set(re.split(r"(?<!\\)\|", targets) if isinstance(targets, str) else map(re.escape, targets))
    layers: dict[str, LayerRotations] = {}
    generators = {key: tensor for key, tensor in tensors.items() if key.layer_type is not None}
    scales: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        if key.is_magnitude:
            scales.setdefault(key.name, {})[key.part] = tensor
    for (name, part, implied, _), generator in generators.items():
        if generator.shape[1]:
            layer_type = own.get("layer_types", {}).get(name) or str(implied)
            is_known = not own or re.escape(name) in known
            one = layers.setdefault(name, LayerRotations(layer_type, is_known, {}, {}, (), scales.get(name, {})))
            one.block_sizes[part] = functional.block_size_of(generator.shape[1])
            one.generators[part] = generator
    if not layers:
        what = "all its blocks are of size 1, which rotate nothing; train with a larger block size"
        raise AdapterFileError(f"{file}: {what}")
    if dead := [key.name for key in generators if key.name not in layers]:
        warnings.warn(printable(f"{file}: {some(dead)} have blocks of size 1, which rotate nothing; left out"))
    return layers


def _locate(directory: Path, adapter_name: str | None) -> Path:
    """The directory itself, or the one below it that PEFT makes for an adapter of another name than `default`."""
    if (directory / CONFIG_FILE).is_file():
        return directory
    below = sorted(path.parent.name for path in directory.glob(f"*/{CONFIG_FILE}"))
    if adapter_name in below:
        return directory / str(adapter_name)
    there = f"there are adapters in {some(below)}: give one of these directories"
    hint = there if below else "give the one that holds it"
    raise AdapterFileError(f"{directory / CONFIG_FILE}: no such file, so this is no adapter directory; {hint}")


def read_config(file: Path) -> tuple[OFTConfig, dict[str, Any]]:
    """The configuration that a file stands for, and its checked fields. Raises AdapterFileError."""
    with refusing("not a readable JSON file", file):
        if file.stat().st_size > _SIZE_LIMIT:
            raise ValueError(f"larger than {_SIZE_LIMIT} bytes")
        raw = json.loads(file.read_bytes().decode("utf-8"))
        if problem := _problem(raw):
            raise AdapterFileError(problem)
    values = {field: raw.get(field, default) for field, default in PEFT_DEFAULTS.items()}
    values |= {field: None for field in _SELECTION if values[field] in ("", [])}
    if isinstance(values["target_modules"], str):
        values["layers_to_transform"] = values["layers_pattern"] = None  # PEFT ignores them beside a pattern
    # PEFT records its version since 0.18, which changed the series.
    is_old = [int(number) for number in re.findall(r"\d{1,6}", raw.get("peft_version") or "0.0")[:2]] < [0, 18]
    values["neumann_series"] = "unhalved" if is_old and raw.get("use_cayley_neumann") is True else "halved"
    values["coft_radius"] = "peft" if values["coft"] else "paper"
    own = raw.get(OWN_KEY, {}).get("config", {})
    try:
        config = replace(OFTConfig(**values), **{key: value for key, value in own.items() if key in OWN_FIELDS})
    except (ValueError, TypeError) as error:
        raise AdapterFileError(f"{file}: {first_line(error)}") from None
    return config, raw


def _problem(raw: Any) -> str:
    """Why a file's content is no configuration that can be read, with the remedy; empty where it is one."""
    if not isinstance(raw, dict):
        return f"holds a {type(raw).__name__} where an object is expected; copy the file again"
    own = raw.get(OWN_KEY, {})
    is_own = isinstance(own, dict) and all(isinstance(own[key], _OWN_TYPES.get(key, object)) for key in own)
    prints, types = (own.get(key, {}).values() if is_own else () for key in ("fingerprint", "layer_types"))
    is_text = all(isinstance(one, str) for one in (*prints, *types)) and all(":" in one for one in prints)
    if not is_own or not is_text:
        return f"{OWN_KEY} has a field of a wrong type; copy the file again"
    if own.get("version", OWN_VERSION) > OWN_VERSION:
        return "written by a newer lightning_oft; upgrade it to read this adapter"
    if raw.get("peft_type") != "OFT":
        return f"peft_type is {raw.get('peft_type')!r}, not 'OFT'; only OFT adapters are read"
    if "oft_block_size" not in raw:
        return "no oft_block_size, so it was written before PEFT 0.14; train the adapter again"
    if not raw["oft_block_size"] and not raw.get("r"):
        return "neither r nor oft_block_size is given; write the one it was trained with"
    version = raw.get("peft_version") or "0.0"
    if not isinstance(version, str) or re.match(r"\d{1,6}\.\d{1,6}", version) is None:
        return f"peft_version={version!r} is no version; write that of the PEFT it was saved with"
    lost = [field for field in PEFT_DEFAULTS if OWN_KEY in raw and field not in raw]
    if lost:  # PEFT's default in its place would be another adapter
        return f"lacks {', '.join(lost)}, which this library writes; copy the file again"
    return ""
