"""What a Lightning checkpoint holds of an adapted model, and how it finds its way back into one.

Only plain dictionaries are read and written here: no Trainer, no Lightning. A checkpoint carries, beside `state_dict`,
one entry `lightning_oft` of primitives and tensors, so that `torch.load(weights_only=True)` reads all of it.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .checkpoint_files import ENTRY as ENTRY
from .checkpoint_files import VERSION
from .checkpoint_files import CheckpointError as CheckpointError
from .checkpoint_files import is_rotation_key as is_rotation_key
from .checkpoint_files import read as read
from .config import OFTConfig
from .layers import kind_of, rotations_of, state_of
from .surgery import Target, adapter_names, freeze, oft_layers, trained, walk
from .surgery.inject import inject_into
from .surgery.walk import fingerprint, library_root, merged_layers, same_base, some

log = logging.getLogger(__name__)

Content = Literal["adapter", "full", "plain", "merged"]


def describe(model: nn.Module) -> dict[str, Any]:
    """The structure of a model's adapters, enough to inject them again: primitives only."""
    adapters: dict[str, Any] = {}
    for adapter in adapter_names(model):
        layers, kinds, fingerprints, config = {}, {}, {}, None
        for name, layer in oft_layers(model).items():
            state = state_of(layer)
            if state is None or adapter not in state.configs:
                continue
            config = state.configs[adapter]
            layers[name] = {part: rotation.block_size for part, rotation in rotations_of(layer, adapter).items()}
            kinds[name] = state.kind.name
            fingerprints[name] = state.fingerprint
        owned = [name for name, _, slot in trained.slots(model) if adapter in slot.owners]
        fields = dataclasses.asdict(config) if config is not None else {}
        adapters[adapter] = {
            "config": fields,
            "root": library_root(model, [*layers, *owned])[0],
            "layers": layers,
            "kinds": kinds,
            "fingerprints": fingerprints,
            "owned": owned,
        }
    states = [state for layer in oft_layers(model).values() if (state := state_of(layer)) is not None]
    active = list(dict.fromkeys(name for state in states for name in state.active))
    return {"version": VERSION, "adapters": adapters, "active": active, "merged": bool(merged_layers(model))}


def write_entry(model: nn.Module, checkpoint: dict[str, Any], adapter_only: bool, kept: Iterable[Tensor] = ()) -> None:
    """Add the `lightning_oft` entry, and drop the frozen base where `adapter_only`; a merged model is written whole.

    Args:
        model: the LightningModule whose `state_dict` the checkpoint holds.
        checkpoint: changed in place.
        adapter_only: leave out parameters of the base that do not train.
        kept: parameters to keep although they are frozen now, such as those in an optimizer.
    """
    if not oft_layers(model):
        return
    entry = describe(model)
    entry["adapter_only"] = adapter_only and not entry["merged"]
    waiting = {
        name: {owner: value for owner, value in slot.waiting.items() if owner != trained.BASE}
        for name, _, slot in trained.slots(model)
    }
    entry["waiting"] = {name: values for name, values in waiting.items() if values}
    entry["unfrozen"] = [] if entry["merged"] else _unfrozen_names(model)
    checkpoint[ENTRY] = {**checkpoint.get(ENTRY, {}), **entry}
    if entry["adapter_only"]:
        dropped = frozen_names(model, kept)
        for holder, key in _states(checkpoint):
            holder[key] = {name: value for name, value in holder[key].items() if name not in dropped}


def _states(checkpoint: dict[str, Any]) -> Iterator[tuple[dict[str, Any], str]]:
    """Where a checkpoint keeps a model's tensors: the model, the current one beside EMA's average, and SWA's average."""
    yield from ((checkpoint, key) for key in ("state_dict", "current_model_state") if key in checkpoint)
    callbacks = checkpoint.get("callbacks")
    for state in callbacks.values() if isinstance(callbacks, dict) else ():
        if isinstance(state, dict) and isinstance(state.get("average_model_state"), dict):
            yield state, "average_model_state"


def frozen_names(model: nn.Module, kept: Iterable[Tensor]) -> set[str]:
    """State-dict names of the base's parameters that never trained."""
    keep = {id(tensor) for tensor in kept} | {id(tensor) for _, tensor, slot in trained.slots(model) if slot.owners}
    return {
        name
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if not (parameter.requires_grad or is_rotation_key(name) or id(parameter) in keep)
    }


def _unfrozen_names(model: nn.Module) -> list[str]:
    """Parameters of the base that train although no adapter owns them: another callback has unfrozen them."""
    owned = {id(tensor) for _, tensor, slot in trained.slots(model) if slot.owners}
    named = model.named_parameters(remove_duplicate=False)
    return [name for name, p in named if p.requires_grad and not is_rotation_key(name) and id(p) not in owned]


def content_of(checkpoint: Mapping[str, Any]) -> Content:
    """What a checkpoint's `state_dict` holds: an adapter alone, an adapter with its base, a plain or a merged model."""
    entry = checkpoint.get(ENTRY, {})
    if entry.get("merged"):
        return "merged"
    if not any(is_rotation_key(name) for name in checkpoint.get("state_dict", {})):
        return "plain"
    return "adapter" if entry.get("adapter_only") else "full"


def complete(model: nn.Module, checkpoint: dict[str, Any]) -> Content:
    """Make a checkpoint's `state_dict` one that the adapted model loads strictly; check it before anything is loaded.

    An adapter's gets the model's own base, a plain model's gets the model's own adapter. A merged model's rotations are
    part of its weights already, so the model's adapter starts again from the identity.

    Raises:
        CheckpointError: another base, or another adapter.
    """
    content = content_of(checkpoint)
    current = model.state_dict()
    if content in ("plain", "merged"):
        fill = {name: value for name, value in current.items() if is_rotation_key(name)}
        if content == "merged":
            fill = {name: torch.zeros_like(value) for name, value in fill.items()}
    else:
        _check_rotations(checkpoint["state_dict"], current)
        fill = {}
        if content == "adapter":
            check_base(model, checkpoint[ENTRY])
            fill = {name: current[name] for name in frozen_names(model, ()) if name in current}
            fill = {name: value for name, value in fill.items() if not is_rotation_key(name)}
        _restore_waiting(model, checkpoint.get(ENTRY, {}))
    for holder, key in _states(checkpoint):
        holder[key] = {**fill, **holder[key]}
    return content


def check_loaded(model: nn.Module, checkpoint: Mapping[str, Any]) -> None:
    """Check a checkpoint whose tensors a strategy has loaded already, before anybody could ask what they were.

    Raises:
        CheckpointError: the adapter or the base is another one than the checkpoint was written from.
    """
    entry = checkpoint.get(ENTRY)
    if entry is None or entry["merged"]:
        raise CheckpointError(
            "this strategy loads checkpoints of adapters only, and the file holds a model without one: load its weights "
            "in configure_model, before they are sharded"
        )
    mine, theirs = describe(model)["adapters"], entry["adapters"]
    for adapter in {**mine, **theirs}:
        if mine.get(adapter, {}).get("layers") != theirs.get(adapter, {}).get("layers"):
            raise CheckpointError(
                f"the checkpoint's adapter {adapter!r} turns other layers, or blocks of another size, than the model's: "
                "use its own target_modules and block size (lightning-oft info prints them)"
            )
    check_base(model, entry)


def _check_rotations(theirs: Mapping[str, Tensor], mine: Mapping[str, Tensor]) -> None:
    found = {name: tuple(value.shape) for name, value in theirs.items() if is_rotation_key(name)}
    wanted = {name: tuple(value.shape) for name, value in mine.items() if is_rotation_key(name)}
    remedy = "use the checkpoint's own target_modules, block size and adapter name (lightning-oft info prints them)"
    lacking, unknown = wanted.keys() - found.keys(), found.keys() - wanted.keys()
    if lacking or unknown:
        what = f"lacks {some(sorted(lacking))}" if lacking else f"has {some(sorted(unknown))}, which the model lacks"
        raise CheckpointError(f"the checkpoint's adapter is another one: it {what}; {remedy}")
    other = [name for name in wanted if wanted[name] != found[name]]
    if other:
        name = other[0]
        raise CheckpointError(
            f"the checkpoint's adapter has another block size: {name} is {found[name]} there and {wanted[name]} here; {remedy}"
        )
    broken = [name for name in wanted if theirs[name].is_floating_point() and not bool(theirs[name].isfinite().all())]
    if broken:
        raise CheckpointError(
            f"the checkpoint's generators {some(broken)} are NaN or infinite; use an earlier checkpoint"
        )


def check_base(model: nn.Module, entry: Mapping[str, Any]) -> None:
    """Raise CheckpointError where an adapter was trained on another base than the model has."""
    layers = oft_layers(model)
    different = [
        name
        for adapter in entry.get("adapters", {}).values()
        for name, theirs in adapter.get("fingerprints", {}).items()
        if name in layers and (state := state_of(layers[name])) and not same_base(state.fingerprint, theirs)
    ]
    if different:
        raise CheckpointError(
            f"the checkpoint was trained on another base: {some(different)} differ; load the base it was trained on, or "
            "use load_adapter to put its rotations on this one"
        )


def refresh_fingerprints(model: nn.Module) -> None:
    """Recognise the base that is in the model now, after it was replaced."""
    for layer in oft_layers(model).values():
        state = state_of(layer)
        if state is not None:
            first = next(iter(state.kind.parts(layer).values()))
            state.fingerprint = fingerprint(layer.get_parameter(first.parameter))


def _restore_waiting(model: nn.Module, entry: Mapping[str, Any]) -> None:
    stored = entry.get("waiting", {})
    for name, _, slot in trained.slots(model):
        for owner, value in stored.get(name, {}).items():
            if owner in slot.owners and owner != slot.live:
                slot.waiting[owner] = value.clone()


def restore_structure(model: nn.Module, entry: Mapping[str, Any]) -> list[str]:
    """Inject the adapters that a checkpoint's entry describes; names are relative to the model. Returns their names.

    Raises:
        CheckpointError: the model lacks a layer of the adapter.
    """
    modules = dict(walk(model))
    for adapter, content in entry.get("adapters", {}).items():
        missing = [name for name in content["layers"] if name not in modules or kind_of(modules[name]) is None]
        if missing:
            raise CheckpointError(
                f"the model has no layer {some(missing)}, which adapter {adapter!r} turns; build the model it was trained on"
            )
        config = OFTConfig(**content["config"])
        targets = {}
        for name, parts in content["layers"].items():
            kind = kind_of(modules[name])
            assert kind is not None
            fan_ins = {part: place.fan_in for part, place in kind.parts(modules[name]).items()}
            if any(part not in fan_ins or fan_ins[part] % size for part, size in parts.items()):
                raise CheckpointError(
                    f"{name}: has fan-in {some(map(str, fan_ins.values()))} in the model, and blocks of "
                    f"{some(map(str, parts.values()))} in the checkpoint; build the model that the adapter was trained on"
                )
            targets[name] = Target(modules[name], kind, tuple(parts))
        # What is trained whole is listed by name: the configuration's own names start at a root we do not know.
        rotations_only = dataclasses.replace(config, modules_to_save=None, bias="none", task_type=None)
        inject_into(model, targets, content["layers"], rotations_only, adapter)
        for target in targets.values():
            state = state_of(target.module)
            assert state is not None
            state.configs[adapter] = config
        known: dict[int, trained.Slot] = {id(tensor): slot for _, tensor, slot in trained.slots(model)}
        for name in content["owned"]:
            owner, _, key = name.rpartition(".")
            trained.claim(modules[owner], key, adapter, adapter in entry.get("active", ()), known)
    freeze(model)
    return list(entry.get("adapters", {}))


def load_state(model: nn.Module, state: Mapping[str, Any], path: str | Path) -> None:
    """`load_state_dict`, with what does not fit said in one line.

    Raises:
        CheckpointError: names and shapes are not those of the model.
    """
    try:
        model.load_state_dict(state)
    except RuntimeError:
        mine = model.state_dict()
        lacking, unknown = [n for n in mine if n not in state], [n for n in state if n not in mine]
        other = [n for n in mine if n in state and getattr(mine[n], "shape", 0) != getattr(state[n], "shape", 0)]
        if not (lacking or unknown or other):
            raise
        what = [f"lacks {some(lacking)}"] if lacking else []
        what += [f"has {some(unknown)}, which the model lacks"] if unknown else []
        what += [f"has other shapes of {some(other)}"] if other else []
        raise CheckpointError(
            f"{path}: {' and '.join(what)}; build the model that the checkpoint was written from"
        ) from None
