"""Putting an adapter into a model, and taking every trace of it out again."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from lightning_oft.config import OFTConfig
from lightning_oft.layers import LayerState, Rotation, state_of
from lightning_oft.layers.state import set_state

from . import trained
from .blocks import block_sizes
from .frozen import freeze, guard_nested_tensors, thaw
from .merge import hide_rotations
from .sharded import part as part_of
from .targets import Target, find_targets, matches, saved_names
from .walk import fingerprint, forget_compiled, oft_layers, require_enabled, require_unmerged, some, walk

__all__ = ["freeze", "inject", "unload"]


def inject(model: nn.Module, config: OFTConfig, adapter_name: str = "default") -> list[str]:
    """Put an adapter into a model, in place, and freeze the rest; the model computes what it did before.

    The adapter is active and trainable on every layer that has no other active adapter; where one has, `set_adapter`
    chooses. Layers that already have this adapter are left as they are, so calling it again is harmless.

    Args:
        model: any module; the names in `config` are relative to it.
        config: what to adapt and how.
        adapter_name: a name for this set of rotations, without dots.

    Returns:
        The names of the layers adapted, relative to `model`, in the order of the model.

    Raises:
        TypeError: `model` is no module or `config` no OFTConfig.
        ValueError: nothing matches, or a target cannot be adapted; names it and the remedy. The model is untouched.
        RuntimeError: the model is merged, or inside disable_adapters.
    """
    _check_arguments(model, config)
    targets = find_targets(model, config)
    sizes = block_sizes(targets, config)
    return inject_into(model, targets, sizes, config, adapter_name)


def inject_into(
    model: nn.Module,
    targets: dict[str, Target],
    sizes: dict[str, dict[str, int]],
    config: OFTConfig,
    adapter_name: str,
    strict: bool = True,
) -> list[str]:
    """Inject with targets and block sizes already known, as when they come from a file."""
    _check_name(adapter_name)
    require_unmerged(model, "inject an adapter")
    require_enabled(model, "inject an adapter")
    _check_same_config(targets, config, adapter_name)
    _check_gradient_path(targets)
    saved = _saved_modules(model, config, strict)
    _check_not_trained_too(targets, saved)
    elsewhere = []
    for name, target in targets.items():
        state = _adapt(target, sizes[name], config, adapter_name)
        if adapter_name not in state.active:
            elsewhere.append(name)
    _claim(model, saved, targets, config, adapter_name)
    freeze(model)
    guard_nested_tensors(model)
    forget_compiled()
    if elsewhere:
        warnings.warn(
            f"adapter {adapter_name!r} is not active on {some(elsewhere)}, where another adapter is: "
            "call set_adapter(model, names) to choose",
            stacklevel=3,
        )
    return list(targets)


def unload(model: nn.Module) -> None:
    """Take every trace of adapters out of a model, in place.

    After `merge` what stays is the plain merged model, with the trained copies of modules_to_save and biases; without
    it, the base. Parameters that were trainable before `inject` are trainable again.

    Raises:
        RuntimeError: inside disable_adapters.
    """
    require_enabled(model, "unload")
    layers = oft_layers(model)
    merged = any(state.merged is not None for layer in layers.values() if (state := state_of(layer)))
    for layer in layers.values():
        state = state_of(layer)
        if state is not None and state.merged is None:
            state.kind.detach(layer)
            hide_rotations(layer)
        layer.__dict__.pop("oft_R", None)
        set_state(layer, None)
    trained.release(model, to_base=not merged)
    thaw(model)
    guard_nested_tensors(model)
    forget_compiled()


def _check_arguments(model: Any, config: Any) -> None:
    if not isinstance(model, nn.Module) or not isinstance(config, OFTConfig):
        given = f"{type(model).__name__}, {type(config).__name__}"
        raise TypeError(f"inject({given}): takes a module and an OFTConfig, as in inject(model, OFTConfig(r=4))")


def _check_name(adapter_name: str) -> None:
    if (
        not isinstance(adapter_name, str)
        or not adapter_name
        or "." in adapter_name
        or hasattr(nn.ModuleDict(), adapter_name)
    ):
        raise ValueError(
            f"adapter_name={adapter_name!r}: must be a non-empty string without dots and no name of nn.ModuleDict's own"
        )


def _check_same_config(targets: dict[str, Target], config: OFTConfig, adapter_name: str) -> None:
    for name, target in targets.items():
        state = state_of(target.module)
        if state is not None and state.configs.get(adapter_name, config) != config:
            raise ValueError(
                f"{name or 'the model itself'}: adapter {adapter_name!r} is already there with another configuration; "
                "unload(model) first, or use another adapter_name"
            )


def _check_not_trained_too(targets: dict[str, Target], saved: dict[str, nn.Module]) -> None:
    """A rotated weight that is tied to a trained one would train too, and no adapter file could say so."""
    trained_by = {
        id(parameter): name
        for name, module in saved.items()
        for _, parameter in module.named_parameters(remove_duplicate=False)
    }
    for name, target in targets.items():
        for part in target.parts:
            owner = trained_by.get(id(_parameter(target.module, target.kind.parts(target.module)[part].parameter)))
            if owner is not None:
                raise ValueError(
                    f"{name or 'the model itself'}: its weight is also that of {owner} (they are tied), which modules_to_save "
                    "trains whole; leave one of the two out"
                )


def _check_gradient_path(targets: dict[str, Target]) -> None:
    """A base that passes no gradient to its input would leave its rotation untrained without a word."""
    dead = [
        n for n, t in targets.items() if t.kind.name == "linear" and state_of(t.module) is None and _is_dead(t.module)
    ]
    if dead:
        raise ValueError(
            f"{some(dead)}: the output of the base layer does not require grad when its input does, so a rotation of "
            "the input could never train (activation quantization is such a case); exclude these layers or load the "
            "base with weight-only quantization"
        )


def _is_dead(layer: Any) -> bool:
    weight = getattr(layer, "weight", None)
    if type(layer) is nn.Linear and isinstance(weight, Tensor) and type(part_of(weight.data)) is Tensor:
        return False
    floating = isinstance(weight, Tensor) and weight.is_floating_point()
    device = next((p.device for p in layer.parameters(recurse=False)), None)
    dtype = weight.dtype if floating and isinstance(weight, Tensor) else torch.float32
    with torch.enable_grad():
        try:
            probe = torch.zeros(1, layer.in_features, dtype=dtype, device=device, requires_grad=True)
            output = layer(probe)
            if not isinstance(output, Tensor) or not output.requires_grad:
                return isinstance(output, Tensor)
            return torch.autograd.grad(output.sum(), probe, allow_unused=True)[0] is None
        except Exception:  # a layer that cannot run here and now; the guard after the first backward sees it
            return False


def _adapt(target: Target, sizes: dict[str, int], config: OFTConfig, adapter_name: str) -> LayerState:
    layer, kind = target.module, target.kind
    state = state_of(layer)
    if state is None:
        state = LayerState(kind)
        first = next(iter(kind.parts(layer).values()))
        weight = _parameter(layer, first.parameter)
        state.fingerprint = None if weight is None else fingerprint(weight)
        layer.oft_R = nn.ModuleDict()
        set_state(layer, state)
        kind.attach(layer)
    if adapter_name in state.configs:
        return state
    rotations: dict[str, nn.Module] = {}
    for part, size in sizes.items():
        place = kind.parts(layer)[part]
        weight = _parameter(layer, place.parameter)
        device = weight.device if weight is not None else next((p.device for p in layer.buffers(recurse=False)), None)
        rotations[part] = Rotation(place.fan_in, size, config, device).train(layer.training)
    entry: nn.Module = rotations[""] if "" in rotations else nn.ModuleDict(rotations)
    adapters: Any = layer.oft_R
    adapters[adapter_name] = entry
    state.configs[adapter_name] = config
    if not state.active:
        state.active = [adapter_name]
    entry.requires_grad_(adapter_name in state.active)
    return state


def _parameter(layer: nn.Module, name: str) -> Tensor | None:
    owner_name, _, key = name.rpartition(".")
    owner = layer.get_submodule(owner_name)
    tensor = getattr(owner, key, None)
    return tensor if isinstance(tensor, Tensor) else None


def _saved_modules(model: nn.Module, config: OFTConfig, strict: bool) -> dict[str, nn.Module]:
    """The modules that modules_to_save names, by name. Raises ValueError for a name that matches nothing."""
    required, implied = saved_names(config)
    found: dict[str, nn.Module] = {}
    missing = []
    for item in (*required, *implied):
        hits = {name: module for name, module in walk(model) if name and matches(name, [item])}
        if not hits and item in required:
            missing.append(item)
        found.update(hits)
    if missing and strict:
        children = some([name for name, _ in model.named_children()])
        raise ValueError(f"modules_to_save: {some(missing)} matches no module; the model's own are {children}")
    return found


def _claim(
    model: nn.Module, saved: dict[str, nn.Module], targets: dict[str, Target], config: OFTConfig, adapter_name: str
) -> None:
    """Make the adapter an owner of modules_to_save and biases."""
    active = not any(
        state.active and adapter_name not in state.active
        for layer in oft_layers(model).values()
        if (state := state_of(layer)) is not None
    )
    slots = {id(tensor): slot for _, tensor, slot in trained.slots(model)}
    inside: set[int] = set()
    for module in saved.values():
        for _, below in walk(module):
            inside.add(id(below))
            for key in trained.own_tensors(below):
                trained.claim(below, key, adapter_name, active, slots)
    owners = {id(module) for target in targets.values() for module in target.module.modules()}
    for _, module in walk(model):
        if config.bias == "none" or id(module) in inside or (config.bias == "oft_only" and id(module) not in owners):
            continue
        for key, parameter in module._parameters.items():
            if parameter is not None and "bias" in key:
                trained.claim(module, key, adapter_name, active, slots)
