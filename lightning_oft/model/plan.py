"""Plan: the resolved answer to what inject will do to a model. Everything that can be refused is refused here."""

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import nn

from lightning_oft.codecs import packed_codec, parameter_of
from lightning_oft.config import OFTConfig
from lightning_oft.layers.base import LayerType, Side, layer_type_of, rotated_weights_of
from lightning_oft.layers.state import LayerState, state_of
from lightning_oft.model.probe import fitting_types
from lightning_oft.model.targets import Target, find_targets, matches, saved_names
from lightning_oft.model.traversal import Modules, own_tensors, require_enabled, require_unmerged, some, tensor_of


@dataclass(frozen=True)
class Plan:
    """What inject will do: the layers to adapt (those that have the adapter already stay as they are), and the tensors
    to train whole, (module, name of its own parameter or buffer)."""

    adapter_name: str
    config: OFTConfig
    layers: dict[str, dict[str, int]]  # size of the blocks by layer, and by each of its parts that gets a rotation
    saved: list[tuple[nn.Module, str]] = field(default_factory=list)
    types: dict[str, LayerType] = field(default_factory=dict)  # how new layers are rotated, once `check` has tried them


def plan_injection(modules: Modules, config: OFTConfig, adapter_name: str, strict: bool = True) -> Plan:
    """Resolve a configuration on a model, which stays untouched; `strict` makes names that match nothing an error.
    Raises what `inject` raises."""
    targets = find_targets(modules, config, strict)
    layers = _block_sizes(targets, config, adapter_name)
    plan = Plan(adapter_name, config, layers, _saved_tensors(modules, layers, config, strict))
    # A rotated weight that is tied to a trained one would train too, and no adapter file could say so.
    trained = {id(tensor_of(module, key)): module for module, key in plan.saved}
    for name, sizes in layers.items() if trained else ():
        weights = rotated_weights_of(modules[name])
        for owner in (trained.get(id(parameter_of(modules[name], weights[part].parameter))) for part in sizes):
            if owner is not None:
                first = next(known for known, module in modules.items() if module is owner)
                # The module itself, where modules_to_save reaches it under another name.
                other = next((alias for alias, one in modules.aliases.items() if one == first == name), first)
                what = f"{some([name])}: its weight is also that of {other} (they are tied)"
                raise ValueError(f"{what}, which modules_to_save trains whole; leave one of the two out")
    check(modules, plan)
    return plan


def check(modules: Modules, plan: Plan) -> None:
    """Raise where a plan cannot be carried out, wherever it comes from; else complete its types."""
    name: Any = plan.adapter_name
    if not isinstance(name, str) or not name or "." in name or hasattr(nn.ModuleDict(), name):
        must = "must be a non-empty string without dots and no name of nn.ModuleDict's own"
        raise ValueError(f"adapter_name={name!r}: {must}")
    require_unmerged(modules, "inject an adapter")
    require_enabled(modules, "inject an adapter")
    states = {layer: state_of(modules[layer]) for layer in plan.layers}
    mine = asdict(plan.config)
    for layer, state in states.items():
        theirs = asdict(state.configs.get(name, plan.config)) if state is not None else mine
        changed = [f"{key}={theirs[key]!r}, now {mine[key]!r}" for key in mine if mine[key] != theirs[key]]
        if changed:
            what = f"adapter {name!r} is already there with another configuration ({'; '.join(changed)})"
            remedy = "unload(model) to start anew, keep its configuration to train it further"
            raise ValueError(f"{some([layer])}: {what}: {remedy}, or choose another adapter_name")
    side = plan.config.side
    others = [
        layer for layer, one in states.items() if one is not None and _turns_other_side(modules[layer], one, side)
    ]
    if others:
        what = f"{some(others)}: another adapter rotates its {'output' if side == 'input' else 'input'}"
        raise ValueError(f"{what}, and a layer turns on one side: set side to that too, or leave the layer out")
    if copies := [layer for layer in plan.layers if states[layer] is None and _is_fused_copy(modules, layer)]:
        what = f"{some(copies)}: a copy of projections that were fused, which unfusing and loading again drop"
        raise ValueError(
            f"{what}: call unfuse_qkv_projections(), leave them out with exclude_modules, and fuse after a merge"
        )
    _check_magnitudes(modules, plan)
    new = {layer: (modules[layer], sizes) for layer, sizes in plan.layers.items() if states[layer] is None}
    plan.types.update(fitting_types(new, plan.config))


def _check_magnitudes(modules: Modules, plan: Plan) -> None:
    """Raise ValueError for layers whose neurons cannot be scaled."""
    if plan.config.magnitude is None:
        return
    weights = {name: rotated_weights_of(modules[name]) for name in plan.layers}
    if unfit := [n for n, sizes in plan.layers.items() if any(weights[n][part].neurons is None for part in sizes)]:
        kinds = " or ".join(sorted({type(modules[name]).__name__ for name in unfit}))
        what = f"{some(unfit)}: magnitude={plan.config.magnitude!r}, and nothing scales the neurons of {kinds} layers"
        raise ValueError(f"{what}; leave the layers out with exclude_modules, or set magnitude=None")


def _turns_other_side(layer: nn.Module, state: LayerState, side: Side) -> bool:
    theirs = next(iter(state.configs.values())).side
    return layer_type_of(layer, theirs) is not layer_type_of(layer, side)


def _is_fused_copy(modules: Modules, name: str) -> bool:
    """Whether a layer is what diffusers' attention makes of its projections' weights, beside these."""
    above, _, key = name.rpartition(".")
    return key in ("to_qkv", "to_kv", "to_added_qkv") and bool(getattr(modules.get(above), "fused_projections", False))


def nearest_divisor(number: int, wanted: int) -> int:
    """The divisor of `number` nearest to `wanted`, the lower one of two at the same distance; as in PEFT."""
    if wanted >= number:
        return number
    divisors = [d for d in range(1, number + 1) if number % d == 0]
    return min(divisors, key=lambda d: (abs(d - wanted), d))


def _block_sizes(targets: Mapping[str, Target], config: OFTConfig, adapter_name: str) -> dict[str, dict[str, int]]:
    """The sizes as they can be; one warning names the layers whose size had to be adjusted."""
    found: dict[str, dict[str, int]] = {}
    adjusted: dict[str, list[str]] = {}
    wanted = config.r or config.oft_block_size or 0
    for name, (module, parts) in targets.items():
        state, weights = state_of(module), rotated_weights_of(module, config.side)
        found[name] = {}
        for part in parts:
            fan = weights[part].fan
            given = nearest_divisor(fan, wanted)
            size = found[name][part] = fan // given if config.r else given
            if size < 2:
                what = f"{some([name])}: {config.fan} {fan} with {'r' if config.r else 'oft_block_size'}={wanted}"
                remedy = f"add it to exclude_modules, or use a block size near a divisor of {fan}"
                raise ValueError(f"{what} leaves blocks of size 1, that is no parameter at all; {remedy}")
            if given != wanted and (state is None or adapter_name not in state.configs):
                note = f"{'r=' if config.r else 'block size '}{given} instead of {wanted} for {config.fan} {fan}"
                adjusted.setdefault(note, []).append(name)
    if adjusted:
        lines = "; ".join(f"{note}: {some(dict.fromkeys(names))}" for note, names in adjusted.items())
        warnings.warn(f"block sizes adjusted to divide the {config.fan}: {lines}", stacklevel=4)
    return found


def _saved_tensors(
    modules: Modules, layers: Iterable[str], config: OFTConfig, strict: bool
) -> list[tuple[nn.Module, str]]:
    """What modules_to_save and `bias` train whole. Raises ValueError for a name that matches nothing."""
    wanted = saved_names(config)
    missing = [one for one, must in wanted.items() if must and not any(n and matches(n, [one]) for n in modules)]
    if missing and strict:
        children = some(dict.fromkeys(name.partition(".")[0] for name in modules if name))
        raise ValueError(f"modules_to_save: {some(missing)} matches no module; the model's own are {children}")
    saved = [name for name in modules if name and matches(name, wanted)]
    if wanted and not saved and strict:  # those of a task type alone, which need not be there
        what = f"task_type={config.task_type!r}: the model has no {' or '.join(wanted)} to train whole"
        warnings.warn(f"{what}: name its head in modules_to_save", stacklevel=4)
    parts = modules.below(*saved)
    if packed := [name for name, module in parts.items() if packed_codec(module) is not None]:
        raise ValueError(
            f"modules_to_save: {some(packed)} is quantized and would not train: load the base with it left plain "
            "(llm_int8_skip_modules, modules_to_not_convert), or rotate it by target_modules"
        )
    below = set(map(id, parts.values()))
    found = [(module, key) for module in modules.values() if id(module) in below for key in own_tensors(module)]
    owners = {id(module) for name in layers for module in modules[name].modules()}
    for module in modules.values() if config.bias != "none" else ():
        if id(module) not in below and (config.bias == "all" or id(module) in owners):
            found += [(module, key) for key, p in module._parameters.items() if p is not None and "bias" in key]
    return found
