"""What a Lightning checkpoint holds of an adapted model, and how it finds its way back into one.

Only plain dictionaries are read and written here: no Trainer, no Lightning. A checkpoint carries, beside `state_dict`,
one entry `lightning_oft` of primitives and tensors, so that `torch.load(weights_only=True)` reads all of it. Generators
stand in the state dict alone; names in the entry are those of the LightningModule.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_oft.config import OFTConfig
from lightning_oft.formats.checkpoint_file import ENTRY as ENTRY
from lightning_oft.formats.checkpoint_file import VERSION, CheckpointError, is_rotation_key
from lightning_oft.formats.peft_keys import strip_wrappers
from lightning_oft.model import saved_modules
from lightning_oft.model.activation import activate
from lightning_oft.model.adapter_state import AdapterState, Base, LayerRotations, copied, describe
from lightning_oft.model.fingerprint import other_bases
from lightning_oft.model.loading import put
from lightning_oft.model.placement import AdapterError
from lightning_oft.model.traversal import (
    Modules,
    adapted,
    adapter_names,
    joined,
    merged_layers,
    own_parameters,
    some,
    walk,
)

Content = Literal["adapter", "full", "plain", "merged"]


def structure(modules: Modules) -> dict[str, Any]:
    """The entry of a checkpoint: the model's adapters without their generators; primitives, and what PEFT needs."""
    states = [describe(modules, name) for name in adapter_names(modules)]
    return {
        "version": VERSION,
        "adapters": {state.name: _to_primitives(state) for state in states},
        "active": list(dict.fromkeys(name for _, _, state in adapted(modules) for name in state.active)),
        "merged": bool(merged_layers(modules)),
    }


def _to_primitives(state: AdapterState) -> dict[str, Any]:
    root = state.root or ""
    return {
        "config": asdict(state.config),
        "root": root,
        "layers": {joined(root, name): one.block_sizes for name, one in state.layers.items()},
        "kinds": {joined(root, name): one.layer_type for name, one in state.layers.items()},
        "known_to_peft": [joined(root, name) for name, one in state.layers.items() if one.is_known_to_peft],
        "fingerprints": {joined(root, name): value for name, value in state.fingerprints.items()},
        "owned": [joined(root, name) for name in state.saved],
        "modules_to_save": [joined(root, name) for name in state.modules_to_save],
        "carried": {joined(root, name): copied(tensor) for name, tensor in state.carried.items()},
        "has_unique_names": state.has_unique_names,
        "base": list(state.base) if state.base is not None else None,
    }


def read_states(checkpoint: Mapping[str, Any]) -> list[AdapterState]:
    """The adapters in a checkpoint. A merged one has no generators any more."""
    tensors = {strip_wrappers(name): value for name, value in checkpoint["state_dict"].items()}
    entry = checkpoint.get(ENTRY, {})
    return [
        _from_primitives(name, content, tensors, entry.get("waiting", {}))
        for name, content in entry.get("adapters", {}).items()
    ]


def _from_primitives(
    name: str, content: Mapping[str, Any], tensors: Mapping[str, Tensor], waiting: Mapping[str, Mapping[str, Tensor]]
) -> AdapterState:
    root = str(content.get("root", ""))
    cut = len(root) + 1 if root else 0
    saved = {key: waiting.get(key, {}).get(name, tensors.get(key)) for key in content["owned"]}
    layers = {}
    for layer, sizes in content["layers"].items():
        found = {part: tensors.get(f"{layer}.oft_R.{joined(name, part)}.weight".lstrip(".")) for part in sizes}
        generators = {part: generator for part, generator in found.items() if generator is not None}
        layer_type = content.get("kinds", {}).get(layer, "")
        known = layer in content.get("known_to_peft", content["layers"])
        layers[layer[cut:]] = LayerRotations(layer_type, known, dict(sizes), generators)
    base = content.get("base")
    return AdapterState(
        name=name,
        config=OFTConfig(**content["config"]),
        layers=layers,
        root=root,
        saved={key[cut:]: tensor for key, tensor in saved.items() if tensor is not None},
        modules_to_save=[key[cut:] for key in content.get("modules_to_save", ())],
        carried={key[cut:]: tensor for key, tensor in content.get("carried", {}).items()},
        fingerprints={key[cut:]: value for key, value in content["fingerprints"].items() if value is not None},
        base=Base(*base) if base else None,
        has_unique_names=bool(content.get("has_unique_names", True)),
    )


def write_entry(model: nn.Module, checkpoint: dict[str, Any], adapter_only: bool, kept: Iterable[Tensor] = ()) -> None:
    """Add the `lightning_oft` entry, and drop the frozen base where `adapter_only`; a merged model is written whole.

    Args:
        model: the LightningModule whose `state_dict` the checkpoint holds.
        checkpoint: changed in place.
        adapter_only: leave out parameters of the base that do not train.
        kept: parameters to keep although they are frozen now, such as those in an optimizer.
    """
    modules = walk(model)
    if not adapter_names(modules):
        return
    entry = structure(modules)
    entry["adapter_only"] = adapter_only and not entry["merged"]
    waiting = {
        name: {owner: value for owner, value in slot.waiting.items() if owner != saved_modules.BASE}
        for name, _, slot in saved_modules.saved_tensors(modules)
    }
    entry["waiting"] = {name: values for name, values in waiting.items() if values}
    entry["unfrozen"] = [] if entry["merged"] else _unfrozen_names(model, modules)
    checkpoint[ENTRY] = {**checkpoint.get(ENTRY, {}), **entry}
    if entry["adapter_only"]:
        dropped = frozen_names(model, modules, kept)
        for holder, key in _states(checkpoint):
            holder[key] = {name: value for name, value in holder[key].items() if name not in dropped}


def _states(checkpoint: dict[str, Any]) -> Iterator[tuple[dict[str, Any], str]]:
    """Where a checkpoint keeps a model's tensors: the model, the current one beside EMA's average, and SWA's average."""
    yield from ((checkpoint, key) for key in ("state_dict", "current_model_state") if key in checkpoint)
    callbacks = checkpoint.get("callbacks")
    for state in callbacks.values() if isinstance(callbacks, dict) else ():
        if isinstance(state, dict) and isinstance(state.get("average_model_state"), dict):
            yield state, "average_model_state"


def frozen_names(model: nn.Module, modules: Modules, kept: Iterable[Tensor] = ()) -> set[str]:
    """State-dict names of the base's parameters that never trained."""
    keep = {id(tensor) for tensor in kept} | _owned(modules)
    return {
        name
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if not (parameter.requires_grad or is_rotation_key(name) or id(parameter) in keep)
    }


def _owned(modules: Modules) -> set[int]:
    """ids of the tensors that adapters train whole."""
    return {id(saved.tensor) for saved in saved_modules.saved_tensors(modules) if saved.slot.owners}


def _unfrozen_names(model: nn.Module, modules: Modules) -> list[str]:
    """Parameters of the base that train although no adapter owns them: another callback has unfrozen them."""
    owned = _owned(modules)
    if not any(p.requires_grad and id(p) not in owned for p in own_parameters(modules)):
        return []
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
    content, modules = content_of(checkpoint), walk(model)
    current = model.state_dict()
    if content in ("plain", "merged"):
        fill = {name: value for name, value in current.items() if is_rotation_key(name)}
        if content == "merged":
            fill = {name: torch.zeros_like(value) for name, value in fill.items()}
    else:
        _check_rotations(checkpoint["state_dict"], current)
        fill = {}
        if content == "adapter":
            check_base(modules, checkpoint[ENTRY])
            fill = {name: current[name] for name in frozen_names(model, modules) if name in current}
            fill = {name: value for name, value in fill.items() if not is_rotation_key(name)}
        _restore_waiting(modules, checkpoint.get(ENTRY, {}))
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
    modules = walk(model)
    mine, theirs = structure(modules)["adapters"], entry["adapters"]
    for adapter in {**mine, **theirs}:
        if mine.get(adapter, {}).get("layers") != theirs.get(adapter, {}).get("layers"):
            raise CheckpointError(
                f"the checkpoint's adapter {adapter!r} turns other layers, or blocks of another size, than the model's: "
                "use its own target_modules and block size (lightning-oft info prints them)"
            )
    check_base(modules, entry)


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


def check_base(modules: Modules, entry: Mapping[str, Any]) -> None:
    """Raise CheckpointError where an adapter was trained on another base than the model has."""
    layers = {name for name, _, _ in adapted(modules)}
    for adapter in entry.get("adapters", {}).values():
        theirs = {name: value for name, value in adapter.get("fingerprints", {}).items() if name in layers}
        different = other_bases(modules, theirs)
        if different:
            raise CheckpointError(
                f"the checkpoint was trained on another base: {some(different)} differ; load the base it was trained on, "
                "or use load_adapter to put its rotations on this one"
            )


def _restore_waiting(modules: Modules, entry: Mapping[str, Any]) -> None:
    stored = entry.get("waiting", {})
    for name, _, slot in saved_modules.saved_tensors(modules):
        for owner, value in stored.get(name, {}).items():
            if owner in slot.owners and owner != slot.live:
                slot.waiting[owner] = value.clone()


def put_adapters(model: nn.Module, checkpoint: Mapping[str, Any]) -> None:
    """Put the adapters of a checkpoint into a model, active as they were.

    Raises:
        CheckpointError: the model lacks a layer of an adapter, or has another base.
    """
    for state in read_states(checkpoint):
        try:
            with warnings.catch_warnings():
                for decided_below in ("adapter .* is not active on", ".* was trained on another base"):
                    warnings.filterwarnings("ignore", message=decided_below)
                put(model, state)
        except AdapterError as error:
            raise CheckpointError(f"the checkpoint does not fit the model: {error}") from None
    modules = walk(model)
    active = [name for name in checkpoint[ENTRY].get("active", ()) if name in adapter_names(modules)]
    activate(modules, active, active)


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
