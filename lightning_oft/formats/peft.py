"""Adapter directories in PEFT's format; what PEFT cannot say stands beside it under our own key."""

from __future__ import annotations

import hashlib
import json
import re
import warnings
from collections.abc import Collection
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor

from lightning_oft import __version__
from lightning_oft.formats.atomic import write_directory
from lightning_oft.formats.errors import AdapterFileError
from lightning_oft.formats.peft_keys import (
    CONFIG_FILE,
    OWN_FIELDS,
    OWN_KEY,
    OWN_VERSION,
    PEFT_DEFAULTS,
    PEFT_VERSION,
    PREFIX,
    TENSOR_FILE,
    UNHALVED_VERSION,
    is_implied,
    rotation_key,
)
from lightning_oft.model.adapter_state import AdapterState
from lightning_oft.model.traversal import some


def write_peft(state: AdapterState, directory: str | Path) -> Path:
    """Write `adapter_config.json` and `adapter_model.safetensors`, which PEFT reads too.

    What PEFT cannot represent is written with a warning that names the layers. An interrupted or failing write leaves
    what was there before, or a directory that every reader refuses.

    Raises:
        AdapterFileError: the directory cannot be written.
    """
    tensors = save(peft_tensors(state), metadata={"format": "pt"})
    config = peft_config(state)
    config[OWN_KEY]["sha256"] = hashlib.sha256(tensors).hexdigest()
    text = json.dumps(config, indent=2, allow_nan=False) + "\n"

    def write(place: Path) -> None:
        (place / TENSOR_FILE).write_bytes(tensors)
        (place / CONFIG_FILE).write_text(text, encoding="utf-8")

    try:
        write_directory(Path(directory), write, order=(TENSOR_FILE, CONFIG_FILE))
    except OSError as error:
        raise AdapterFileError(
            f"{directory}: the adapter cannot be written ({error.strerror or error}); what was there is unchanged: "
            "free space there or give another directory"
        ) from None
    for note in _notes(state):
        warnings.warn(note, stacklevel=3)
    return Path(directory)


def peft_tensors(state: AdapterState) -> dict[str, Tensor]:
    """The tensors of the file by key."""
    sign = 1 if state.config.use_cayley_neumann else -1  # PEFT's exact map is the transpose of ours
    known = _known_to_peft(state)
    tensors = {
        rotation_key(name, rotations.layer_type, part): (sign * generator.float()).contiguous()
        for name, rotations in state.layers.items()
        for part, generator in rotations.generators.items()
    }
    for name, tensor in (state.saved | state.carried).items():
        owner, _, key = name.rpartition(".")
        # PEFT wraps the layers it adapts, and keeps the layer itself as `base_layer`.
        place = f"{owner}.base_layer.{key}" if owner and owner in known and key == "bias" else name
        tensors[PREFIX + place] = tensor.contiguous()
    return tensors


def _known_to_peft(state: AdapterState) -> list[str]:
    return [name for name, rotations in state.layers.items() if rotations.is_known_to_peft]


def peft_config(state: AdapterState) -> dict[str, Any]:
    """The content of `adapter_config.json`."""
    fields, base, known = asdict(state.config), state.base, _known_to_peft(state)
    names: list[str] | str = known if state.has_unique_names else "|".join(re.escape(name) for name in known)
    mapping = {"base_model_class": base.class_name, "parent_library": base.library} if base is not None else None
    told = {name: one.layer_type for name, one in state.layers.items() if not is_implied(one.layer_type)}
    return {
        "peft_type": "OFT",
        "auto_mapping": None if state.config.task_type else mapping,
        "base_model_name_or_path": base.name_or_path if base is not None else None,
        "revision": None,
        "inference_mode": True,
        "peft_version": PEFT_VERSION if state.config.neumann_series == "halved" else UNHALVED_VERSION,
        **{field: fields[field] for field in PEFT_DEFAULTS},
        "target_modules": names,
        "exclude_modules": None,
        "layers_to_transform": None,
        "layers_pattern": None,
        "modules_to_save": state.modules_to_save or None,
        "fan_in_fan_out": False,
        "coft": False,  # the projection is in the tensors; PEFT would project again, into a smaller ball
        OWN_KEY: {
            "version": OWN_VERSION,
            "written_by": __version__,
            "root": state.root or "",
            "config": {field: fields[field] for field in OWN_FIELDS},
            "fingerprint": dict(state.fingerprints),
            **({"layer_types": {name: kind for name, kind in told.items() if kind}} if any(told.values()) else {}),
        },
    }


def _notes(state: AdapterState) -> list[str]:
    """What PEFT will not do with the file."""
    known: Collection[str] = set(_known_to_peft(state))
    unknown = [name for name in state.layers if name not in known]
    notes = []
    if unknown:
        notes.append(
            f"PEFT cannot represent the rotations of {some(unknown, 20)}: they are in the file for this library, and "
            "PEFT will load the adapter without them"
        )
    if state.config.neumann_series == "unhalved":
        notes.append(
            "this adapter uses the series of PEFT before 0.18, kept under our own key; PEFT 0.18 and later halve its "
            "last term and compute a slightly different rotation"
        )
    return notes
