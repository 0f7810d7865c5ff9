"""`adapter_config.json`: PEFT's fields, and beside them what PEFT has no words for, under a key of this library."""

import json
import re
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from lightning_oft import __version__
from lightning_oft.config import OFTConfig
from lightning_oft.formats.errors import AdapterFileError, first_line, refusing
from lightning_oft.formats.peft_tensors import IMPLIED_TYPES
from lightning_oft.model.adapter_state import AdapterState, Base

CONFIG_FILE = "adapter_config.json"
OWN_KEY = "lightning_oft"
OWN_VERSION = 1
"""Version of what stands under our own key; a reader refuses a higher one."""
PEFT_VERSION = "0.21.2"
"""The version whose format we write."""
UNHALVED_VERSION = "0.17.1"
"""The last version whose series did not halve its last term."""

_UNKNOWN_TO_PEFT = ("max_angle", "coft_radius", "neumann_series")
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


def to_json(state: AdapterState, sha256: str) -> str:
    """The content of `adapter_config.json` beside tensors of this digest; sorted, so that equal adapters are equal files."""
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
    if (
        not is_own
        or not all(isinstance(value, str) for value in (*prints, *types))
        or any(":" not in p for p in prints)
    ):
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
