"""Folding rotations into the weights, and getting the weights back."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Callable, Collection
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_oft.layers import LayerState, rotations_of, state_of

from .frozen import guard_nested_tensors, release_norms, take_hold
from .sharded import by_rows, is_part, is_sharded, whole, write
from .sharded import part as part_of
from .switch import remember_choice, set_adapter
from .ties import retie_configs, untie_configs
from .walk import (
    fingerprint,
    forget_compiled,
    merged_layers,
    oft_layers,
    require_enabled,
    require_unmerged,
    same_base,
    some,
    walk,
)

log = logging.getLogger(__name__)

KEEP_LIMIT = 8 * 2**30
"""Bytes of base weights per process up to which keep_base="auto" keeps them."""

PIECE = 2**24
"""Entries of a weight that are folded at a time: an embedding of gigabytes needs no float32 copy of all of it."""

KeepBase = Literal["auto", "always", "never"]


@torch.no_grad()
def merge(
    model: nn.Module,
    adapter_name: str | list[str] | None = None,
    keep_base: KeepBase = "auto",
    device: torch.device | str | None = None,
) -> list[str]:
    """Fold the active rotations into the weights, in place; the model computes alone what it did with its adapters.

    Names, classes and state-dict keys are those of the base afterwards. Each layer keeps its rotations out of sight,
    so that `unmerge` can undo it. Either every layer is merged, or an error leaves the model as it was (where
    keep_base is off and some layers were merged already, as `unmerge` would).

    Args:
        model: a model with adapters.
        adapter_name: adapters to merge, in order; the active ones by default.
        keep_base: whether to keep a CPU copy of the adapted weights, which `unmerge` returns to the bit: "auto" keeps
            them up to 8 GiB a process, "always", or "never" (unmerge then solves, to 1e-6 in float32).
        device: where to compute, layer by layer; where each weight is by default.

    Returns:
        The names of the layers merged.

    Raises:
        ValueError: no adapter, or a generator is not finite; names the layer.
        RuntimeError: already merged, or inside disable_adapters.
    """
    return merge_gathered(model, adapter_name, keep_base, device)


@torch.no_grad()
def merge_gathered(
    model: nn.Module,
    adapter_name: str | list[str] | None = None,
    keep_base: KeepBase = "auto",
    device: torch.device | str | None = None,
    gathered: Callable[[nn.Module], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
    only: Collection[str] | None = None,
) -> list[str]:
    """`merge` for a model whose tensors are only at hand within `gathered(layer)`; of all layers, or of those named."""
    if keep_base not in ("auto", "always", "never"):
        raise ValueError(f"keep_base={keep_base!r}: must be 'auto', 'always' or 'never'")
    layers = {name: layer for name, layer in oft_layers(model).items() if only is None or name in only}
    if not layers:
        raise ValueError("nothing to merge: the model has no adapter; call inject or load_adapter first")
    if only is None:
        require_unmerged(model, "merge again")
    require_enabled(model, "merge")
    restore = remember_choice(model)
    done: list[nn.Module] = []
    try:
        if adapter_name is not None:
            set_adapter(model, adapter_name)
        _check_mergeable(layers, gathered)
        keep = _keeps(layers, keep_base)
        shared = _shared_parameters(model)
        for layer in layers.values():
            with gathered(layer):
                done.append(layer)
                _merge_layer(layer, keep, device, shared)
    except BaseException:
        for layer in done:
            with gathered(layer):
                _unmerge_layer(layer)
        restore()
        raise
    tied = [n for n, layer in layers.items() if any(isinstance(b, nn.Parameter) for b in _state(layer).base.values())]
    untie_configs(model, tied)
    if len(merged_layers(model)) == len(oft_layers(model)):
        release_norms(model)
    guard_nested_tensors(model)
    forget_compiled()
    return list(layers)


def _keeps(layers: dict[str, nn.Module], keep_base: KeepBase) -> bool:
    weights = [part_of(weight) for layer in layers.values() for _, _, weight in _weights(layer)]
    size = sum(weight.numel() * weight.element_size() for weight in weights)
    keep = keep_base == "always" or (keep_base == "auto" and size <= KEEP_LIMIT)
    log.info("merge: %s the base weights (%.1f MiB)", "keeping" if keep else "not keeping", size / 2**20)
    return keep


@torch.no_grad()
def unmerge(model: nn.Module) -> list[str]:
    """Undo `merge`, in place: the base weights return, and the adapters are active beside them again.

    To the bit where `merge` kept the base, else by solving with the rotations (1e-6 relative in float32; lower
    precisions round).

    Returns:
        The names of the layers unmerged.

    Raises:
        RuntimeError: the model is not merged, or a merged weight has been changed since.
    """
    layers = merged_layers(model)
    if not layers:
        raise RuntimeError("nothing to unmerge: no layer of the model is merged; call merge(model) first")
    changed = [name for name, layer in layers.items() if _changed_since(layer)]
    if changed:
        raise RuntimeError(
            f"cannot unmerge {some(changed)}: the weights were changed after the merge (another checkpoint was loaded?); "
            "call unload(model) to keep them as the new base"
        )
    for layer in layers.values():
        _unmerge_layer(layer)
    retie_configs(model)
    take_hold(model)
    guard_nested_tensors(model)
    forget_compiled()
    return list(layers)


def hide_rotations(layer: nn.Module) -> None:
    """Take a layer's rotations out of the module tree; `layer.oft_R` still answers."""
    rotations = layer._modules.pop("oft_R", None)
    if rotations is not None:
        layer.__dict__["oft_R"] = rotations


def show_rotations(layer: nn.Module, device: torch.device) -> None:
    """Put a layer's rotations back into the module tree, where its weights are now."""
    rotations = layer.__dict__.pop("oft_R", None)
    if rotations is not None:
        sharded = any(is_sharded(parameter) for parameter in rotations.parameters())
        layer.oft_R = (rotations if sharded else rotations.to(device)).train(layer.training)


def _state(layer: nn.Module) -> LayerState:
    state = state_of(layer)
    assert state is not None
    return state


def _weights(layer: nn.Module) -> list[tuple[str, str, Tensor]]:
    """(part, parameter name, weight) of the rotated weights of a layer."""
    state = _state(layer)
    parts = state.kind.parts(layer)
    used = {part for name in state.active for part in rotations_of(layer, name)}
    return [(part, parts[part].parameter, layer.get_parameter(parts[part].parameter)) for part in parts if part in used]


def _matrices(layer: nn.Module, part: str, names: list[str], device: torch.device) -> list[Tensor]:
    found = [rotations_of(layer, name).get(part) for name in names]
    return [rotation.matrix().to(device) for rotation in found if rotation is not None]


def _check_mergeable(layers: dict[str, nn.Module], gathered: Callable[[nn.Module], Any]) -> None:
    broken = []
    for name, layer in layers.items():
        with gathered(layer):
            if not _is_finite(layer):
                broken.append(name)
    packed = [
        name
        for name, layer in layers.items()
        if not all(_is_plain(layer, place.parameter) for place in _state(layer).kind.parts(layer).values())
    ]
    if broken:
        raise ValueError(
            f"cannot merge: generators of {some(broken)} are NaN or infinite; nothing was changed: load an earlier state of the adapter"
        )
    if packed:
        raise ValueError(
            f"cannot merge: the weights of {some(packed)} are quantized or packed; nothing was changed: load the base without quantization to merge"
        )


def _is_finite(layer: nn.Module) -> bool:
    active = [rotation for name in _state(layer).active for rotation in rotations_of(layer, name).values()]
    # The whole generators, on every process: one that alone raised would leave the others waiting.
    return all(bool(whole(rotation.weight.detach()).isfinite().all()) for rotation in active)


def _is_plain(layer: nn.Module, parameter: str) -> bool:
    owner, _, key = parameter.rpartition(".")
    weight = layer.get_submodule(owner)._parameters.get(key)
    return weight is not None and weight.is_floating_point() and type(part_of(weight.data)) is Tensor


def _shared_parameters(model: nn.Module) -> set[int]:
    """ids of parameters that more than one module of the model holds."""
    seen: dict[int, int] = {}
    for _, module in walk(model):
        for parameter in module._parameters.values():
            seen[id(parameter)] = seen.get(id(parameter), 0) + 1
    return {key for key, count in seen.items() if count > 1}


def _merge_layer(layer: nn.Module, keep: bool, device: torch.device | str | None, shared: set[int]) -> None:
    state = _state(layer)
    state.merged, state.base, state.merged_fingerprints = tuple(state.active), {}, {}
    for part, parameter, weight in _weights(layer):
        where = torch.device(device) if device is not None else weight.device
        matrices = _matrices(layer, part, state.active, where)
        folded = _by_rows(layer, weight, matrices, state.kind.fold, where)
        if not is_sharded(weight) and not bool(folded.isfinite().all()) and bool(weight.isfinite().all()):
            raise ValueError(
                f"cannot merge: the merged {parameter} overflows {weight.dtype}; nothing was changed: "
                "load an earlier state of the adapter, or merge in float32"
            )
        if id(weight) in shared:
            state.base[parameter] = weight
            _set_parameter(layer, parameter, nn.Parameter(folded, requires_grad=False))
        else:
            state.base[parameter] = _kept(weight) if keep else None
            write(weight, folded)
        state.merged_fingerprints[parameter] = fingerprint(folded)
    state.kind.detach(layer)
    hide_rotations(layer)


def _by_rows(
    layer: nn.Module, weight: Tensor, matrices: list[Tensor], change: Callable[..., Tensor], where: torch.device
) -> Tensor:
    """What this process holds of the weight, folded or unfolded, where the weight is."""

    row_dim = _state(layer).kind.row_dim

    def changed(rows: Tensor, columns: slice) -> Tensor:
        own = [_within(matrix, columns) for matrix in matrices]
        count = max(1, PIECE * rows.shape[row_dim] // max(1, rows.numel()))
        pieces = [change(layer, piece.to(where), own).to(weight.device) for piece in rows.split(count, row_dim)]  # type: ignore[no-untyped-call]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, row_dim)

    return by_rows(weight, row_dim, math.lcm(*(matrix.shape[-1] for matrix in matrices)), changed)


def _within(matrix: Tensor, columns: slice) -> Tensor:
    """The blocks of a rotation, (n or 1, b, b), that turn these columns."""
    if columns == slice(None) or matrix.shape[0] == 1:
        return matrix
    return matrix[columns.start // matrix.shape[-1] : columns.stop // matrix.shape[-1]]


def _kept(weight: Tensor) -> Tensor:
    """A CPU copy of the weight; the tensor itself where exchanging `.data` leaves it alone."""
    return part_of(weight.detach()).to("cpu", copy=True) if is_part(weight) else weight.data.cpu()


def _set_parameter(layer: nn.Module, name: str, parameter: nn.Parameter) -> None:
    owner, _, key = name.rpartition(".")
    layer.get_submodule(owner)._parameters[key] = parameter


def _unmerge_layer(layer: nn.Module) -> None:
    """Give a layer its base weights and its rotations back; a layer merged in part too."""
    state = _state(layer)
    names = list(state.merged or ())
    device = next((p.device for p in layer.parameters()), torch.device("cpu"))
    for part, parameter, weight in _weights(layer):
        if parameter not in state.base:
            continue
        base = state.base[parameter]
        if isinstance(base, nn.Parameter):  # a tied weight: the layer goes back to sharing it
            base.data = base.data.to(weight.device)
            _set_parameter(layer, parameter, base)
        elif base is not None:
            write(weight, base.to(device=weight.device, dtype=weight.dtype))
        else:
            matrices = _matrices(layer, part, names, weight.device)
            write(weight, _by_rows(layer, weight, matrices, state.kind.unfold, weight.device))
    state.merged, state.base, state.merged_fingerprints = None, {}, {}
    show_rotations(layer, device)
    state.kind.attach(layer)


def _changed_since(layer: nn.Module) -> bool:
    """Whether a merged weight is no longer what merge left: going back to the base would lose the change."""
    state = _state(layer)
    now = {parameter: fingerprint(weight) for _, parameter, weight in _weights(layer)}
    return not all(same_base(now[key], was) for key, was in state.merged_fingerprints.items())
