"""What a Lightning checkpoint holds of an adapted model, and how it finds its way back into one.

Only plain dictionaries are read and written here: no Trainer, no Lightning. A checkpoint carries, beside `state_dict`,
one entry `lightning_oft` of primitives and tensors, so that `torch.load(weights_only=True)` reads all of it. Generators
stand in the state dict alone, where that has the names of the modules; names in the entry are those of the
LightningModule.
"""

import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_oft.formats.checkpoint_file import ENTRY as ENTRY
from lightning_oft.formats.checkpoint_file import NOTE as NOTE
from lightning_oft.formats.checkpoint_file import VERSION, generator_key, read_states, to_primitives
from lightning_oft.formats.checkpoint_file import is_rotation_key as is_rotation_key
from lightning_oft.formats.errors import CheckpointError as CheckpointError
from lightning_oft.formats.peft_tensors import strip_wrappers
from lightning_oft.layers.base import rotated_weights_of
from lightning_oft.model import AdapterError, AdapterState, put, saved_modules, traversal
from lightning_oft.model.activation import activate
from lightning_oft.model.adapter_state import describe
from lightning_oft.model.fingerprint import changed_bases, other_bases, trained_beside
from lightning_oft.model.loading import use_maps
from lightning_oft.model.packed import packed_names, without_packed
from lightning_oft.model.traversal import Modules, adapted, adapter_names, joined, some, walk

Content = Literal["adapter", "full", "plain", "merged"]


def write_entry(model: nn.Module, checkpoint: dict[str, Any], adapter_only: bool, kept: Iterable[Tensor] = ()) -> None:
    """Add the `lightning_oft` entry, and drop the frozen base where `adapter_only`; a merged model is written whole.

    `kept` are parameters to keep although they are frozen now, such as those in an optimizer.
    """
    modules = walk(model)
    states = [describe(modules, name, lambda tensor: tensor) for name in adapter_names(modules)]
    if not states:
        return
    packed = tuple(f"{name}." for name in packed_names(model))
    for name, parameter in model.named_parameters():  # HQQ's layers answer for their state without their children
        if name.startswith(packed) and is_rotation_key(name):
            checkpoint["state_dict"].setdefault(name, parameter.detach())
    merged = bool(traversal.merged_layers(modules))
    apart = {} if merged else _without_a_name(states, checkpoint)
    adapter_only = adapter_only and not merged and _has_own_names(model, checkpoint, packed)
    checkpoint[ENTRY] = {
        **checkpoint.get(ENTRY, {}),
        "note": NOTE,
        "version": VERSION,
        "adapters": {state.name: to_primitives(state) for state in states},
        "active": traversal.active_names(modules),
        "active_on": {name: state.active for name, _, state in adapted(modules)},
        "merged": merged,
        "adapter_only": adapter_only,
        "waiting": _waiting(modules, states),
        "apart": apart,
        "beside": trained_beside(modules),
        # What another callback has unfrozen.
        "unfrozen": [] if merged else [name for name, p in _base_parameters(model, modules) if p.requires_grad],
    }
    if merged:
        return
    for holder, key in _state_dicts(checkpoint):
        dropped = frozen_names(model, modules, holder[key], kept, packed_only=not adapter_only)
        holder[key] = {name: value for name, value in holder[key].items() if name not in dropped}
    if adapter_only:
        if changed := _without_stored(modules, checkpoint, changed_bases(modules)):
            what = f"the base is not in the checkpoint, and the weights of {some(changed)} changed after the injection"
            warnings.warn(f"{what}: set save_adapter_only=False, or a resume will find another base and refuse it")
        checkpoint["state_dict"][NOTE] = torch.empty(0)


def _without_stored(modules: Modules, checkpoint: Mapping[str, Any], layers: Iterable[str]) -> list[str]:
    """Those of these layers whose base weight is not in a checkpoint, as one is that trained beside its rotation."""
    stored = set(map(strip_wrappers, checkpoint.get("state_dict", ())))
    firsts = {name: next(iter(rotated_weights_of(modules[name]).values())).parameter for name in layers}
    return [name for name, parameter in firsts.items() if joined(name, parameter) not in stored]


def _waiting(modules: Modules, states: Iterable[AdapterState]) -> dict[str, dict[str, Tensor]]:
    """Values trained whole that the state dict lacks, since another adapter's are in their place; by tensor and owner."""
    ids = {id(value) for _, _, slot in saved_modules.saved_tensors(modules) for value in slot.waiting.values()}
    found: dict[str, dict[str, Tensor]] = {}
    for state in states:
        for name, value in state.rooted("").saved.items():
            if id(value) in ids:
                found.setdefault(name, {})[state.name] = value
    return found


def _adapter_tensors(states: Iterable[AdapterState]) -> dict[str, Tensor]:
    """What adapters train, by the names that the modules give it."""
    found: dict[str, Tensor] = {}
    for state in (state.rooted("") for state in states):
        for layer, one in state.layers.items():
            for tensor, values in (("weight", one.generators), ("magnitude", one.magnitudes)):
                found |= {generator_key(layer, state.name, part, tensor): value for part, value in values.items()}
        found |= state.saved
    return found


def _without_a_name(states: list[AdapterState], checkpoint: Mapping[str, Any]) -> dict[str, Tensor]:
    """What adapters train and a state dict has not under these names: a user's `state_dict` or on_save_checkpoint may
    have left it out, or cut a prefix off."""
    present = {strip_wrappers(name) for name in checkpoint["state_dict"]}
    return {name: value.detach() for name, value in _adapter_tensors(states).items() if name not in present}


def _has_own_names(model: nn.Module, checkpoint: Mapping[str, Any], packed: tuple[str, ...]) -> bool:
    """Whether a state dict has the names of the modules, below `packed` ones any: under others, nobody could tell the
    base from the rest."""
    tensors = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
    own = {strip_wrappers(name) for name, _ in tensors}
    return all(
        strip_wrappers(n) in own or n.startswith(packed) or n.endswith("_extra_state") for n in checkpoint["state_dict"]
    )


def _state_dicts(checkpoint: dict[str, Any]) -> list[tuple[dict[str, Any], str]]:
    """Where a checkpoint keeps a model's tensors: the model, the current one beside EMA's average, SWA's average."""
    callbacks = checkpoint.get("callbacks")
    states = [one for one in callbacks.values() if isinstance(one, dict)] if isinstance(callbacks, dict) else []
    places = [(checkpoint, "state_dict"), (checkpoint, "current_model_state")]
    places += [(state, "average_model_state") for state in states]
    return [(holder, key) for holder, key in places if isinstance(holder.get(key), dict)]


def frozen_names(
    model: nn.Module, modules: Modules, names: Iterable[str], kept: Iterable[Tensor] = (), packed_only: bool = False
) -> set[str]:
    """Those of a state dict's names that belong to the base and never trained: its parameters, and all that a quantized
    layer has beside its parameters, or this alone, since no such layer could load it into what is packed already."""
    keep = {id(tensor) for tensor in kept}
    frozen = {name for name, p in _base_parameters(model, modules) if not p.requires_grad and id(p) not in keep}
    trained = {name for name, _ in model.named_parameters(remove_duplicate=False)} - frozen
    packed = tuple(f"{name}." for name in packed_names(model))
    return {
        name
        for name in names
        if (name in frozen and not packed_only)
        or (name.startswith(packed) and name not in trained and not is_rotation_key(name))
    }


def _base_parameters(model: nn.Module, modules: Modules) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters that no adapter owns, by state-dict name."""
    owned = {id(tensor) for _, tensor, slot in saved_modules.saved_tensors(modules) if slot.owners}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if not is_rotation_key(name) and id(parameter) not in owned:
            yield name, parameter


def content_of(checkpoint: Mapping[str, Any]) -> Content:
    """What a checkpoint's `state_dict` holds: an adapter alone, an adapter with its base, a plain or a merged model."""
    entry = checkpoint.get(ENTRY, {})
    if entry.get("merged"):
        return "merged"
    if not any(is_rotation_key(name) for name in (*checkpoint.get("state_dict", ()), *entry.get("apart", ()))):
        return "plain"
    return "adapter" if entry.get("adapter_only") else "full"


def complete(model: nn.Module, checkpoint: dict[str, Any]) -> Content:
    """Make a checkpoint's `state_dict` one that the adapted model loads strictly; check it before anything is loaded.

    An adapter's gets the model's own base, a plain model's gets the model's own adapter. A merged model's rotations are
    part of its weights already, so the model's adapter starts again from the identity.
    Raises CheckpointError where the base or the adapter is another one.
    """
    content, modules = content_of(checkpoint), walk(model)
    with without_packed(model, checkpoint["state_dict"]):
        current = model.state_dict()
    if content in ("plain", "merged"):
        rotations = {name: value for name, value in current.items() if is_rotation_key(name)}
        fill = rotations if content == "plain" else {name: torch.zeros_like(value) for name, value in rotations.items()}
    else:
        if ENTRY in checkpoint:
            _use_maps(modules, _check(modules, checkpoint, with_base=content == "adapter"))
        frozen = frozen_names(model, modules, current) if content == "adapter" else set()
        fill = {name: value for name, value in current.items() if name in frozen}
        _choose_as(modules, checkpoint.get(ENTRY, {}))
        _load_apart(modules, checkpoint.get(ENTRY, {}))
        stored = checkpoint.get(ENTRY, {}).get("waiting", {})
        for name, _, slot in saved_modules.saved_tensors(modules):
            values = {owner: value.clone() for owner, value in stored.get(name, {}).items() if owner in slot.owners}
            slot.waiting.update({owner: value for owner, value in values.items() if owner != slot.live})
    for holder, key in _state_dicts(checkpoint):
        holder[key] = {**fill, **{name: value for name, value in holder[key].items() if name != NOTE}}
    return content


@torch.no_grad()
def _load_apart(modules: Modules, entry: Mapping[str, Any]) -> None:
    """Give adapters what no state dict has under its name; what that has is for the module's own load_state_dict."""
    if values := entry.get("apart", {}):
        mine = _adapter_tensors(describe(modules, name) for name in adapter_names(modules))
        shapes = ({name: found[name].shape for name in values if name in found} for found in (mine, values))
        if difference := _difference(*shapes):
            raise CheckpointError(f"the checkpoint's adapter {difference}; build the model that it was written from")
        for name, value in values.items():
            mine[name].copy_(value)


def check_loaded(model: nn.Module, checkpoint: Mapping[str, Any]) -> None:
    """Check a checkpoint whose tensors a strategy has loaded already, before anybody could ask what they were."""
    entry = checkpoint.get(ENTRY)
    if entry is None or entry["merged"]:
        raise CheckpointError(
            "this strategy loads checkpoints of adapters only, and the file holds a model without one: load its "
            "weights in configure_model, before they are sharded"
        )
    modules = walk(model)
    _use_maps(modules, _check(modules, checkpoint, with_base=True))


def _check(modules: Modules, checkpoint: Mapping[str, Any], with_base: bool) -> list[AdapterState]:
    """The adapters of a checkpoint. Raises CheckpointError where they, or the base of these, are others than the
    model's."""
    states = read_states(checkpoint)
    mine, theirs = (
        {  # size of the blocks, whether one is shared, and what they turn
            generator_key(layer, state.name, part, tensor): (size, state.config.block_share, state.config.side)
            for state in found
            for layer, one in state.rooted("").layers.items()
            for part, size in one.block_sizes.items()
            for tensor in ("weight", *(["magnitude"] if state.config.magnitude is not None else []))
        }
        for found in ([describe(modules, name) for name in adapter_names(modules)], states)
    )
    if difference := _difference(mine, theirs):
        raise CheckpointError(
            f"the checkpoint's adapter is another one: it {difference}; use the checkpoint's own target_modules, block "
            "size, magnitude and adapter name (lightning-oft info prints them)"
        )
    layers = set(_without_stored(modules, checkpoint, (name for name, _, _ in adapted(modules))))
    for state in states if with_base else ():
        prints = {name: value for name, value in state.rooted("").fingerprints.items() if name in layers}
        if different := other_bases(modules, prints):
            raise CheckpointError(
                f"the checkpoint was trained on another base: {some(different)} differ; load the base it was trained "
                "on, or put its rotations on this one by load_adapter(model, checkpoint, ignore_mismatched_base=True)"
            )
    return states


def _use_maps(modules: Modules, states: Iterable[AdapterState]) -> None:
    """Turn by the maps that a checkpoint's adapters turned by."""
    for state in states:
        layers = state.rooted("").layers.items()
        use_maps(modules, state.name, state, {(name, part) for name, one in layers for part in one.exact_parts})


def put_adapters(model: nn.Module, checkpoint: Mapping[str, Any]) -> None:
    """Put a checkpoint's adapters into a model, active as they were. Raises CheckpointError where they do not fit."""
    states = read_states(checkpoint)
    try:
        with warnings.catch_warnings():  # about what is decided below
            warnings.filterwarnings("ignore", message="adapter .* is not active on")
            for state in states:
                put(model, state, ignore_mismatched_base=True)
    except AdapterError as error:
        raise CheckpointError(f"the checkpoint does not fit the model: {error}") from None
    _choose_as(walk(model), checkpoint.get(ENTRY, {}))


def _choose_as(modules: Modules, entry: Mapping[str, Any]) -> None:
    """Activate what was active when the checkpoint was written (earlier versions do not say on which layers), if it
    is not: then what trains stays as it is too."""
    mine: Any = {name: state.active for name, _, state in adapted(modules)}
    names, on = entry.get("active", []), entry.get("active_on")
    if "active" in entry and (on != mine if on is not None else set(names) != set(traversal.active_names(modules))):
        activate(modules, names, names, on)


def load_state(model: nn.Module, state: Mapping[str, Any], path: str | Path) -> None:
    """`load_state_dict`, as strict as the module asks for; a CheckpointError says in one line what does not fit."""
    try:
        with without_packed(model, state):
            model.load_state_dict(state, strict=getattr(model, "strict_loading", True))
    except RuntimeError:
        shapes = ({n: getattr(v, "shape", None) for n, v in found.items()} for found in (model.state_dict(), state))
        difference = _difference(*shapes)
        if not difference:
            raise
        raise CheckpointError(f"{path}: {difference}; build the model that the checkpoint was written from") from None


def _difference(mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> str:
    """Which names a checkpoint lacks, has beyond the model's, or has in another size; empty where there are none."""
    lacking, unknown = [n for n in mine if n not in theirs], [n for n in theirs if n not in mine]
    other = [n for n in mine if n in theirs and mine[n] != theirs[n]]
    what = [f"lacks {some(lacking)}"] if lacking else []
    what += [f"has {some(unknown)}, which the model lacks"] if unknown else []
    what += [f"has other sizes of {some(other)}"] if other else []
    return " and ".join(what)
