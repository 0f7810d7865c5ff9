"""Putting an AdapterState into a model: everything is checked first, so it is there whole or not at all."""

import logging
from collections import defaultdict
from collections.abc import Collection

import torch
from torch import Tensor, nn

from lightning_oft.codecs import cut_like, local_part
from lightning_oft.layers.state import rotations_of
from lightning_oft.model import fingerprint, first_forward, injection, traversal
from lightning_oft.model.adapter_state import AdapterState
from lightning_oft.model.placement import AdapterError, Place, find_place, with_dots
from lightning_oft.model.plan import Plan, check
from lightning_oft.model.saved_modules import saved_tensors
from lightning_oft.model.traversal import Modules, adapted, is_inside, joined, rotations, some

log = logging.getLogger(__name__)

_MATHS = ("side", "use_cayley_neumann", "num_cayley_neumann_terms", "neumann_series", "block_share")


def put(
    model: nn.Module, state: AdapterState, adapter_name: str | None = None, ignore_mismatched_base: bool = False
) -> list[str]:
    """Put an adapter into a model, in place, and freeze the rest.

    The state decides which layers are adapted and how; its names may start at the model or at any module below. The
    adapter becomes active where no other is. An adapter of this name (`adapter_name`, else the state's own) and of this
    structure that is there already takes over the state's values. Returns the names of the layers adapted.

    Raises:
        AdapterError: it does not fit the model, which is untouched; or it was trained on another base, and
            `ignore_mismatched_base` does not say to take it all the same.
        RuntimeError: the model is merged.
    """
    name = state.name if adapter_name is None else adapter_name
    modules = traversal.walk(model)
    traversal.require_unmerged(modules, "load an adapter")
    state = with_dots(modules, state)
    place = find_place(modules, state)
    is_there = name in traversal.adapter_names(modules)
    if is_there and (difference := _difference(modules, state, place, name)):
        what = f"the model has another adapter {name!r} already, {difference}"
        raise AdapterError(f"{what}; call unload(model) first, or load it under another adapter_name")
    prints = {joined(place.root, layer): value for layer, value in state.fingerprints.items()}
    with fingerprint.each_read_once():
        if not ignore_mismatched_base and (changed := fingerprint.other_bases(modules, prints)):
            what = f"the adapter was trained on another base, {some(changed)} differ"
            raise AdapterError(f"{what}; load the base it was trained on, or set ignore_mismatched_base=True")
        if not is_there:
            plan = Plan(name, state.config, place.layers, [(one.module, one.key) for one in place.saved.values()])
            check(modules, plan)
            torn = _torn(modules, place)
            for trained in torn:  # it gets memory of its own: what it shared it with keeps its values
                module, key, _ = place.saved[trained]
                tensor = module.get_parameter(key)
                module._parameters[key] = nn.Parameter(tensor.detach().clone(), requires_grad=tensor.requires_grad)
            if torn:
                log.warning("load: %s shared a weight with another module; it has a copy of its own now", some(torn))
            injection.carry_out(modules, plan)
            first_forward.watch(modules)
    present, saved = rotations(modules, name), {id(one.tensor): one for one in saved_tensors(modules)}
    values: list[tuple[Tensor, Tensor]] = [(present[key].weight, value) for key, value in place.generators.items()]
    for at, rotation in present.items():
        if rotation.magnitude is not None and at in place.generators:  # 0 for a state from before they are fitted
            values.append((rotation.magnitude, place.magnitudes.get(at, torch.zeros(rotation.magnitude.shape))))
    values += [(saved[id(one.tensor())].value(name), one.value) for one in place.saved.values()]
    with torch.no_grad():
        for mine, theirs in values:
            local_part(mine).copy_(cut_like(theirs, mine))
    use_maps(modules, name, state, place.exact)
    return list(place.layers)


def use_maps(modules: Modules, adapter_name: str, state: AdapterState, exact: Collection[tuple[str, str]]) -> None:
    """Have a model's adapter compute what a state of it does: by the exact map where the state has left its series, in
    these layers and parts of the model. A series that is beyond its reach stays, since no other map computes the same."""
    is_beyond = state.is_beyond_reach()
    for name, layer, one in adapted(modules):
        for part, rotation in rotations_of(layer, adapter_name).items() if adapter_name in one.configs else ():
            rotation.use_map(exact=(name, part) in exact or not state.config.use_cayley_neumann)
            guard = one.configs[adapter_name].series_guard
            rotation.guard = "warn" if is_beyond and guard == "exact" else guard


def _torn(modules: Modules, place: Place) -> list[str]:
    """Names of trained tensors that share their memory in the model with one that the state has other values for.
    PEFT trains a copy of such a head, so that the embedding it is tied to stays what it was."""
    theirs = {(id(one.module), one.key): one.value for one in place.saved.values()}
    sharing = defaultdict(list)
    for module in modules.values() if place.saved else ():
        for key, parameter in module._parameters.items():
            sharing[id(parameter)].append(theirs.get((id(module), key)))
    return [
        name
        for name, one in place.saved.items()
        if any(value is None or not torch.equal(value, one.value) for value in sharing[id(one.tensor())])
    ]


def _difference(modules: Modules, state: AdapterState, place: Place, adapter_name: str) -> str:
    """What the model's adapter has and the state lacks, or the other way round; empty where they are alike."""
    present = rotations(modules, adapter_name)
    mine = {key: rotation.weight.shape for key, rotation in present.items() if is_inside(key[0], place.root)}
    theirs = {key: generator.shape for key, generator in place.generators.items()}
    if mine.keys() != theirs.keys():
        return f"only one of them adapts {some(dict.fromkeys(name for name, _ in sorted(mine.keys() ^ theirs.keys())))}"
    owned = {id(one.tensor): one.name for one in saved_tensors(modules) if adapter_name in one.slot.owners}
    stored = {id(one.tensor()): name for name, one in place.saved.items()}
    if owned.keys() != stored.keys():
        names = sorted({**owned, **stored}[key] for key in owned.keys() ^ stored.keys())
        return f"only one of them trains {some(names)}"
    torn = _torn(modules, place)
    if torn:
        return f"which trains {some(torn)} together with what shares its memory"
    config = next(one.configs[adapter_name] for _, _, one in adapted(modules) if adapter_name in one.configs)
    for field in _MATHS:
        if field == "use_cayley_neumann" and config.series_guard == "exact" and not state.config.use_cayley_neumann:
            continue  # it may have been saved from here, after the series was left
        if getattr(config, field) != getattr(state.config, field):
            return f"{field} is {getattr(config, field)!r} there and {getattr(state.config, field)!r} in the file"
    if (config.magnitude is None) != (state.config.magnitude is None):
        return f"magnitude is {config.magnitude!r} there and {state.config.magnitude!r} in the file"
    resized = [name for name, part in mine if mine[name, part] != theirs[name, part]]
    return f"the blocks of {some(resized)} have another size" if resized else ""
