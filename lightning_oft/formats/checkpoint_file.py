"""What a checkpoint file says of adapters. Anybody may have written it: nothing in it runs, and it is checked."""

import zipfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_oft.config import OFTConfig
from lightning_oft.formats.errors import CheckpointError as CheckpointError
from lightning_oft.formats.errors import refusing
from lightning_oft.formats.peft_tensors import IMPLIED_TYPES, check_generator, check_magnitude, strip_wrappers
from lightning_oft.functional import generator_size
from lightning_oft.model.adapter_state import AdapterState, Base, LayerRotations, copied, modules_trained_whole
from lightning_oft.model.traversal import some

ENTRY = "lightning_oft"
VERSION = 1

NOTE = (
    "lightning_oft: rotations of an adapter: resume with OFTFinetuning in Trainer(callbacks=[...]), read with "
    "lightning_oft.load_from_checkpoint"
)
"""For a reader without the callback. It stands as a name in the state dict of an adapter-only checkpoint too: torch's
list of unexpected keys is the only thing that such a run says, and begins with it."""

_MAKERS = (None, "lightning.pytorch.cli.instantiate_module", "pytorch_lightning.cli.instantiate_module")
"""What may stand under the `_instantiator` of the hyperparameters, which Lightning imports and calls."""


def read(path: str | Path, map_location: Any = "cpu") -> dict[str, Any]:
    """The content of a checkpoint file; nothing in it can run code.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: it is no checkpoint, is damaged, or holds more than tensors and primitives.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such checkpoint file; give one that ModelCheckpoint wrote")
    what = "is no checkpoint, is damaged, or holds more than tensors and plain values, such as objects of your own"
    with refusing(what, path, CheckpointError):
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                unpacked, size = sum(item.file_size for item in archive.infolist()), path.stat().st_size
            if unpacked > size:  # torch.save compresses nothing; a file that does could grow a thousandfold in memory
                raise ValueError(f"declares {unpacked} bytes in a file of {size}")
        checkpoint = torch.load(path, map_location=map_location, weights_only=True)
        if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("state_dict"), dict):
            raise CheckpointError("has no state_dict; give a file that Lightning's ModelCheckpoint wrote")
        read_states(checkpoint)
        maker = (checkpoint.get("hyper_parameters") or {}).get("_instantiator")
        if maker not in _MAKERS:
            raise CheckpointError(
                f"asks for {str(maker)[:100]!r} to be called, which is not Lightning's own; load it where you trust "
                "it, and save it again without"
            )
    return checkpoint


def is_rotation_key(name: str) -> bool:
    """Whether a state-dict name is a generator's."""
    return ".oft_R." in f".{name}"


def generator_key(layer: str, adapter_name: str, part: str, tensor: str = "weight") -> str:
    """The state-dict name of a generator, or of another tensor of a rotation."""
    return ".".join(filter(None, (layer, "oft_R", adapter_name, part, tensor)))


def to_primitives(state: AdapterState) -> dict[str, Any]:
    """An adapter without its generators, which stand in the state dict; by names of the LightningModule."""
    full = state.rooted("")
    return {
        "config": asdict(state.config),
        "root": state.root or "",
        "layers": {name: one.block_sizes for name, one in full.layers.items()},
        "kinds": {name: one.layer_type for name, one in full.layers.items()},
        "known_to_peft": full.known_to_peft(),
        "exact": {name: list(one.exact_parts) for name, one in full.layers.items() if one.exact_parts},
        "fingerprints": full.fingerprints,
        "owned": list(full.saved),
        "modules_to_save": full.modules_to_save,
        "carried": {name: copied(tensor) for name, tensor in full.carried.items()},
        "has_unique_names": state.has_unique_names,
        "base": list(state.base or ()),
    }


def read_states(checkpoint: Mapping[str, Any]) -> list[AdapterState]:
    """The adapters in a checkpoint; a merged one has no generators. Raises CheckpointError for damaged ones."""
    with refusing("its adapters are damaged", error_class=CheckpointError):
        entry = checkpoint.get(ENTRY, {})
        if entry.get("version", VERSION) > VERSION:
            raise CheckpointError("written by a newer lightning_oft; upgrade it to read this checkpoint")
        on = entry.get("active_on") or {}
        if not all(isinstance(names, list) for names in (entry.get("active", []), *on.values())):
            raise ValueError("its active adapters")
        merged = bool(entry.get("merged"))
        state_dict = (checkpoint.get("state_dict", {}) | entry.get("apart", {})).items()
        tensors = {strip_wrappers(name): v for name, v in state_dict if not (merged and is_rotation_key(name))}
        # Checkpoints of earlier versions do not name the base; the shipped tasks keep it where they were given it.
        path = (checkpoint.get("hyper_parameters") or {}).get("pretrained")
        base = Base("", "", path if isinstance(path, str) else None)
        adapters = entry.get("adapters", {}).items()
        states = [_read_state(name, content, tensors, entry.get("waiting", {}), base) for name, content in adapters]
        for state in states if tensors and not merged else ():
            if lacking := [n for n, one in state.layers.items() if one.generators.keys() != one.block_sizes.keys()]:
                raise CheckpointError(
                    f"lacks generators of {some(lacking)}, which adapter {state.name!r} turns; copy it again"
                )
        return states


def _read_state(
    name: str, content: Mapping[str, Any], tensors: Mapping[str, Any], waiting: Mapping[str, Any], base: Base
) -> AdapterState:
    config, kinds, known = OFTConfig(**content["config"]), content.get("kinds", {}), content.get("known_to_peft")
    layers = {}
    for layer, sizes in content["layers"].items():
        generators, magnitudes = {}, {}
        for part, size in sizes.items():
            if (key := generator_key(layer, name, part)) in tensors:
                check_generator(key, tensors[key])
                if tensors[key].shape[1] != generator_size(size):
                    raise ValueError(f"{key} holds no blocks of {size}")
                generators[part] = tensors[key]
            if (key := generator_key(layer, name, part, "magnitude")) in tensors:
                check_magnitude(key, tensors[key])
                magnitudes[part] = tensors[key]
        # Files that do not say it may hold convolutions, of which PEFT computes some otherwise.
        is_known = layer in known if known is not None else kinds.get(layer) in IMPLIED_TYPES
        exact = tuple(part for part in sizes if part in content.get("exact", {}).get(layer, ()))
        layers[layer] = LayerRotations(kinds.get(layer, ""), is_known, dict(sizes), generators, exact, magnitudes)
    owned = list(content["owned"])
    if "modules_to_save" not in content:  # earlier versions name a tied tensor once
        memory = {tensors[key].data_ptr() for key in owned if key in tensors}
        owned += [key for key, value in tensors.items() if getattr(value, "data_ptr", int)() in memory]
    saved = {key: waiting.get(key, {}).get(name, tensors.get(key)) for key in owned}
    fingerprints = {layer: value for layer, value in content["fingerprints"].items() if value is not None}
    if not all(":" in value for value in fingerprints.values()):
        raise ValueError("its fingerprints")
    return AdapterState(
        name=name,
        config=config,
        layers=layers,
        root="",
        saved={key: tensor for key, tensor in saved.items() if isinstance(tensor, Tensor)},
        modules_to_save=content.get("modules_to_save", modules_trained_whole(saved, config)),
        carried=content.get("carried", {}),
        fingerprints=fingerprints,
        base=Base(*content["base"]) if content.get("base") else base,
        has_unique_names=bool(content.get("has_unique_names", True)),
    ).rooted(str(content.get("root", "")))
