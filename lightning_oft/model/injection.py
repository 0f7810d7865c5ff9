"""Putting an adapter into a model, and taking it, or every trace of adapters, out again."""

import warnings
from typing import Any

from torch import nn

from lightning_oft.codecs import parameter_of
from lightning_oft.config import OFTConfig
from lightning_oft.layers import LayerState, LayerType, Rotation, state_of
from lightning_oft.layers.reuse import share_maps
from lightning_oft.layers.state import drop_empty_record, make_record, rotations_of, train_rotations
from lightning_oft.model import activation, fingerprint, first_forward, freezing, packed, saved_modules, traversal
from lightning_oft.model.merging import unmerge
from lightning_oft.model.plan import Plan, plan_injection
from lightning_oft.model.targets import report_names
from lightning_oft.model.traversal import Modules, adapted, adapter_names, some, walk


def inject(model: Any, config: OFTConfig, adapter_name: str = "default") -> list[str]:
    """Put an adapter into a model, in place, and freeze the rest; the model computes what it did before.

    The adapter is active and trainable on every layer that has no other active adapter; where one has, `set_adapter`
    chooses. Layers that already have this adapter are left as they are, so calling it again is harmless. The names in
    `config` and those returned, of the layers adapted, are relative to `model`; `adapter_name` has no dots.

    Raises:
        TypeError: `model` is no module or `config` no OFTConfig.
        ValueError: nothing matches, or a target cannot be adapted; names it and the remedy. The model is untouched.
        RuntimeError: the model is merged, or inside disable_adapters.
    """
    if not isinstance(model, nn.Module) or not isinstance(config, OFTConfig):
        given = f"{type(model).__name__}, {type(config).__name__}"
        raise TypeError(f"inject({given}): takes a module and an OFTConfig, as in inject(model, OFTConfig(r=4))")
    modules = walk(model)
    plan = plan_injection(modules, config, adapter_name)
    if adapter_name not in adapter_names(modules):
        report_names(modules, config, plan.layers)
    with fingerprint.each_read_once():
        names = carry_out(modules, plan)
    first_forward.watch(modules)
    return names


def carry_out(modules: Modules, plan: Plan) -> list[str]:
    """Inject what a plan says, and freeze the rest. Returns the names of its layers."""
    active = {
        name: _adapt(modules[name], sizes, plan, plan.types.get(name)).active for name, sizes in plan.layers.items()
    }
    waiting = [name for name, names in active.items() if plan.adapter_name not in names]
    known = {id(tensor): slot for _, tensor, slot in saved_modules.saved_tensors(modules)}
    is_active = all(plan.adapter_name in state.active for _, _, state in adapted(modules) if state.active)
    for module, key in plan.saved:
        saved_modules.claim(module, key, plan.adapter_name, is_active, known)
    share_maps(
        ((adapter_name, _row(name)), name.rpartition(".")[0], rotation)
        for name, layer, state in adapted(modules)
        for adapter_name in state.configs
        for rotation in rotations_of(layer, adapter_name).values()
    )
    freezing.freeze(modules)
    fingerprint.note_base(modules)
    packed.enable_gradients(modules)
    freezing.layers_changed(modules)
    if waiting:
        what = f"adapter {plan.adapter_name!r} is not active on {some(waiting)}, where another adapter is"
        warnings.warn(f"{what}: call set_adapter(model, names) to choose", stacklevel=3)
    return list(plan.layers)


def _row(name: str) -> str:
    """The list of blocks that a layer is in, which are called after each other and trained together, as a generator and
    a discriminator are not; else the module that it is in."""
    parts = name.split(".")
    numbers = [place for place, part in enumerate(parts) if part.isdecimal()]
    return ".".join(parts[: numbers[0] if numbers else -1])


def _adapt(layer: nn.Module, block_sizes: dict[str, int], plan: Plan, layer_type: LayerType | None) -> LayerState:
    state = state_of(layer)
    if state is None:
        assert layer_type is not None  # a checked plan has one for every new layer
        state = LayerState(layer_type, fingerprint=fingerprint.layer_fingerprint(layer))
        layer.oft_R = nn.ModuleDict()
        make_record(layer).layer = state
    if plan.adapter_name in state.configs:
        return state
    made: dict[str, nn.Module] = {}
    for part, size in block_sizes.items():
        weight = state.layer_type.rotated_weights(layer)[part]
        # A layer may keep no such parameter: then its other tensors say where it is.
        tensors = [parameter_of(layer, weight.parameter), *layer._parameters.values(), *layer._buffers.values()]
        device = next((tensor.device for tensor in tensors if tensor is not None), None)
        made[part] = Rotation(weight.fan, size, plan.config, device, weight.neurons).train(layer.training)
    adapters: Any = layer.oft_R
    adapters[plan.adapter_name] = made[""] if "" in made else nn.ModuleDict(made)
    state.configs[plan.adapter_name] = plan.config
    state.active = state.active or [plan.adapter_name]
    train_rotations(layer, plan.adapter_name, plan.adapter_name in state.active)
    state.layer_type.attach(layer)
    return state


def delete_adapter(model: nn.Module, adapter_name: str) -> None:
    """Take one adapter out of a model, in place: its rotations, and its values of what it trained whole.

    Other adapters stay, active and trainable as they were. Where the deleted one alone was active, the first that is
    left becomes active, and a warning says so; with the last adapter every trace of OFT leaves, as by `unload`.

    Raises:
        ValueError: there is no such adapter.
        RuntimeError: the model is merged, or inside disable_adapters.
    """
    modules = walk(model)
    traversal.require_adapter(modules, adapter_name)
    traversal.require_unmerged(modules, "delete an adapter")
    traversal.require_enabled(modules, "delete an adapter")
    left = [name for name in adapter_names(modules) if name != adapter_name]
    if not left:
        _unload(modules)
        return
    active = traversal.active_names(modules)
    found = {name: traversal.rotations(modules, name).values() for name in active}
    trains = [name for name, own in found.items() if any(rotation.trained() for rotation in own)]
    saved_modules.release(modules, [adapter_name])
    for _, layer, state in list(adapted(modules)):
        if state.configs.pop(adapter_name, None) is not None:
            del layer.oft_R[adapter_name]  # type: ignore[union-attr, operator]
        if not state.configs:
            _strip(layer, state)
        else:  # without the hooks that the deleted one alone needed
            state.layer_type.detach(layer)
            state.layer_type.attach(layer)
    if active == [adapter_name]:
        active = trains = left[:1]
        warnings.warn(f"adapter {adapter_name!r} was active and is deleted; {left[0]!r} is active now", stacklevel=2)
    # A layer whose only active adapter is gone takes those that are active elsewhere.
    own = {name: [one for one in state.active if one != adapter_name] for name, _, state in adapted(modules)}
    active = [name for name in active if name != adapter_name]
    activation.activate(modules, active, trains, {name: names or active for name, names in own.items()})
    freezing.layers_changed(modules)


def unload(model: nn.Module, to_base: bool = False) -> None:
    """Take every trace of adapters out of a model, in place.

    After `merge` what stays is the plain merged model, with the trained copies of modules_to_save and biases; without
    it, or with `to_base`, the base. Parameters that were trainable before `inject` are trainable again.

    Args:
        model: a model, with adapters or without.
        to_base: undo a merge first, as `unmerge` does, so that a fit that merged at its end leaves the model as it was.

    Raises:
        RuntimeError: inside disable_adapters; with `to_base`, a merged weight has been changed since.
    """
    modules = walk(model)
    traversal.require_enabled(modules, "unload")
    if to_base and traversal.merged_layers(modules):
        unmerge(model)
    _unload(modules)


def _unload(modules: Modules) -> None:
    names, merged = adapter_names(modules), bool(traversal.merged_layers(modules))
    for _, layer, state in list(adapted(modules)):
        _strip(layer, state)
    saved_modules.release(modules, names, to_base=not merged)
    freezing.unfreeze_merged(modules)
    for _, module, record in traversal.records(modules):
        record.base, record.frozen, record.released, record.norm_mode = {}, set(), {}, None
        drop_empty_record(module)
    freezing.layers_changed(modules)


def _strip(layer: nn.Module, state: LayerState) -> None:
    """Take the rotations off a layer, merged or not."""
    if state.merged is None:
        state.layer_type.detach(layer)
    del layer.oft_R
    make_record(layer).layer = None
    drop_empty_record(layer)
