"""Finding the place of an adapter's names and shapes in a model, before any of its values is read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lightning_oft.layers import kind_of, refusal
from lightning_oft.layers.kinds import Kind
from lightning_oft.surgery import Target, trained, walk
from lightning_oft.surgery.targets import matches
from lightning_oft.surgery.walk import class_names, some

from .format import AdapterFileError, joined
from .reading import Listing

Modules = dict[str, nn.Module]


class Fit(NamedTuple):
    """Where an adapter goes. `targets` and `sizes` are by names relative to the model, the rest by the file's names."""

    prefix: str
    root: nn.Module
    targets: dict[str, Target]
    sizes: dict[str, dict[str, int]]
    rotations: dict[str, tuple[nn.Module, str]]
    saved: dict[str, tuple[nn.Module, str]]
    expected: set[str]


def fit(model: nn.Module, listing: Listing) -> Fit:
    """Find the module that the file's names start at, and check every shape against the model.

    Raises:
        AdapterFileError: a layer or tensor is missing or has another shape, or the place is ambiguous; names them.
    """
    modules = dict(walk(model))
    prefix = _find_prefix(modules, listing)
    rotations = {name: _owner(modules, joined(prefix, name)) for name in listing.rotations}
    sizes: dict[str, dict[str, int]] = {}
    for name, place in rotations.items():
        assert place is not None
        sizes.setdefault(place[0], {})[place[1]] = _check_rotation(modules[place[0]], place[1], name, listing)
    targets = {}
    for name, module in modules.items():
        kind = kind_of(module)
        if name in sizes and kind is not None:
            targets[name] = Target(module, kind, tuple(part for part in kind.parts(module) if part in sizes[name]))
    places = {name: spot for name in listing.saved if (spot := _tensor_place(modules, joined(prefix, name)))}
    for name, (module, key) in places.items():
        _check_saved(name, trained.tensor_of(module, key), listing)
    found = {name: (modules[place[0]], place[1]) for name, place in rotations.items() if place}
    root = modules[prefix]
    return Fit(prefix, root, targets, sizes, found, places, _expected(root, listing, found))


def base_value(module: nn.Module, key: str) -> Tensor:
    """The base's own value of a tensor, whoever's is in it now."""
    slot = trained.slots_of(module).get(key)
    live = slot is None or slot.live == trained.BASE
    return trained.tensor_of(module, key).detach() if live or slot is None else slot.waiting[trained.BASE]


def torn(model: nn.Module, where: Fit, saved: Mapping[str, Tensor]) -> list[str]:
    """Names of trained tensors that share their memory in the model with one that the file has other values for.

    PEFT trains a copy of such a head, so that the embedding it is tied to stays what it was.
    """
    theirs = {(id(module), key): saved[name] for name, (module, key) in where.saved.items() if name in saved}
    holders: dict[int, list[tuple[int, str]]] = {}
    for _, module in walk(model):
        for key, parameter in module._parameters.items():
            holders.setdefault(id(parameter), []).append((id(module), key))
    found = []
    for name, value in saved.items():
        others = holders.get(id(trained.tensor_of(*where.saved[name])), [])
        if any(spot not in theirs or not torch.equal(theirs[spot], value) for spot in others):
            found.append(name)
    return found


def _owner(modules: Modules, name: str) -> tuple[str, str] | None:
    """(layer, part) that a rotation's name means: a layer, or a part of an nn.MultiheadAttention."""
    above, _, part = name.rpartition(".")
    kind = kind_of(modules[above]) if above in modules and above != name else None
    if kind is not None and kind.name == "attention" and part in kind.parts(modules[above]):
        return above, part
    return (name, "") if name in modules else None


def _tensor_place(modules: Modules, name: str) -> tuple[nn.Module, str] | None:
    above, _, key = name.rpartition(".")
    module = modules.get(above)
    if module is None and "" in modules:  # a second name of a shared module
        try:
            module = modules[""].get_submodule(above)
        except AttributeError:
            return None
    if module is None or key not in {**module._parameters, **module._buffers}:
        return None
    return module, key


def _missing(modules: Modules, prefix: str, listing: Listing) -> list[str]:
    lost = [name for name in listing.rotations if _owner(modules, joined(prefix, name)) is None]
    return lost + [name for name in listing.saved if _tensor_place(modules, joined(prefix, name)) is None]


def _fits(modules: Modules, prefix: str, listing: Listing) -> bool:
    return all(_owner(modules, joined(prefix, name)) for name in listing.rotations) and all(
        _tensor_place(modules, joined(prefix, name)) for name in listing.saved
    )


def _find_prefix(modules: Modules, listing: Listing) -> str:
    """The module below which every name of the file exists: where it was, the model, a model inside it, any module."""
    inner = [name for name, module in modules.items() if class_names(module) & {"PreTrainedModel", "ModelMixin"}]
    stored = [listing.root] if listing.root in modules and listing.root is not None else []
    for candidates in (stored, [""], inner, list(modules)):
        found = [prefix for prefix in candidates if _fits(modules, prefix, listing)]
        if len(found) == 1:
            return found[0]
        if found:
            raise AdapterFileError(
                f"{listing.directory}: its names fit {some(found)} alike; load it into the one that you mean, "
                f"load_adapter(model.{found[0]}, ...)"
            )
    best = min([*stored, "", *inner], key=lambda prefix: len(_missing(modules, prefix, listing)))
    lost = _missing(modules, best, listing)
    raise AdapterFileError(
        f"{listing.directory}: {best or 'the model'} has no {some(lost)}; load the adapter into the model it was trained on"
    )


def _check_rotation(module: nn.Module, part: str, name: str, listing: Listing) -> int:
    """The block size of a rotation. Raises AdapterFileError where the layer cannot take it."""
    where = f"{listing.directory}: {name or 'the model itself'}"
    kind = kind_of(module)
    if kind is None or part not in kind.parts(module):
        raise AdapterFileError(
            f"{where} is a {type(module).__name__}, which this rotation does not fit; use its own model"
        )
    reason = refusal(module)
    if reason is not None:
        raise AdapterFileError(f"{where} cannot be adapted: {reason}")
    if _is_meta(kind, module):
        raise AdapterFileError(f"{where} is on the meta device: give the model its weights before loading an adapter")
    if (kind.file_key == "oft_embedding_R") != (name in listing.embeddings):
        stored = "an embedding's rotation" if name in listing.embeddings else "the rotation of an input"
        raise AdapterFileError(f"{where} is a {type(module).__name__}, the file holds {stored}; use its own model")
    fan_in = kind.parts(module)[part].fan_in
    stored_blocks, size = listing.block(name)
    fits = stored_blocks == 1 and fan_in % size == 0 if listing.config.block_share else stored_blocks * size == fan_in
    if not fits:
        shared = " with one shared block" if listing.config.block_share else ""
        raise AdapterFileError(
            f"{where} has fan-in {fan_in}, the file's {stored_blocks} blocks of {size}{shared} turn "
            f"{'another one' if shared else stored_blocks * size}; load the adapter into the model it was trained on"
        )
    return size


def _is_meta(kind: Kind, module: nn.Module) -> bool:
    return any(parameter.is_meta for parameter in module.parameters(recurse=kind.name == "attention"))


def _check_saved(name: str, tensor: Tensor, listing: Listing) -> None:
    shape = listing.shapes[listing.saved[name]]
    if shape != tuple(tensor.shape):
        raise AdapterFileError(
            f"{listing.directory}: {name} has shape {tuple(tensor.shape)} in the model and {shape} in the file; build the "
            "model with the sizes it was trained with (number of classes, resized vocabulary)"
        )


def _expected(root: nn.Module, listing: Listing, rotations: dict[str, tuple[nn.Module, str]]) -> set[str]:
    """Names of the tensors that the configuration says were trained whole. Raises where the file lacks one."""
    expected = set()
    names = listing.saved_modules
    for name, module in walk(root):
        # Ours are whole names; PEFT also compares their ends.
        if name and (name in names if listing.root is not None else matches(name, names)):
            for owner, below in walk(module):
                expected |= {joined(joined(name, owner), key) for key in trained.own_tensors(below)}
    if listing.config.bias != "none":
        expected |= {joined(name, "bias") for name, (layer, part) in rotations.items() if not part and _bias(layer)}
    lost = [name for name in sorted(expected) if name not in listing.saved]
    if lost:
        raise AdapterFileError(
            f"{listing.directory}: its configuration says that {some(lost)} were trained, and the file lacks them; save it again"
        )
    return expected | ({name for name in listing.saved if "bias" in name} if listing.config.bias != "none" else set())


def _bias(layer: nn.Module) -> bool:
    return layer._parameters.get("bias") is not None
