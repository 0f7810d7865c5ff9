"""Folding rotations into the weights, and getting the weights back."""

import contextlib
import logging
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from typing import Any, Literal

import torch
from torch import nn

from lightning_oft.codecs import is_sharded, reshard
from lightning_oft.layers.state import LayerState, drop_empty_record, make_record
from lightning_oft.model import activation, fingerprint, freezing, traversal
from lightning_oft.model.folding import Device, FoldedWeight, Keep, folded_weights, packed_layers
from lightning_oft.model.mergeable import (
    Gathered,
    check_mergeable,
    notes_on_merge,
    report_requantized,
    report_untrained,
)
from lightning_oft.model.traversal import Modules, adapted, merged_layers, some, walk

log = logging.getLogger(__name__)

KEEP_LIMIT = 8 * 2**30
"""Bytes of base weights per process up to which keep_base="auto" keeps them."""

KeepBase = Literal["auto", "always", "never"]


@torch.no_grad()
def merge(
    model: nn.Module,
    adapter_name: str | list[str] | None = None,
    keep_base: KeepBase = "auto",
    device: torch.device | str | None = None,
    requantize: bool = False,
) -> list[str]:
    """Fold the active rotations into the weights, in place; the model computes alone what it did with its adapters.

    Names, classes and state-dict keys are those of the base afterwards. Each layer keeps its rotations out of the
    module tree, so that `unmerge` can undo it. Either every layer is merged, or an error leaves the model as it was
    (where keep_base is off, what was merged already returns as `unmerge` would return it). A base that is not kept and
    that no other tensor views is folded in its own memory. Returns the names of the layers.

    Args:
        model: a model with adapters.
        adapter_name: adapters to merge, in order; the active ones by default.
        keep_base: whether to keep a CPU copy of the adapted weights, which `unmerge` returns to the bit: "auto" keeps
            them up to 8 GiB a process, "always", or "never" (unmerge then solves, to 1e-6 in float32).
        device: where to compute, layer by layer; where each weight is by default.
        requantize: write quantized weights back in the format of the base, which costs a second quantization error:
            how far it puts outputs off is measured and logged. What `unmerge` returns to stays on the device.

    Raises:
        ValueError: no adapter, a generator is not finite, or a weight is quantized and `requantize` off; names the layer.
        RuntimeError: already merged, or inside disable_adapters.
    """
    modules = walk(model)
    traversal.require_unmerged(modules, "merge again")
    with notes_on_merge(modules):
        return merge_layers(modules, adapter_name, keep_base, device, requantize=requantize)


@torch.no_grad()
def merge_layers(
    modules: Modules,
    adapter_name: str | list[str] | None = None,
    keep_base: KeepBase = "auto",
    device: Device = None,
    gathered: Gathered = contextlib.nullcontext,
    only: Collection[str] | None = None,
    requantize: bool = False,
) -> list[str]:
    """`merge` of all layers or of those named, for a model whose tensors are at hand within `gathered(layer)` only."""
    if keep_base not in ("auto", "always", "never"):
        raise ValueError(f"keep_base={keep_base!r}: must be 'auto', 'always' or 'never'")
    layers = {name: layer for name, layer, _ in adapted(modules) if only is None or name in only}
    with contextlib.ExitStack() as undo:
        has_turned = _prepare(modules, layers, adapter_name, gathered, undo, requantize)
        weights = [one for _, layer, state in adapted(layers) for one in folded_weights(layer, state)]
        size = sum(one.codec.nbytes(one.layer, one.part.parameter) for one in weights)
        keep = keep_base == "always" or (keep_base == "auto" and size <= KEEP_LIMIT)
        log.info("merge: %s the base weights (%.1f MiB)", "keeping" if keep else "not keeping", size / 2**20)
        errors = _fold(modules, layers, "host" if keep else None, device, gathered, undo)
        undo.pop_all()
    report_untrained(has_turned, "merge")
    if requantized := {name: error for name, error in errors.items() if error}:
        report_requantized(layers, requantized)
    if untied := _untied(layers):
        what = "merge: %s shared a weight with another module and has one of its own now%s"
        log.warning(what, some(untied), "" if _untie_configs(modules) else f": {traversal.TIED_AGAIN}")
    if len(merged_layers(modules)) == sum(1 for _ in adapted(modules)):
        freezing.unfreeze_norms(modules)
    freezing.layers_changed(modules)
    return list(layers)


def _prepare(
    modules: Modules,
    layers: dict[str, nn.Module],
    adapter_name: str | list[str] | None,
    gathered: Gathered,
    undo: contextlib.ExitStack,
    requantize: bool = False,
) -> dict[str, bool]:
    """Make the adapters active that are to be merged, and raise where that cannot be done; `undo` gets the way back.
    Returns by layer whether it has a rotation other than the identity."""
    if not layers:
        raise ValueError("nothing to merge: the model has no adapter; call inject or load_adapter first")
    traversal.require_enabled(modules, "merge")
    reshard(modules.values())
    undo.callback(activation.remember_choice(modules, gradients=adapter_name is not None))
    if adapter_name is not None:
        names = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
        activation.check_choice(modules, names)
        activation.activate(modules, names, names)
    return check_mergeable(layers, gathered, requantize)


@torch.no_grad()
def _fold(
    modules: Modules,
    layers: dict[str, nn.Module],
    keep: Keep,
    device: Device,
    gathered: Gathered,
    undo: contextlib.ExitStack,
) -> dict[str, float]:
    """Merge layer by layer; `undo` gets the way back of each. Returns what quantizing has put their outputs off by."""
    errors = {}
    holders = Counter(id(one) for module in modules.values() for one in module._parameters.values())
    for name, layer, state in adapted(layers):
        undo.callback(_unmerge_layer, layer, state, gathered)
        with gathered(layer):
            state.fingerprint = fingerprint.base_fingerprint(layer, state)
            state.merged, state.base = {}, {}
            errors[name] = max((one.merge(keep, device, holders) for one in folded_weights(layer, state)), default=0.0)
            state.layer_type.detach(layer)
            layer.__dict__["oft_R"] = layer._modules.pop("oft_R")  # out of the module tree; `layer.oft_R` answers
    return errors


@torch.no_grad()
def unmerge(model: nn.Module) -> list[str]:
    """Undo `merge`, in place: the base weights return, and the adapters are active beside them again.

    To the bit where `merge` kept the base, else by solving with the rotations (1e-6 relative in float32; lower
    precisions round). Returns the names of the layers.

    Raises:
        RuntimeError: the model is not merged, or a merged weight has been changed since.
    """
    modules = walk(model)
    layers = merged_layers(modules)
    reshard(modules.values())
    if not layers:
        raise RuntimeError("nothing to unmerge: no layer of the model is merged; call merge(model) first")
    if changed := _changed(layers):  # going back to the base would lose the change
        what = (
            f"cannot unmerge {some(changed)}: the weights were changed after the merge (another checkpoint was loaded?)"
        )
        raise RuntimeError(f"{what}; call unload(model) to keep them as the new base")
    for _, layer, state in adapted(layers):
        _unmerge_layer(layer, state)
    _tie_configs(module for _, module, record in traversal.records(modules) if record.tied)
    freezing.freeze_unmerged(modules)
    freezing.layers_changed(modules)
    return list(layers)


@torch.no_grad()
def _unmerge_layer(layer: nn.Module, state: LayerState, gathered: Gathered = contextlib.nullcontext) -> None:
    """Give a layer its base weights and its rotations back; a layer merged in part too."""
    with gathered(layer):
        for weight in folded_weights(layer, state):
            weight.unmerge()
        device = next((parameter.device for parameter in layer.parameters()), torch.device("cpu"))
        state.merged, state.base = None, {}
        rotations = layer.__dict__.pop("oft_R", None)
        if rotations is not None:
            if any(not is_sharded(one) and one.device != device for one in rotations.parameters()):
                rotations.to(device)
            layer.oft_R = rotations.train(layer.training)
        state.layer_type.attach(layer)


@contextlib.contextmanager
def merged(model: nn.Module, adapter_name: str | list[str] | None = None) -> Iterator[None]:
    """Within this context the model is merged, and generates and validates at the speed of its base; after it the model
    is as before: base weights to the bit, parameters the same objects, adapters active, modes and what trains.

    Entering folds each weight once and leaving exchanges tensors, so both together cost less than ten tokens. Base
    and merged weights lie on the model's device together (of a sharded model, its parts). Modes, flags and tied
    weights that are changed inside are changed back; values that are not the merged weights' stay: generators, biases
    and modules that an adapter trains whole, statistics. A model that is merged already stays as it is, so contexts
    may be nested. Compiled code is dropped on entering and on leaving, where torch.compile is in use: each costs a
    compilation.

    Args:
        model: a model with adapters.
        adapter_name: adapters to merge, in order; the active ones by default.

    Raises:
        ValueError: as `merge`.
        RuntimeError: inside disable_adapters; the model is merged with other adapters; or, on leaving, a merged weight
            was changed inside: the model stays merged, and `unload` keeps the change.
    """
    modules = walk(model)
    layers = {name: layer for name, layer, state in adapted(modules) if state.merged is None}
    if merged_layers(modules):
        names = [adapter_name] if isinstance(adapter_name, str) else adapter_name
        if names is not None and list(names) != traversal.active_names(modules):
            traversal.require_unmerged(modules, f"merge {some(names)}")
        if not layers:
            yield
            return
    with contextlib.ExitStack() as undo:
        undo.callback(freezing.layers_changed, modules)
        undo.callback(activation.remember_flags(model, modules))
        _prepare(modules, layers, adapter_name, contextlib.nullcontext, undo)
        _fold(modules, layers, "here", None, contextlib.nullcontext, undo)
        if _untied(layers):
            undo.callback(_tie_configs, _untie_configs(modules))
        freezing.layers_changed(modules)
        checksums = _checksums(layers)
        try:
            yield
        finally:
            reshard(modules.values())
            if len(list(adapted(layers))) < len(layers):  # unloaded inside: nothing is left to undo
                undo.pop_all()
            elif changed := _changed(layers, checksums):
                undo.pop_all()
                what = f"cannot leave merged(model): the weights of {some(changed)} were changed inside, so it stays merged"
                raise RuntimeError(f"{what}; call unload(model) to keep them as the new base")


def merged_where_possible(model: nn.Module) -> contextlib.AbstractContextManager[None]:
    """`merged(model)` to generate in; of a model without adapters, or whose weights are quantized and take no merge,
    nothing is done."""
    modules = walk(model)
    has_adapter = any(True for _ in adapted(modules))
    return merged(model) if has_adapter and not packed_layers(modules) else contextlib.nullcontext()


def _merged_weights(layers: dict[str, nn.Module]) -> Iterator[tuple[str, FoldedWeight]]:
    """The weights that hold rotations now, with the names of their layers."""
    for name, layer, state in adapted(layers):
        if state.merged is not None:
            yield from ((name, weight) for weight in folded_weights(layer, state))


def _checksums(layers: dict[str, nn.Module]) -> dict[tuple[str, str, torch.dtype], int]:
    """Checksums of the merged weights; of one that was cast since, nothing can be told that way."""
    found = [(name, weight.part.parameter, weight.read()) for name, weight in _merged_weights(layers)]
    return {(name, parameter, values.dtype): fingerprint.checksum(values) for name, parameter, values in found}


def _changed(
    layers: dict[str, nn.Module], checksums: dict[tuple[str, str, torch.dtype], int] | None = None
) -> list[str]:
    """Names of the layers whose weights are no longer what a merge made of them. A fingerprint reads
    some entries; checksums, where given, tell of any single one that has changed."""
    others = [
        name
        for name, weight in _merged_weights(layers)
        if not fingerprint.same_base(weight.fingerprint(), (weight.state.merged or {}).get(weight.part.parameter))
    ]
    now = _checksums(layers) if checksums is not None else {}
    others += [key[0] for key, number in now.items() if checksums is not None and checksums.get(key, number) != number]
    return [name for name in layers if name in others]


def _untied(layers: dict[str, nn.Module]) -> list[str]:
    """Names of the layers that shared a weight with another module and have a merged one of their own."""
    bases = {name: state.base.values() for name, _, state in adapted(layers)}
    return [name for name, own in bases.items() if any(isinstance(one, nn.Parameter) for one in own)]


def _untie_configs(modules: Modules) -> list[nn.Module]:
    """A transformers model must say that its weights are tied no longer, or its reload would tie them again."""
    found = []
    for module in modules.values():
        config: Any = getattr(module, "config", None)
        if "PreTrainedModel" in traversal.class_names(module) and getattr(config, "tie_word_embeddings", False):
            config.tie_word_embeddings = False
            make_record(module).tied = True
            found.append(module)
    return found


def _tie_configs(models: Iterable[Any]) -> None:
    for model in models:
        make_record(model).tied, model.config.tie_word_embeddings = False, True
        drop_empty_record(model)
