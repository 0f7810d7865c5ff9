"""Folding rotations into the weights, and getting the weights back."""

import contextlib
import logging
from collections import Counter
from collections.abc import Callable, Collection
from typing import Any, Literal

import torch
from torch import nn

from lightning_oft.codecs import codec_of, is_sharded, whole
from lightning_oft.layers.state import LayerState, make_record, rotations_of
from lightning_oft.model import activation, fingerprint, freezing, traversal
from lightning_oft.model.folding import Device, folded_weights, is_finite
from lightning_oft.model.traversal import Modules, adapted, merged_layers, some, walk

log = logging.getLogger(__name__)

KEEP_LIMIT = 8 * 2**30
"""Bytes of base weights per process up to which keep_base="auto" keeps them."""

KeepBase = Literal["auto", "always", "never"]
Gathered = Callable[[nn.Module], contextlib.AbstractContextManager[Any]]


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
    (where keep_base is off and some layers were merged already, as `unmerge` would). Returns the names of the layers.

    Args:
        model: a model with adapters.
        adapter_name: adapters to merge, in order; the active ones by default.
        keep_base: whether to keep a CPU copy of the adapted weights, which `unmerge` returns to the bit: "auto" keeps
            them up to 8 GiB a process, "always", or "never" (unmerge then solves, to 1e-6 in float32).
        device: where to compute, layer by layer; where each weight is by default.

    Raises:
        ValueError: no adapter, or a generator is not finite; names the layer.
        RuntimeError: already merged, or inside disable_adapters.
    """
    modules = walk(model)
    traversal.require_unmerged(modules, "merge again")
    return merge_layers(modules, adapter_name, keep_base, device)


@torch.no_grad()
def merge_layers(
    modules: Modules,
    adapter_name: str | list[str] | None = None,
    keep_base: KeepBase = "auto",
    device: Device = None,
    gathered: Gathered = contextlib.nullcontext,
    only: Collection[str] | None = None,
) -> list[str]:
    """`merge` of all layers or of those named, for a model whose tensors are at hand within `gathered(layer)` only."""
    if keep_base not in ("auto", "always", "never"):
        raise ValueError(f"keep_base={keep_base!r}: must be 'auto', 'always' or 'never'")
    layers = {name: layer for name, layer, _ in adapted(modules) if only is None or name in only}
    if not layers:
        raise ValueError("nothing to merge: the model has no adapter; call inject or load_adapter first")
    traversal.require_enabled(modules, "merge")
    with contextlib.ExitStack() as undo:
        undo.callback(activation.remember_choice(modules))
        if adapter_name is not None:
            names = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
            activation.check_choice(modules, names)
            activation.activate(modules, names, names)
        _check_mergeable(layers, gathered)
        size = sum(one.read().nbytes for _, layer, state in adapted(layers) for one in folded_weights(layer, state))
        keep = keep_base == "always" or (keep_base == "auto" and size <= KEEP_LIMIT)
        log.info("merge: %s the base weights (%.1f MiB)", "keeping" if keep else "not keeping", size / 2**20)
        holders = Counter(id(one) for module in modules.values() for one in module._parameters.values())
        for _, layer, state in adapted(layers):
            undo.callback(_unmerge_layer, layer, state, gathered)
            with gathered(layer):
                state.merged, state.base = {}, {}
                for weight in folded_weights(layer, state):
                    state.merged[weight.part.parameter] = weight.merge("cpu" if keep else None, device, holders)
                state.layer_type.detach(layer)
                layer.__dict__["oft_R"] = layer._modules.pop("oft_R")  # out of the module tree; `layer.oft_R` answers
        undo.pop_all()
    _untie_configs(modules, layers)
    if len(merged_layers(modules)) == sum(1 for _ in adapted(modules)):
        freezing.unfreeze_norms(modules)
    freezing.layers_changed(modules)
    return list(layers)


def _check_mergeable(layers: dict[str, nn.Module], gathered: Gathered) -> None:
    broken, packed = [], []
    for name, layer, state in adapted(layers):
        with gathered(layer):
            active = [rotation for one in state.active for rotation in rotations_of(layer, one).values()]
            # The whole generators, on every process: one that alone raised would leave the others waiting.
            if not all(is_finite(whole(rotation.weight.detach())) for rotation in active):
                broken.append(name)
        codecs = [codec_of(layer, part.parameter) for part in state.layer_type.rotated_weights(layer).values()]
        if not all(codec is not None and codec.is_exact for codec in codecs):
            packed.append(name)
    if broken:
        what = f"cannot merge: generators of {some(broken)} are NaN or infinite; nothing was changed"
        raise ValueError(f"{what}: load an earlier state of the adapter")
    if packed:
        what = f"cannot merge: the weights of {some(packed)} are quantized or packed; nothing was changed"
        raise ValueError(f"{what}: load the base without quantization to merge")


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
    if not layers:
        raise RuntimeError("nothing to unmerge: no layer of the model is merged; call merge(model) first")
    changed = {
        name: None
        for name, layer, state in adapted(layers)
        for weight in folded_weights(layer, state)
        if not fingerprint.same_base(weight.fingerprint(), (state.merged or {}).get(weight.part.parameter))
    }
    if changed:  # going back to the base would lose the change
        what = (
            f"cannot unmerge {some(changed)}: the weights were changed after the merge (another checkpoint was loaded?)"
        )
        raise RuntimeError(f"{what}; call unload(model) to keep them as the new base")
    for _, layer, state in adapted(layers):
        _unmerge_layer(layer, state)
    for _, module, record in traversal.records(modules):
        if record.tied:
            record.tied = False
            module.config.tie_word_embeddings = True  # type: ignore[union-attr]
    freezing.freeze_unmerged(modules)
    freezing.layers_changed(modules)
    return list(layers)


def _unmerge_layer(layer: nn.Module, state: LayerState, gathered: Gathered = contextlib.nullcontext) -> None:
    """Give a layer its base weights and its rotations back; a layer merged in part too."""
    with gathered(layer):
        for weight in folded_weights(layer, state):
            weight.unmerge()
        device = next((parameter.device for parameter in layer.parameters()), torch.device("cpu"))
        state.merged, state.base = None, {}
        rotations = layer.__dict__.pop("oft_R", None)
        if rotations is not None:
            sharded = any(is_sharded(parameter) for parameter in rotations.parameters())
            layer.oft_R = (rotations if sharded else rotations.to(device)).train(layer.training)
        state.layer_type.attach(layer)


def _untie_configs(modules: Modules, layers: dict[str, nn.Module]) -> None:
    """A merged weight is tied no longer, and a transformers model must say so or its reload would tie it again."""
    bases = {name: state.base.values() for name, _, state in adapted(layers)}
    untied = [name for name, own in bases.items() if any(isinstance(one, nn.Parameter) for one in own)]
    if not untied:
        return
    log.warning("merge: %s shared a weight with another module; it has a copy of its own now", some(untied))
    for module in modules.values():
        config: Any = getattr(module, "config", None)
        if "PreTrainedModel" in traversal.class_names(module) and getattr(config, "tie_word_embeddings", False):
            config.tie_word_embeddings = False
            make_record(module).tied = True
