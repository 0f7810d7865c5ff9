"""The words of an adapter directory in PEFT's format: its files, its keys, and the fields of its configuration.

Keys are PEFT's: `base_model.model.<layer>.oft_R.weight`, `.oft_embedding_R.weight` for embeddings, `.oft_R.<part>.weight`
(ours) for the parts of a layer that has several, and plain names for what was trained whole.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Any, NamedTuple

from lightning_oft.layers.base import layer_type_named

CONFIG_FILE = "adapter_config.json"
TENSOR_FILE = "adapter_model.safetensors"
PICKLE_FILE = "adapter_model.bin"
PREFIX = "base_model.model."
OWN_KEY = "lightning_oft"
OWN_VERSION = 1
"""Version of what stands under our own key; a reader refuses a higher one."""
PEFT_VERSION = "0.21.2"
"""The version whose format we write."""
UNHALVED_VERSION = "0.17.1"
"""The last version whose series did not halve its last term; PEFT itself warns of a file of then."""

PEFT_DEFAULTS: dict[str, Any] = {
    "r": 0,
    "oft_block_size": None,
    "module_dropout": 0.0,
    "target_modules": None,
    "exclude_modules": None,
    "fan_in_fan_out": False,
    "bias": "none",
    "init_weights": True,
    "layers_to_transform": None,
    "layers_pattern": None,
    "modules_to_save": None,
    "coft": False,
    "eps": 6e-5,
    "block_share": False,
    "use_cayley_neumann": True,
    "num_cayley_neumann_terms": 5,
    "task_type": None,
}
"""Fields of OFTConfig that are PEFT's too, and what PEFT takes where a file lacks them."""
OWN_FIELDS = (
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "modules_to_save",
    "fan_in_fan_out",
    "coft",
    "eps",
    "max_angle",
    "coft_radius",
    "neumann_series",
)
"""Fields whose true value stands under our own key: PEFT has none of them, or is told something else."""

_IMPLIED = {"oft_R": "linear", "oft_embedding_R": "embedding"}
"""The layer type that a key stands for where the file does not say another."""
_PARTS = ("in_proj", "q_proj", "k_proj", "v_proj", "out_proj")
"""Parts that files of version 1 have without saying the layer's type."""
_WRAPPERS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
_ROTATION = re.compile(r"(?:(?P<layer>.+)\.)?(?P<kind>oft_R|oft_embedding_R)(?:\.(?P<inner>.+))?\.weight")


class Key(NamedTuple):
    """What a key of the tensor file means: a tensor's name, or the layer and part of a generator."""

    name: str
    part: str = ""
    layer_type: str | None = None
    """Of a generator, else None."""


def parse_key(key: str, layer_types: Collection[str] = ()) -> Key | None:
    """The meaning of a key, with or without PEFT's prefix and the adapter's name; None where it says nothing new.

    PEFT with bias="all" writes the biases of a module in modules_to_save twice more: trained, and as they were.

    Args:
        key: of the tensor file.
        layer_types: names of the layers whose type the configuration says; they may have parts.
    """
    name = strip_wrappers(key.removeprefix(PREFIX))
    match = _ROTATION.fullmatch(name)
    if match is None:
        if any(mark in f".{name}" for mark in (".original_module.", ".modules_to_save.")):
            return None
        return Key(name.replace(".base_layer.", ".").removeprefix("base_layer."))
    layer, last = match["layer"] or "", (match["inner"] or "").rsplit(".", 1)[-1]
    part = last if last in _PARTS or layer in layer_types else ""
    return Key(layer, part, _IMPLIED[match["kind"]])


def strip_wrappers(name: str) -> str:
    """A name without the attributes in which torch's wrappers keep a module."""
    return ".".join(piece for piece in name.split(".") if piece not in _WRAPPERS)


def rotation_key(layer: str, layer_type: str, part: str) -> str:
    """The key of a generator: `base_model.model.<layer>.oft_R.weight`."""
    found = layer_type_named(layer_type)
    key = found.peft_key if found is not None else "oft_R"
    return PREFIX + ".".join(piece for piece in (layer, key, part, "weight") if piece)


def is_implied(layer_type: str) -> bool:
    """Whether a reader knows the layer type by the key of its generator."""
    return layer_type in _IMPLIED.values()
