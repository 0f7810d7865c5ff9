"""Putting an adapter from its files into a model: everything is checked first, so it is there whole or not at all."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from lightning_oft.config import OFTConfig
from lightning_oft.layers import Rotation, kind_of, rotations_of, state_of
from lightning_oft.surgery import adapter_names, freeze, oft_layers, trained, walk
from lightning_oft.surgery.inject import inject_into
from lightning_oft.surgery.sharded import cut_like, is_sharded, part
from lightning_oft.surgery.walk import fingerprint, require_unmerged, same_base, some

from .fitting import Fit, base_value, fit, torn
from .format import AdapterFile, AdapterFileError, printable
from .reading import open_adapter, read_values

log = logging.getLogger(__name__)

_MATHS = ("use_cayley_neumann", "num_cayley_neumann_terms", "neumann_series", "block_share")


def load_adapter(model: nn.Module, directory: str | Path, adapter_name: str = "default") -> list[str]:
    """Put an adapter from a directory of this library or of PEFT into a model, in place, and freeze the rest.

    The file decides which layers are adapted and how; names in it may start at the model or at any module below. The
    adapter becomes active where no other is. An adapter of this name and structure that is there already takes over
    the file's values.

    Args:
        model: any module, unmerged.
        directory: holds `adapter_config.json` and `adapter_model.safetensors`, or a directory named like the adapter
            that does, as PEFT writes it.
        adapter_name: the name it gets in the model.

    Returns:
        The names of the layers adapted, relative to `model`, in the order of the model.

    Raises:
        AdapterFileError: the directory cannot be read or does not fit the model. The model is untouched.
        RuntimeError: the model is merged.
    """
    require_unmerged(model, "load an adapter")
    listing = open_adapter(directory, adapter_name)
    where = fit(model, listing)
    present = adapter_name in adapter_names(where.root)
    contents = read_values(listing)
    saved = _needed(contents, where)
    if present:
        _check_same_structure(contents, where, saved, adapter_name)
    if contents.fingerprint:
        changed = check_fingerprint(where.root, contents.fingerprint)
        if changed:
            warnings.warn(
                printable(
                    f"{contents.directory}: was trained on another base, {some(changed)} differ; load the one it was trained on"
                ),
                stacklevel=2,
            )
    if not present:
        _inject(model, contents.config, where, saved, adapter_name)
    _copy(contents, where, saved, adapter_name)
    return list(where.targets)


def check_fingerprint(model: nn.Module, fingerprints: Mapping[str, str | None]) -> list[str]:
    """Names of the layers whose base weight is not that of a fingerprint. What cannot be told counts as the same."""
    different = []
    for name, module in walk(model):
        if name in fingerprints and not same_base(_fingerprint_of(module), fingerprints[name]):
            different.append(name)
    return different


def _fingerprint_of(layer: nn.Module) -> str | None:
    state, kind = state_of(layer), kind_of(layer)
    if state is not None or kind is None:
        return state.fingerprint if state else None
    weight = getattr(layer, next(iter(kind.parts(layer).values())).parameter, None)
    return fingerprint(weight) if isinstance(weight, Tensor) else None


def _needed(contents: AdapterFile, where: Fit) -> dict[str, Tensor]:
    """What was trained whole. PEFT also writes the untouched weight of an adapted embedding: that is the base's own."""
    needed = {}
    for name, value in contents.saved.items():
        module, key = where.saved[name]
        tensor = trained.tensor_of(module, key)
        if value.is_floating_point() != tensor.is_floating_point():
            raise AdapterFileError(
                f"{contents.directory}: {name} is {value.dtype}, {tensor.dtype} in the model; save it again"
            )
        if name not in where.expected and _is_same(value, base_value(module, key)):
            continue
        # A buffer may hold infinities on purpose, such as a mask: then the model's own does too.
        expected = isinstance(tensor, nn.Parameter) or bool(base_value(module, key).isfinite().all())
        if expected and not bool(value.isfinite().all()):
            raise AdapterFileError(f"{contents.directory}: {name} is NaN or infinite; train the adapter again")
        needed[name] = value
    return needed


def _is_same(value: Tensor, base: Tensor) -> bool:
    return not is_sharded(base) and torch.equal(value.to(base), base)


def _check_same_structure(contents: AdapterFile, where: Fit, saved: Mapping[str, Tensor], adapter_name: str) -> None:
    """Raise AdapterFileError where the adapter in the model is another one than the file's."""
    difference = _difference(contents, where, saved, adapter_name)
    if difference:
        raise AdapterFileError(
            f"{contents.directory}: the model has another adapter {adapter_name!r} already, {difference}; "
            "call unload(model) first, or load it under another adapter_name"
        )


def _difference(contents: AdapterFile, where: Fit, saved: Mapping[str, Tensor], adapter_name: str) -> str:
    """What the model's adapter has and the file's lacks, or the other way round; empty where they are alike."""
    mine = {id(layer) for layer in oft_layers(where.root).values() if adapter_name in _configs(layer)}
    theirs = {id(layer): name for name, (layer, _) in where.rotations.items()}
    if mine != theirs.keys():
        names = [name for name, layer in oft_layers(where.root).items() if id(layer) in mine - theirs.keys()]
        return f"only one of them adapts {some(names or [theirs[key] for key in theirs.keys() - mine])}"
    owned = {id(tensor): name for name, tensor, slot in trained.slots(where.root) if adapter_name in slot.owners}
    stored = {id(trained.tensor_of(*where.saved[name])): name for name in saved}
    if owned.keys() != stored.keys():
        differing = [name for key, name in {**owned, **stored}.items() if (key in owned) != (key in stored)]
        return f"only one of them trains {some(differing)}"
    apart = torn(where.root, where, saved)
    if apart:
        return f"which trains {some(apart)} together with what shares its memory"
    config = _configs(next(iter(where.rotations.values()))[0])[adapter_name]
    for field in _MATHS:
        if getattr(config, field) != getattr(contents.config, field):
            return f"{field} is {getattr(config, field)!r} there and {getattr(contents.config, field)!r} in the file"
    shapes = {
        name: None if rotation is None else rotation.weight.shape for name, rotation in _rotations(where, adapter_name)
    }
    resized = [name for name, shape in shapes.items() if shape != contents.rotations[name].shape]
    return f"the blocks of {some(resized)} have another size" if resized else ""


def _configs(layer: nn.Module) -> dict[str, OFTConfig]:
    state = state_of(layer)
    return {} if state is None else state.configs


def _rotations(where: Fit, adapter_name: str) -> list[tuple[str, Rotation | None]]:
    """The model's rotations by their names in the file."""
    return [(name, rotations_of(layer, adapter_name).get(part)) for name, (layer, part) in where.rotations.items()]


def _inject(model: nn.Module, config: OFTConfig, where: Fit, saved: Mapping[str, Tensor], adapter_name: str) -> None:
    """Inject with what the file lists: the configuration's own names may start at another module."""
    rotations_only = replace(config, modules_to_save=None, bias="none", task_type=None)
    others = [state for layer in oft_layers(where.root).values() if (state := state_of(layer)) and state.active]
    inject_into(model, where.targets, where.sizes, rotations_only, adapter_name)
    for target in where.targets.values():
        _configs(target.module)[adapter_name] = config
    _untie(torn(model, where, saved), where)
    known = {id(tensor): slot for _, tensor, slot in trained.slots(model)}
    for name in saved:
        module, key = where.saved[name]
        trained.claim(module, key, adapter_name, not others, known)
    freeze(model)


def _untie(names: list[str], where: Fit) -> None:
    """Give tensors memory of their own: what they shared it with keeps its values."""
    if names:
        log.warning("load: %s shared a weight with another module; it has a copy of its own now", some(names))
    for name in names:
        module, key = where.saved[name]
        tensor = trained.tensor_of(module, key)
        module._parameters[key] = nn.Parameter(tensor.detach().clone(), requires_grad=tensor.requires_grad)


@torch.no_grad()
def _copy(contents: AdapterFile, where: Fit, saved: Mapping[str, Tensor], adapter_name: str) -> None:
    for name, rotation in _rotations(where, adapter_name):
        assert rotation is not None
        part(rotation.weight).copy_(cut_like(contents.rotations[name], rotation.weight))
    slots = {id(tensor): slot for _, tensor, slot in trained.slots(where.root)}
    for name, value in saved.items():
        tensor = trained.tensor_of(*where.saved[name])
        slot = slots[id(tensor)]
        if slot.live == adapter_name:
            part(tensor).copy_(cut_like(value, tensor))
        else:
            waiting = slot.waiting[adapter_name]
            part(waiting).copy_(cut_like(value, waiting))
