"""Where the names and shapes of an AdapterState are in a model. Everything that does not fit is refused here."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from lightning_oft.codecs import is_sharded
from lightning_oft.functional import block_size_of
from lightning_oft.layers.base import layer_type_named, layer_type_of, refusal
from lightning_oft.model.adapter_state import AdapterState, LayerRotations
from lightning_oft.model.plan import Plan, PlannedLayer
from lightning_oft.model.saved_modules import base_value
from lightning_oft.model.targets import matches, owners_of
from lightning_oft.model.traversal import LIBRARY_MODELS, Modules, class_names, joined, own_tensors, some, tensor_of


class AdapterError(ValueError):
    """An adapter that does not fit a model: where, what, remedy. Nothing changed."""


class PlacedRotation(NamedTuple):
    """Where the generator of one rotation goes, by the layer's name in the model, and what it is."""

    layer: str
    part: str
    generator: Tensor


class Place(NamedTuple):
    """Where a state goes in a model; `saved` by the state's names."""

    root: str
    rotations: list[PlacedRotation]
    saved: dict[str, tuple[nn.Module, str]]


def find_place(modules: Modules, state: AdapterState) -> Place:
    """Find the module that the state's names start at, and check every name and shape against the model."""
    owners = owners_of(modules)
    root = _find_root(modules, owners, state)
    rotations = []
    for name, found in state.layers.items():
        for part, generator in found.generators.items():
            layer, own = _owner(owners, joined(root, name), part)
            _check_rotation(modules[layer], own, name, found, generator, state)
            rotations.append(PlacedRotation(layer, own, generator))
    saved = {name: spot for name in state.saved if (spot := _tensor_place(modules, joined(root, name))) is not None}
    for name, (module, key) in saved.items():
        theirs, mine = tuple(state.saved[name].shape), tuple(tensor_of(module, key).shape)
        if theirs != mine:
            raise AdapterError(
                f"{name} has shape {mine} in the model and {theirs} in the file; build the model with the sizes it was "
                "trained with (number of classes, resized vocabulary)"
            )
    return Place(root, rotations, saved)


def _owner(owners: dict[str, tuple[str, str]], name: str, part: str) -> tuple[str, str]:
    """(layer, part) that a name means: where another layer reads this one's weight, the part of that one."""
    return (name, part) if part or name not in owners else owners[name]


def _tensor_place(modules: Modules, name: str) -> tuple[nn.Module, str] | None:
    above, _, key = name.rpartition(".")
    module = modules.get(above)
    if module is None:  # a second name of a shared module
        try:
            module = modules[""].get_submodule(above)
        except AttributeError:
            return None
    return (module, key) if key in module._parameters or key in module._buffers else None


def _missing(modules: Modules, owners: dict[str, tuple[str, str]], root: str, state: AdapterState) -> list[str]:
    lost = [name for name in state.layers if _owner(owners, joined(root, name), "")[0] not in modules]
    return lost + [name for name in state.saved if _tensor_place(modules, joined(root, name)) is None]


def _find_root(modules: Modules, owners: dict[str, tuple[str, str]], state: AdapterState) -> str:
    """The module below which every name exists: where it was, the model, a model inside it, any module."""
    inner = [name for name, module in modules.items() if class_names(module) & LIBRARY_MODELS]
    stored = [state.root] if state.root is not None and state.root in modules else []
    for candidates in (stored, [""], inner, list(modules)):
        found = [root for root in candidates if not _missing(modules, owners, root, state)]
        if len(found) == 1:
            return found[0]
        if found:
            raise AdapterError(
                f"its names fit {some(found)} alike; load it into the one that you mean, "
                f"load_adapter(model.{found[0]}, ...)"
            )
    best = min([*stored, "", *inner], key=lambda root: len(_missing(modules, owners, root, state)))
    lost = _missing(modules, owners, best, state)
    raise AdapterError(f"{best or 'the model'} has no {some(lost)}; load the adapter into the model it was trained on")


def _check_rotation(
    module: nn.Module, part: str, name: str, found: LayerRotations, generator: Tensor, state: AdapterState
) -> None:
    """Raise AdapterError where a layer cannot take a rotation."""
    where = name or "the model itself"
    layer_type = layer_type_of(module)
    weights = layer_type.rotated_weights(module) if layer_type is not None else {}
    if layer_type is None or part not in weights:
        raise AdapterError(f"{where} is a {type(module).__name__}, which this rotation does not fit; use its own model")
    reason = refusal(module)
    if reason is not None:
        raise AdapterError(f"{where} cannot be adapted: {reason}")
    owner = module.get_submodule(weights[part].parameter.rpartition(".")[0])
    if any(parameter is not None and parameter.is_meta for parameter in owner._parameters.values()):
        raise AdapterError(f"{where} is on the meta device: give the model its weights before loading an adapter")
    theirs = layer_type_named(found.layer_type)
    if theirs is not None and theirs.peft_key != layer_type.peft_key:
        raise AdapterError(
            f"{where} is a {type(module).__name__}, the file holds a rotation of a layer of type {theirs.name}; "
            "use its own model"
        )
    blocks, size, fan = generator.shape[0], block_size_of(generator.shape[1]), weights[part].fan
    fits = blocks == 1 and fan % size == 0 if state.config.block_share else blocks * size == fan
    if not fits:
        shared = " with one shared block" if state.config.block_share else ""
        raise AdapterError(
            f"{where} has fan-in {fan}, the file's {blocks} blocks of {size}{shared} turn "
            f"{'another one' if shared else blocks * size}; load the adapter into the model it was trained on"
        )


def plan_of(modules: Modules, state: AdapterState, place: Place, adapter_name: str) -> Plan:
    """The layers that the state adapts, in the order of the model, with its block sizes."""
    sizes: dict[str, dict[str, int]] = {}
    for rotation in place.rotations:
        sizes.setdefault(rotation.layer, {})[rotation.part] = block_size_of(rotation.generator.shape[1])
    planned = {}
    for name, module in modules.items():
        layer_type = layer_type_of(module) if name in sizes else None
        if layer_type is not None:
            order = [part for part in layer_type.rotated_weights(module) if part in sizes[name]]
            planned[name] = PlannedLayer(module, layer_type, {part: sizes[name][part] for part in order})
    return Plan(adapter_name, state.config, planned)


def expected_tensors(modules: Modules, state: AdapterState, place: Place) -> set[str]:
    """Names of the tensors that the configuration says were trained whole. Raises where the state lacks one."""
    cut = len(place.root) + 1 if place.root else 0
    inside = {name[cut:]: module for name, module in modules.items() if name.startswith(place.root) and name[cut:]}
    heads = state.modules_to_save
    # Ours are whole names; PEFT also compares their ends.
    tops = [name for name in inside if (name in heads if state.root is not None else matches(name, heads))]
    below = {id(module): module for top in tops for module in inside[top].modules()}
    expected = {joined(name, key) for name, m in inside.items() if id(m) in below for key in own_tensors(m)}
    biased = {joined(place.root, name): name for name in state.layers} if state.config.bias != "none" else {}
    for name, own in biased.items():
        if name in modules and modules[name]._parameters.get("bias") is not None:
            expected.add(joined(own, "bias"))
    lost = [name for name in sorted(expected) if name not in state.saved]
    if lost:
        raise AdapterError(
            f"its configuration says that {some(lost)} were trained, and the file lacks them; save it again"
        )
    return expected | {name for name in state.saved if biased and "bias" in name}


def needed_tensors(state: AdapterState, place: Place, expected: set[str]) -> dict[str, Tensor]:
    """What was trained whole. PEFT also writes the untouched weight of an adapted embedding: that is the base's own."""
    needed = {}
    for name, (module, key) in place.saved.items():
        value, tensor, base = state.saved[name], tensor_of(module, key), base_value(module, key)
        if value.is_floating_point() != tensor.is_floating_point():
            raise AdapterError(f"{name} is {value.dtype}, {tensor.dtype} in the model; save it again")
        if name not in expected and not is_sharded(base) and torch.equal(value.to(base), base):
            continue
        # A buffer may hold infinities on purpose, such as a mask: then the model's own does too.
        is_finite = isinstance(tensor, nn.Parameter) or bool(base.isfinite().all())
        if is_finite and not bool(value.isfinite().all()):
            raise AdapterError(f"{name} is NaN or infinite; train the adapter again")
        needed[name] = value
    return needed
