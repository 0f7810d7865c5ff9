"""Choosing which adapters are active, projecting them, and running the base without them."""

import contextlib
import logging
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn

from lightning_oft import functional
from lightning_oft.codecs import is_sharded, local_part
from lightning_oft.layers.rotation import Rotation
from lightning_oft.layers.state import every_rotation, rotations_of, train_rotations
from lightning_oft.model import freezing, saved_modules, traversal
from lightning_oft.model.traversal import Modules, adapted, records, walk

log = logging.getLogger(__name__)

Name = TypeVar("Name", bound=Hashable)


def set_adapter(model: nn.Module, names: str | list[str], trainable: str | list[str] | None = None) -> None:
    """Make adapters active, applied in the order given: y = base(x . R_first . R_second). Those named by `trainable`
    train, all of the active ones by default; other adapters do nothing.

    Raises:
        ValueError: an unknown or repeated name, or two adapters that train the same bias or module. Nothing changes.
        RuntimeError: the model is merged, or inside disable_adapters.
    """
    modules = walk(model)
    chosen = [names] if isinstance(names, str) else list(names)
    training = chosen if trainable is None else [trainable] if isinstance(trainable, str) else list(trainable)
    traversal.require_adapter(modules, *training)
    check_choice(modules, chosen)
    if not set(training) <= set(chosen):
        raise ValueError(f"trainable={training}: only active adapters train, and those are {chosen}; name one of them")
    traversal.require_unmerged(modules, "choose adapters")
    traversal.require_enabled(modules, "choose adapters")
    activate(modules, chosen, training)


def check_choice(modules: Modules, chosen: list[str]) -> None:
    """Raise ValueError where these adapters cannot be active together."""
    traversal.require_adapter(modules, *chosen)
    if len(set(chosen)) < len(chosen):
        raise ValueError(f"adapters {chosen}: each can be active once; name it once")
    for tensor, _, slot in saved_modules.saved_tensors(modules):
        both = [name for name in chosen if name in slot.owners]
        if len(both) > 1:
            raise ValueError(f"{both[0]!r} and {both[1]!r} both train {tensor}: only one of them can be active")


def activate(
    modules: Modules, chosen: list[str], training: list[str], by_layer: Mapping[str, list[str]] | None = None
) -> None:
    """`set_adapter` without its checks, and where given another choice by layer. Of a shared tensor, the first has it."""
    for layer_name, layer, state in adapted(modules):
        own = chosen if by_layer is None else by_layer.get(layer_name, [])
        state.active = [name for name in own if name in state.configs]
        for name in state.configs:
            trains = name in training and name in state.active
            train_rotations(layer, name, trains)
            for parameter in (one for rotation in rotations_of(layer, name).values() for one in rotation.parameters()):
                parameter.grad = parameter.grad if trains else None
    saved_modules.switch(modules, chosen, training)
    freezing.freeze_norms(modules)


def remember_choice(modules: Modules, gradients: bool = False) -> Callable[[], None]:
    """A function that makes the choice of adapters again what it is now, and whether they are enabled and train; with
    the gradients that another choice takes from them, where asked."""
    chosen = [(state, state.active, state.enabled) for _, _, state in adapted(modules)]
    saved = [(tensor, slot, slot.live) for _, tensor, slot in saved_modules.saved_tensors(modules)]
    own = [
        one for _, layer, _ in adapted(modules) for rotation in every_rotation(layer) for one in rotation.parameters()
    ]
    tensors = [*own, *(tensor for tensor, _, _ in saved)]
    trains = [(tensor, tensor.requires_grad, tensor.grad if gradients else None) for tensor in tensors]

    def restore() -> None:
        for state, active, enabled in chosen:
            state.active, state.enabled = active, enabled
        for tensor, slot, owner in saved:
            saved_modules.exchange(tensor, slot, owner)
        for tensor, trained, grad in trains:
            tensor.requires_grad_(trained)
            if tensor.grad is None:
                tensor.grad = grad
        freezing.freeze_norms(modules)

    return restore


def remember_flags(model: nn.Module, modules: Modules) -> Callable[[], None]:
    """A function that gives every module the mode, and every parameter the trainability, that it has now."""
    rotations = [module for _, layer, _ in adapted(modules) for module in layer.oft_R.modules()]  # type: ignore[union-attr]
    everything = [model, *modules.values(), *rotations]
    modes = [(module, module.training) for module in everything]
    norms = [(record, record.norm_mode) for _, _, record in records(modules)]
    parameters = [one for module in everything for one in module._parameters.values() if one is not None]
    trains = [(parameter, parameter.requires_grad) for parameter in parameters]

    def restore() -> None:
        for module, mode in modes:
            module.training = mode
        for record, mode in norms:
            record.norm_mode = mode
        for parameter, trained in trains:
            parameter.requires_grad_(trained)

    return restore


@contextlib.contextmanager
def disable_adapters(model: nn.Module) -> Iterator[None]:
    """Within this context the model is its base, to the bit: no rotation, and the base's own biases and modules.

    Raises:
        RuntimeError: the model is merged, where the base is no longer at hand; call unmerge first.
    """
    modules = walk(model)
    traversal.require_unmerged(modules, "disable adapters")
    # The base takes the fused path of its encoder layers only with no hook below them. torch.compile does not see hooks
    # change, so where it is in use they stay (the difference is rounding).
    encoders = [name for name, module in modules.items() if isinstance(module, nn.TransformerEncoderLayer)]
    hooked = adapted(modules.below(*encoders)) if encoders and not _is_compiled(modules) else ()
    fused = [(layer, state.layer_type) for _, layer, state in hooked if state.enabled]
    restore = remember_choice(modules)
    try:
        for _, _, state in adapted(modules):
            state.enabled = False
        for _, tensor, slot in saved_modules.saved_tensors(modules):
            saved_modules.exchange(tensor, slot, saved_modules.BASE)
        freezing.freeze_norms(modules)
        for layer, layer_type in fused:
            layer_type.detach(layer)
        if fused:
            freezing.sync_nested_tensors(modules)
        yield
    finally:
        restore()
        for layer, layer_type in fused:
            layer_type.attach(layer)
        if fused:
            freezing.sync_nested_tensors(modules)
            if _is_compiled(modules):  # in between, when the hooks were away
                traversal.reset_compiled_code()


def _is_compiled(modules: Modules) -> bool:
    """Whether torch.compile holds code of this process, or will of this model."""
    waiting = modules.compiled or any(module._compiled_call_impl is not None for module in modules.values())
    return traversal.has_compiled_code() or bool(waiting)


@torch.no_grad()
def has_learned(modules: Modules) -> bool:
    """Whether any adapter is more than the identity, or has other values than the base of what it trains whole. Of
    shards, which one process cannot judge, this is assumed."""
    weights = [
        one for _, layer, _ in adapted(modules) for rotation in every_rotation(layer) for one in rotation.parameters()
    ]
    saved = [(one, owner) for one in saved_modules.saved_tensors(modules) for owner in one.slot.owners]
    values = [(one.value(owner), one.value(saved_modules.BASE)) for one, owner in saved]
    if any(is_sharded(tensor) for tensor in (*weights, *(mine for mine, _ in values))):
        return True
    return any(bool(weight.any()) for weight in weights) or not all(torch.equal(*pair) for pair in values)


@torch.no_grad()
def project(model: nn.Module) -> None:
    """Do what OFTFinetuning does after an optimizer step, in place; a training loop of one's own calls it there.

    Constrained rotations are pulled back into their ball (COFT, `max_angle`, `series_guard="project"`). Those that have
    turned as far as their truncated series stays orthogonal go on with the exact map, which is logged
    (`series_guard="exact"`). Idempotent. Layers that are merged stay as they are: their rotation is in the weight, and
    `unmerge` must find the same one. Where rotations are sharded every process must call it. It waits for an
    accelerator, as OFTFinetuning does not.
    """
    held = {
        (name, adapter, part): rotation
        for name, layer, state in adapted(walk(model))
        if state.merged is None
        for adapter in state.configs
        for part, rotation in rotations_of(layer, adapter).items()
    }
    guarded = {key: rotation for key, rotation in held.items() if rotation.reach is not None}
    if guarded:
        norms = zip(guarded, largest_norms(guarded.values()).tolist(), strict=True)
        if left := beyond_reach(guarded, norms):
            for key in left:
                guarded[key].leave_series()
            log.info("%s", left_message(dict.fromkeys(traversal.joined(name, part) for name, _, part in left)))
    for rotation in held.values():
        rotation.project()


def largest_norms(rotations: Collection[Rotation]) -> Tensor:
    """The largest ||Q_i||_F of each rotation, (rotations,), infinite where one is not finite. Every process must call
    it where rotations are sharded, and gets the same."""
    norms = functional.largest_norms([local_part(rotation.weight.detach()) for rotation in rotations])
    if any(is_sharded(rotation.weight) for rotation in rotations):
        torch.distributed.all_reduce(norms, torch.distributed.ReduceOp.MAX)
    return norms


def beyond_reach(rotations: Mapping[Name, Rotation], norms: Iterable[tuple[Name, float]]) -> list[Name]:
    """Those of these norms that are at the edge of their series' reach or beyond it. A projection leaves a block
    within 1e-6 of the edge, so one that was held there for a step is still found."""
    reaches = ((name, norm, rotations[name].reach) for name, norm in norms)
    return [name for name, norm, reach in reaches if reach is not None and norm > reach * (1 - 1e-5)]


def left_message(names: Iterable[str]) -> str:
    """What a user reads of rotations that have left their series."""
    return (
        f"OFT: {traversal.some(names)} turned as far as a truncated series stays orthogonal, and go on with the exact "
        "Cayley map (series_guard='exact'); the adapter's file will say use_cayley_neumann=false"
    )
