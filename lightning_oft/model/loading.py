"""Putting an AdapterState into a model: everything is checked first, so it is there whole or not at all."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lightning_oft.codecs import cut_like, local_part
from lightning_oft.layers.state import rotations_of
from lightning_oft.model import saved_modules
from lightning_oft.model.adapter_state import AdapterState
from lightning_oft.model.fingerprint import other_bases
from lightning_oft.model.injection import carry_out
from lightning_oft.model.placement import (
    AdapterError,
    Place,
    PlacedRotation,
    expected_tensors,
    find_place,
    needed_tensors,
    plan_of,
)
from lightning_oft.model.plan import Plan, check
from lightning_oft.model.traversal import Modules, adapted, joined, require_unmerged, some, tensor_of, walk

log = logging.getLogger(__name__)

_MATHS = ("use_cayley_neumann", "num_cayley_neumann_terms", "neumann_series", "block_share")


def put(model: nn.Module, state: AdapterState, adapter_name: str | None = None) -> list[str]:
    """Put an adapter into a model, in place, and freeze the rest.

    The state decides which layers are adapted and how; its names may start at the model or at any module below. The
    adapter becomes active where no other is. An adapter of this name and structure that is there already takes over
    the state's values.

    Args:
        model: any module, unmerged.
        state: the adapter.
        adapter_name: the name it gets in the model; its own by default.

    Returns:
        The names of the layers adapted, relative to `model`, in the order of the model.

    Raises:
        AdapterError: it does not fit the model, which is untouched.
        RuntimeError: the model is merged.
    """
    name = state.name if adapter_name is None else adapter_name
    modules = walk(model)
    require_unmerged(modules, "load an adapter")
    place = find_place(modules, state)
    plan = plan_of(modules, state, place, name)
    saved = needed_tensors(state, place, expected_tensors(modules, state, place))
    present = any(name in layer_state.configs for _, _, layer_state in adapted(modules))
    if present:
        _check_same_structure(modules, state, plan, place, saved)
    changed = other_bases(modules, {joined(place.root, key): value for key, value in state.fingerprints.items()})
    if changed:
        warnings.warn(
            f"{state.source or 'the adapter'} was trained on another base, {some(changed)} differ; load the one it was "
            "trained on",
            stacklevel=3,
        )
    if not present:
        check(modules, plan)
        _untie(_torn(modules, place, saved), place)
        plan.saved.extend(place.saved[key] for key in saved)
        carry_out(modules, plan)
    _copy(modules, place, saved, name)
    return list(plan.layers)


def _torn(modules: Modules, place: Place, saved: Mapping[str, Tensor]) -> list[str]:
    """Names of trained tensors that share their memory in the model with one that the state has other values for.

    PEFT trains a copy of such a head, so that the embedding it is tied to stays what it was.
    """
    theirs = {(id(place.saved[name][0]), place.saved[name][1]): value for name, value in saved.items()}
    holders: dict[int, list[tuple[int, str]]] = {}
    for module in modules.values() if saved else ():
        for key, parameter in module._parameters.items():
            holders.setdefault(id(parameter), []).append((id(module), key))
    found = []
    for name, value in saved.items():
        others = holders.get(id(tensor_of(*place.saved[name])), [])
        if any(spot not in theirs or not torch.equal(theirs[spot], value) for spot in others):
            found.append(name)
    return found


def _untie(names: list[str], place: Place) -> None:
    """Give tensors memory of their own: what they shared it with keeps its values."""
    if names:
        log.warning("load: %s shared a weight with another module; it has a copy of its own now", some(names))
    for name in names:
        module, key = place.saved[name]
        tensor = tensor_of(module, key)
        module._parameters[key] = nn.Parameter(tensor.detach().clone(), requires_grad=tensor.requires_grad)


def _check_same_structure(
    modules: Modules, state: AdapterState, plan: Plan, place: Place, saved: Mapping[str, Tensor]
) -> None:
    """Raise AdapterError where the adapter in the model is another one than the state."""
    difference = _difference(modules, state, plan, place, saved)
    if difference:
        raise AdapterError(
            f"the model has another adapter {plan.adapter_name!r} already, {difference}; "
            "call unload(model) first, or load it under another adapter_name"
        )


def _difference(modules: Modules, state: AdapterState, plan: Plan, place: Place, saved: Mapping[str, Tensor]) -> str:
    """What the model's adapter has and the state lacks, or the other way round; empty where they are alike."""
    mine = {name: found for name, _, found in adapted(modules) if plan.adapter_name in found.configs}
    mine = {name: found for name, found in mine.items() if name.startswith(place.root)}
    if mine.keys() != plan.layers.keys():
        return f"only one of them adapts {some(sorted(mine.keys() ^ plan.layers.keys()))}"
    trained = list(saved_modules.saved_tensors(modules))
    owned = {id(one.tensor): one.name for one in trained if plan.adapter_name in one.slot.owners}
    stored = {id(tensor_of(*place.saved[name])): name for name in saved}
    if owned.keys() != stored.keys():
        return f"only one of them trains {some([{**owned, **stored}[key] for key in owned.keys() ^ stored.keys()])}"
    apart = _torn(modules, place, saved)
    if apart:
        return f"which trains {some(apart)} together with what shares its memory"
    config = next(iter(mine.values())).configs[plan.adapter_name]
    for field in _MATHS:
        if getattr(config, field) != getattr(state.config, field):
            return f"{field} is {getattr(config, field)!r} there and {getattr(state.config, field)!r} in the file"
    resized = [
        one.layer
        for one in place.rotations
        if _weight(modules, one, plan.adapter_name) is None
        or _weight(modules, one, plan.adapter_name).shape != one.generator.shape  # type: ignore[union-attr]
    ]
    return f"the blocks of {some(resized)} have another size" if resized else ""


def _weight(modules: Modules, rotation: PlacedRotation, adapter_name: str) -> Tensor | None:
    found = rotations_of(modules[rotation.layer], adapter_name).get(rotation.part)
    return None if found is None else found.weight


@torch.no_grad()
def _copy(modules: Modules, place: Place, saved: Mapping[str, Tensor], adapter_name: str) -> None:
    for rotation in place.rotations:
        weight = _weight(modules, rotation, adapter_name)
        if weight is not None:
            local_part(weight).copy_(cut_like(rotation.generator, weight))
    slots = {id(tensor): slot for _, tensor, slot in saved_modules.saved_tensors(modules)}
    for name, value in saved.items():
        tensor = tensor_of(*place.saved[name])
        slot = slots[id(tensor)]
        mine = tensor if slot.live == adapter_name else slot.waiting[adapter_name]
        local_part(mine).copy_(cut_like(value, mine))
