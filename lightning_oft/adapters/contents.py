"""What an adapter's files will hold: taken from a model, merged or not, and complete before anything is written."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_oft import __version__
from lightning_oft.config import OFTConfig
from lightning_oft.layers import LayerState, rotations_of, state_of
from lightning_oft.surgery import adapter_names, oft_layers, trained, walk
from lightning_oft.surgery.sharded import whole
from lightning_oft.surgery.targets import matches, saved_names
from lightning_oft.surgery.walk import library_root, some

from .format import (
    OWN_FIELDS,
    OWN_KEY,
    OWN_VERSION,
    PEFT_DEFAULTS,
    PEFT_VERSION,
    PREFIX,
    UNHALVED_VERSION,
    joined,
    rotation_key,
)

log = logging.getLogger(__name__)

_QUANTIZED = ("bitsandbytes", "hqq", "torchao", "aqlm", "awq", "gptqmodel", "auto_gptq", "eetq", "neural_compressor")
"""Packages whose linear layers PEFT knows without their being an nn.Linear."""


class Contents(NamedTuple):
    """An adapter as its files will hold it: tensors on the CPU by key, the configuration, and what PEFT will not do."""

    tensors: dict[str, Tensor]
    config: dict[str, Any]
    notes: list[str]


class _Taken(NamedTuple):
    """The layers of one adapter and what it trained whole, by names relative to the model it was taken from."""

    name: str
    config: OFTConfig
    layers: dict[str, nn.Module]
    saved: dict[str, Tensor]


@torch.no_grad()
def contents_of(model: nn.Module, adapter_name: str = "default") -> Contents:
    """What `save_adapter` writes. Every process must call it where generators are sharded; one writes.

    Args:
        model: a model with adapters, merged or not.
        adapter_name: the adapter to take.

    Raises:
        ValueError: there is no such adapter, or a generator is not finite; names it.
    """
    taken = _take(model, adapter_name)
    root_name, root = library_root(model, [*taken.layers, *taken.saved])
    log.info("adapter %r: names start at %s (%s)", adapter_name, root_name or "the model", type(root).__name__)
    taken = _rooted(taken, root_name)
    known = {name: layer for name, layer in taken.layers.items() if _peft_knows(layer)}
    tensors = _tensors(taken, known)
    modules = _saved_modules(root, taken)
    tensors.update(_swept_along(root, taken, modules, tensors))
    return Contents(tensors, _config(root, root_name, taken, known, modules), _notes(taken, known))


def _take(model: nn.Module, adapter_name: str) -> _Taken:
    if adapter_name not in adapter_names(model):
        raise ValueError(
            f"no adapter {adapter_name!r} here; there are: {', '.join(adapter_names(model)) or 'none, call inject first'}"
        )
    layers = {name: layer for name, layer in oft_layers(model).items() if adapter_name in _state(layer).configs}
    config = _state(next(iter(layers.values()))).configs[adapter_name]
    return _Taken(adapter_name, config, layers, _saved(model, adapter_name))


def _saved(model: nn.Module, adapter_name: str) -> dict[str, Tensor]:
    """What the adapter trained whole, by every name it has: a head that shares the embedding's weight trained both."""
    saved = trained.values(model, adapter_name)
    names = {id(tensor): name for name, tensor, _ in trained.slots(model) if name in saved}
    for owner, module in walk(model):
        for key, parameter in module._parameters.items():
            if id(parameter) in names and joined(owner, key) not in saved and state_of(module) is None:
                saved[joined(owner, key)] = saved[names[id(parameter)]]
    return saved


def _state(layer: nn.Module) -> LayerState:
    state = state_of(layer)
    assert state is not None
    return state


def _rooted(taken: _Taken, root: str) -> _Taken:
    cut = len(root) + 1 if root else 0
    layers = {name[cut:]: layer for name, layer in taken.layers.items()}
    return taken._replace(layers=layers, saved={name[cut:]: tensor for name, tensor in taken.saved.items()})


def _peft_knows(layer: nn.Module) -> bool:
    """Whether PEFT computes the same with this layer: it folds overlapping patches of larger kernels, for one."""
    kind = _state(layer).kind.name
    if kind == "linear":
        return isinstance(layer, nn.Linear) or type(layer).__module__.split(".")[0] in _QUANTIZED
    if kind == "convolution":
        return isinstance(layer, nn.Conv2d) and set(layer.kernel_size) == {1} and layer.groups == 1
    return kind == "embedding"


def _copied(tensor: Tensor) -> Tensor:
    """A copy on the CPU with memory of its own; a sharded tensor is gathered."""
    return whole(tensor).detach().to("cpu", copy=True).contiguous()


def _tensors(taken: _Taken, known: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    sign = 1 if taken.config.use_cayley_neumann else -1  # PEFT's exact map is the transpose of ours
    tensors: dict[str, Tensor] = {}
    broken = []
    for name, layer in taken.layers.items():
        for part, rotation in rotations_of(layer, taken.name).items():
            generator = _copied(rotation.weight)
            if not bool(generator.isfinite().all()):
                broken.append(name)
            tensors[rotation_key(name, _state(layer).kind.file_key, part)] = sign * generator
    if broken:
        raise ValueError(
            f"generators of {some(broken)} are NaN or infinite; nothing was written: load an earlier state of the adapter"
        )
    for name, tensor in taken.saved.items():
        owner, _, key = name.rpartition(".")
        place = f"{owner}.base_layer.{key}" if owner and owner in known and key == "bias" else name
        tensors[PREFIX + place] = _copied(tensor)
    return tensors


def _saved_modules(root: nn.Module, taken: _Taken) -> list[str]:
    """Full names of the modules trained whole, the outermost of each."""
    items = [item for items in saved_names(taken.config) for item in items]
    found: list[str] = []
    for name, module in walk(root):
        named = any(matches(name, [item]) or item.endswith(f".{name}") for item in items)
        owned = [f"{name}.{key}" for key in trained.own_tensors(module)]
        direct = any(key in taken.saved and "bias" not in key.rpartition(".")[2] for key in owned)
        below = any(key.startswith(f"{name}.") for key in taken.saved)
        if name and ((named and below) or direct) and not _below(name, found):
            found.append(name)
    return found


def _below(name: str, modules: Iterable[str]) -> bool:
    return any(name == module or name.startswith(f"{module}.") for module in modules)


def _swept_along(
    root: nn.Module, taken: _Taken, modules: list[str], tensors: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Base values of what PEFT will take for a module to save: it asks for names *ending* in `classifier`, so that
    `pre_classifier` is one too, and refuses a file without its tensors."""
    _, implied = saved_names(taken.config)
    found = {}
    for name, module in walk(root):
        swept = any(name.endswith(item) for item in (*modules, *implied))
        if not swept or any(_below(layer, [name]) for layer in taken.layers):
            continue
        for owner, below in walk(module):
            for key in trained.own_tensors(below):
                place = PREFIX + ".".join(piece for piece in (name, owner, key) if piece)
                if place not in tensors:
                    found[place] = _copied(trained.tensor_of(below, key))
    return found


def _target_modules(root: nn.Module, names: list[str]) -> list[str] | str:
    """The full names; as a pattern where PEFT, which also compares the ends of names, would find more by them."""
    others = [name for name, _ in walk(root) if name not in set(names)]
    if any(matches(name, names) for name in others):
        return "|".join(re.escape(name) for name in names)
    return names


def _config(
    root: nn.Module, root_name: str, taken: _Taken, known: Mapping[str, nn.Module], modules: list[str]
) -> dict[str, Any]:
    fields = asdict(taken.config)
    fingerprints = {name: _state(layer).fingerprint for name, layer in taken.layers.items()}
    auto_mapping = {"base_model_class": type(root).__name__, "parent_library": type(root).__module__}
    return {
        "peft_type": "OFT",
        "auto_mapping": None if taken.config.task_type else auto_mapping,
        "base_model_name_or_path": _name_or_path(root),
        "revision": None,
        "inference_mode": True,
        "peft_version": PEFT_VERSION if taken.config.neumann_series == "halved" else UNHALVED_VERSION,
        **{field: fields[field] for field in PEFT_DEFAULTS},
        "target_modules": _target_modules(root, list(known)),
        "exclude_modules": None,
        "layers_to_transform": None,
        "layers_pattern": None,
        "modules_to_save": modules or None,
        "fan_in_fan_out": False,
        "coft": False,  # the projection is in the tensors; PEFT would project again, into a smaller ball
        OWN_KEY: {
            "version": OWN_VERSION,
            "written_by": __version__,
            "root": root_name,
            "config": {field: fields[field] for field in OWN_FIELDS},
            "fingerprint": {name: value for name, value in fingerprints.items() if value is not None},
        },
    }


def _name_or_path(root: nn.Module) -> str | None:
    config = getattr(root, "config", None)
    name = config.get("_name_or_path") if isinstance(config, Mapping) else getattr(config, "_name_or_path", None)
    return name if isinstance(name, str) and name else None


def _notes(taken: _Taken, known: Mapping[str, nn.Module]) -> list[str]:
    notes = []
    unknown = [name for name in taken.layers if name not in known]
    if unknown:
        notes.append(
            f"PEFT cannot represent the rotations of {some(unknown, 20)}: they are in the file for this library, and "
            "PEFT will load the adapter without them"
        )
    if taken.config.neumann_series == "unhalved":
        notes.append(
            "this adapter uses the series of PEFT before 0.18, kept under our own key; PEFT 0.18 and later halve its "
            "last term and compute a slightly different rotation"
        )
    return notes
