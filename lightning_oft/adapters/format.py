"""The format of an adapter directory: its files, its keys, and what a reader makes of them.

Nothing here touches a model. Keys are PEFT's: `base_model.model.<layer>.oft_R.weight`, `.oft_embedding_R.weight` for
embeddings, `.oft_R.<part>.weight` (ours) for the parts of an nn.MultiheadAttention, and plain names for what was
trained whole.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from lightning_oft.config import OFTConfig

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

_PARTS = ("in_proj", "q_proj", "k_proj", "v_proj", "out_proj")
_WRAPPERS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
_ROTATION = re.compile(r"(?:(?P<layer>.+)\.)?(?P<kind>oft_R|oft_embedding_R)(?:\.(?P<inner>.+))?\.weight")


def printable(text: str, limit: int = 1000) -> str:
    """One line of bounded length: names and values come from a file, which may hold control characters or megabytes."""
    if len(text) > limit:  # the remedy stands at the end
        text = f"{text[: limit - 300]} ... {text[-300:]}"
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


class AdapterFileError(ValueError):
    """An adapter directory that cannot be read, written or put on this model: where, what, remedy. Nothing changed."""

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


@dataclass(frozen=True)
class AdapterFile:
    """What an adapter directory holds. Names are relative to the module that the file is rooted at.

    Attributes:
        directory: where it was read.
        config: the adapter's configuration.
        rotations: generators in this library's convention, (n, b(b-1)/2) float32, by layer; the parts of an
            nn.MultiheadAttention as `<layer>.<part>`.
        saved: tensors trained whole (modules_to_save and biases), as stored.
        embeddings: those names of `rotations` that turn the output of an embedding.
        fingerprint: fingerprints of the base weights by layer; None in a file of PEFT's.
        root: name of the module that the names start at, in the model that was saved; None in a file of PEFT's.
        extra: the other fields of `adapter_config.json`, such as `base_model_name_or_path` and `peft_version`.
    """

    directory: Path
    config: OFTConfig
    rotations: dict[str, Tensor]
    saved: dict[str, Tensor]
    embeddings: frozenset[str]
    fingerprint: dict[str, str] | None
    root: str | None
    extra: dict[str, Any]


class Key(NamedTuple):
    """What a key of the tensor file means: the name of a layer or tensor, and whether a generator is stored there."""

    name: str
    is_rotation: bool = False
    is_embedding: bool = False


def parse_key(key: str) -> Key | None:
    """The meaning of a key, with or without PEFT's prefix and the adapter's name; None where it says nothing new.

    PEFT with bias="all" writes the biases of a module in modules_to_save twice more: trained, and as they were.
    """
    name = ".".join(piece for piece in key.removeprefix(PREFIX).split(".") if piece not in _WRAPPERS)
    match = _ROTATION.fullmatch(name)
    if match is None:
        if any(mark in f".{name}" for mark in (".original_module.", ".modules_to_save.")):
            return None
        return Key(name.replace(".base_layer.", ".").removeprefix("base_layer."))
    layer, part = match["layer"] or "", (match["inner"] or "").rsplit(".", 1)[-1]
    if part in _PARTS:
        layer = f"{layer}.{part}" if layer else part
    return Key(layer, True, match["kind"] == "oft_embedding_R")


def rotation_key(layer: str, file_key: str, part: str) -> str:
    """The key of a generator: `base_model.model.<layer>.oft_R.weight`."""
    return PREFIX + ".".join(piece for piece in (layer, file_key, part, "weight") if piece)


def joined(root: str, name: str) -> str:
    """The name of a module below a root."""
    return f"{root}.{name}" if root and name else root or name
