"""Folding rotations into the weights, and getting the weights back."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Callable, Collection, Mapping
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from lightning_oft.codecs import Codec, codec_of, is_sharded, parameter_of, whole
from lightning_oft.layers.base import RotatedWeight
from lightning_oft.layers.state import LayerState, rotations_of, state_of
from lightning_oft.model.activation import activate, remember_choice
from lightning_oft.model.fingerprint import fingerprint, same_base
from lightning_oft.model.freezing import freeze_unmerged, restore_norm_classes, sync_nested_tensors
from lightning_oft.model.saved_modules import conflict
from lightning_oft.model.tied_weights import retie_configs, shared_parameters, untie_configs
from lightning_oft.model.traversal import (
    Modules,
    adapted,
    merged_layers,
    require_adapter,
    require_enabled,
    require_unmerged,
    reset_compiled_code,
    some,
    walk,
)

log = logging.getLogger(__name__)

KEEP_LIMIT = 8 * 2**30
"""Bytes of base weights per process up to which keep_base="auto" keeps them."""

PIECE = 2**24
"""Entries of a weight that are folded at a time: an embedding of gigabytes needs no float32 copy of all of it."""

KeepBase = Literal["auto", "always", "never"]
Layers = Mapping[str, nn.Module]


class _Weight(NamedTuple):
    """One rotated weight of a layer, and how it is stored."""

    name: str
    part: RotatedWeight
    codec: Codec


@torch.no_grad()
def merge(
    model: nn.Module,
    adapter_name: str | list[str] | None = None,
    keep_base: KeepBase = "auto",
    device: torch.device | str | None = None,
) -> list[str]:
    """Fold the active rotations into the weights, in place; the model computes alone what it did with its adapters.

    Names, classes and state-dict keys are those of the base afterwards. Each layer keeps its rotations out of the
    module tree, so that `unmerge` can undo it. Either every layer is merged, or an error leaves the model as it was
    (where keep_base is off and some layers were merged already, as `unmerge` would).

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
    modules = walk(model)
    require_unmerged(modules, "merge again")
    return merge_layers(modules, adapter_name, keep_base, device)


@torch.no_grad()
def merge_layers(
    modules: Modules,
    adapter_name: str | list[str] | None = None,
    keep_base: KeepBase = "auto",
    device: torch.device | str | None = None,
    gathered: Callable[[nn.Module], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
    only: Collection[str] | None = None,
) -> list[str]:
    """`merge` of all layers or of those named, for a model whose tensors are at hand within `gathered(layer)` only."""
    if keep_base not in ("auto", "always", "never"):
        raise ValueError(f"keep_base={keep_base!r}: must be 'auto', 'always' or 'never'")
    layers = {name: layer for name, layer, _ in adapted(modules) if only is None or name in only}
    if not layers:
        raise ValueError("nothing to merge: the model has no adapter; call inject or load_adapter first")
    require_enabled(modules, "merge")
    restore = remember_choice(modules)
    done: list[nn.Module] = []
    try:
        if adapter_name is not None:
            _choose(modules, [adapter_name] if isinstance(adapter_name, str) else list(adapter_name))
        _check_mergeable(layers, gathered)
        keep = _keeps(layers, keep_base)
        shared = shared_parameters(modules)
        for _, layer, state in adapted(layers):
            with gathered(layer):
                done.append(layer)
                _merge_layer(layer, state, keep, device, shared)
    except BaseException:
        for layer in done:
            with gathered(layer):
                _unmerge_layer(layer)
        restore()
        raise
    untie_configs(modules, [name for name, _, state in adapted(layers) if _has_tied_base(state)])
    if len(merged_layers(modules)) == sum(1 for _ in adapted(modules)):
        restore_norm_classes(modules)
    sync_nested_tensors(modules)
    reset_compiled_code()
    return list(layers)


def _choose(modules: Modules, names: list[str]) -> None:
    for name in names:
        require_adapter(modules, name)
    if len(set(names)) < len(names):
        raise ValueError(f"adapters {names}: each can be active once; name it once")
    clash = conflict(modules, names)
    if clash:
        raise ValueError(clash)
    activate(modules, names, names)


def _has_tied_base(state: LayerState) -> bool:
    return any(isinstance(base, nn.Parameter) for base in state.base.values())


def _keeps(layers: Layers, keep_base: KeepBase) -> bool:
    weights = [
        weight.codec.read(layer, weight.part.parameter)
        for _, layer, state in adapted(layers)
        for weight in _weights(layer, state)
    ]
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
    modules = walk(model)
    layers = merged_layers(modules)
    if not layers:
        raise RuntimeError("nothing to unmerge: no layer of the model is merged; call merge(model) first")
    changed = [name for name, layer, state in adapted(layers) if _changed_since(layer, state)]
    if changed:
        raise RuntimeError(
            f"cannot unmerge {some(changed)}: the weights were changed after the merge (another checkpoint was loaded?); "
            "call unload(model) to keep them as the new base"
        )
    for layer in layers.values():
        _unmerge_layer(layer)
    retie_configs(modules)
    freeze_unmerged(modules)
    sync_nested_tensors(modules)
    reset_compiled_code()
    return list(layers)


def _weights(layer: nn.Module, state: LayerState) -> list[_Weight]:
    """The weights of a layer that its active adapters rotate."""
    parts = state.layer_type.rotated_weights(layer)
    used = {part for name in state.active for part in rotations_of(layer, name)}
    found = [(name, part, codec_of(layer, part.parameter)) for name, part in parts.items() if name in used]
    return [_Weight(name, part, codec) for name, part, codec in found if codec is not None]


def _matrices(layer: nn.Module, part: str, names: list[str], device: torch.device) -> list[Tensor]:
    found = [rotations_of(layer, name).get(part) for name in names]
    return [rotation.matrix().to(device) for rotation in found if rotation is not None]


def _check_mergeable(layers: Layers, gathered: Callable[[nn.Module], Any]) -> None:
    broken, packed = [], []
    for name, layer, state in adapted(layers):
        with gathered(layer):
            if not _is_finite(layer, state):
                broken.append(name)
        codecs = [codec_of(layer, part.parameter) for part in state.layer_type.rotated_weights(layer).values()]
        if not all(codec is not None and codec.is_exact for codec in codecs):
            packed.append(name)
    if broken:
        raise ValueError(
            f"cannot merge: generators of {some(broken)} are NaN or infinite; nothing was changed: load an earlier state of the adapter"
        )
    if packed:
        raise ValueError(
            f"cannot merge: the weights of {some(packed)} are quantized or packed; nothing was changed: load the base without quantization to merge"
        )


def _is_finite(layer: nn.Module, state: LayerState) -> bool:
    active = [rotation for name in state.active for rotation in rotations_of(layer, name).values()]
    # The whole generators, on every process: one that alone raised would leave the others waiting.
    return all(bool(whole(rotation.weight.detach()).isfinite().all()) for rotation in active)


def _merge_layer(
    layer: nn.Module, state: LayerState, keep: bool, device: torch.device | str | None, shared: set[int]
) -> None:
    state.merged, state.base, state.merged_fingerprints = tuple(state.active), {}, {}
    for weight in _weights(layer, state):
        codec, name = weight.codec, weight.part.parameter
        parameter = parameter_of(layer, name)
        folded = _by_rows(layer, weight, state.active, state.layer_type.fold, device)
        _check_overflow(layer, weight, folded)
        if parameter is not None and id(parameter) in shared:
            state.base[name] = parameter
            _set_parameter(layer, name, nn.Parameter(folded, requires_grad=False))
        else:
            state.base[name] = codec.keep(layer, name) if keep else None
            codec.write(layer, name, folded)
        state.merged_fingerprints[name] = fingerprint(folded)
    state.layer_type.detach(layer)
    # Out of the module tree; `layer.oft_R` still answers.
    layer.__dict__["oft_R"] = layer._modules.pop("oft_R")


def _check_overflow(layer: nn.Module, weight: _Weight, folded: Tensor) -> None:
    parameter = parameter_of(layer, weight.part.parameter)
    if parameter is not None and is_sharded(parameter):  # one process that raised would leave the others waiting
        return
    if not bool(folded.isfinite().all()) and bool(weight.codec.read(layer, weight.part.parameter).isfinite().all()):
        raise ValueError(
            f"cannot merge: the merged {weight.part.parameter} overflows {folded.dtype}; nothing was changed: "
            "load an earlier state of the adapter, or merge in float32"
        )


def _by_rows(
    layer: nn.Module,
    weight: _Weight,
    adapters: list[str],
    change: Callable[..., Tensor],
    device: torch.device | str | None = None,
) -> Tensor:
    """What this process stores of the weight, folded or unfolded, where the weight is."""
    state, parameter = state_of(layer), weight.part.parameter
    home = weight.codec.read(layer, parameter).device
    where = torch.device(device) if device is not None else home
    matrices = _matrices(layer, weight.name, adapters, where)
    row_dim = state.layer_type.row_dim if state is not None else 0

    def changed(rows: Tensor, columns: slice) -> Tensor:
        own = [_within(matrix, columns) for matrix in matrices]
        count = max(1, PIECE * rows.shape[row_dim] // max(1, rows.numel()))
        pieces = rows.split(count, row_dim)  # type: ignore[no-untyped-call]
        results = [change(layer, weight.part, piece.to(where), own).to(home) for piece in pieces]
        return results[0] if len(results) == 1 else torch.cat(results, row_dim)

    step = math.lcm(*(matrix.shape[-1] for matrix in matrices))
    return weight.codec.changed(layer, parameter, row_dim, step, changed)


def _within(matrix: Tensor, columns: slice) -> Tensor:
    """The blocks of a rotation, (n or 1, b, b), that turn these columns."""
    if columns == slice(None) or matrix.shape[0] == 1:
        return matrix
    return matrix[columns.start // matrix.shape[-1] : columns.stop // matrix.shape[-1]]


def _set_parameter(layer: nn.Module, name: str, parameter: nn.Parameter) -> None:
    owner, _, key = name.rpartition(".")
    layer.get_submodule(owner)._parameters[key] = parameter


def _unmerge_layer(layer: nn.Module) -> None:
    """Give a layer its base weights and its rotations back; a layer merged in part too."""
    state = state_of(layer)
    assert state is not None
    names = list(state.merged or ())
    device = next((p.device for p in layer.parameters()), torch.device("cpu"))
    for weight in _weights(layer, state):
        parameter = weight.part.parameter
        if parameter not in state.base:
            continue
        base = state.base[parameter]
        if isinstance(base, nn.Parameter):  # a tied weight: the layer goes back to sharing it
            base.data = base.data.to(weight.codec.read(layer, parameter).device)
            _set_parameter(layer, parameter, base)
        elif base is not None:
            weight.codec.restore(layer, parameter, base)
        else:
            weight.codec.write(layer, parameter, _by_rows(layer, weight, names, state.layer_type.unfold))
    state.merged, state.base, state.merged_fingerprints = None, {}, {}
    rotations = layer.__dict__.pop("oft_R", None)
    if rotations is not None:
        sharded = any(is_sharded(parameter) for parameter in rotations.parameters())
        layer.oft_R = (rotations if sharded else rotations.to(device)).train(layer.training)
    state.layer_type.attach(layer)


def _changed_since(layer: nn.Module, state: LayerState) -> bool:
    """Whether a merged weight is no longer what merge left: going back to the base would lose the change."""
    names = [weight.part.parameter for weight in _weights(layer, state)]
    now = {name: fingerprint(parameter_of(layer, name)) for name in names}
    return not all(same_base(now.get(name), was) for name, was in state.merged_fingerprints.items())
