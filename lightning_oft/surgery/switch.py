"""Choosing which adapters act, holding them in their ball, and asking the base for its opinion."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator

import torch
from torch import nn

from lightning_oft.layers import rotations_of, state_of

from . import trained
from .frozen import guard_nested_tensors, settle_norms
from .walk import (
    adapter_names,
    class_names,
    forget_compiled,
    oft_layers,
    require_enabled,
    require_unmerged,
    walk,
)


def set_adapter(model: nn.Module, names: str | list[str], trainable: str | list[str] | None = None) -> None:
    """Make adapters active, applied in the order given: y = base(x . R_first . R_second). Others fall silent.

    Args:
        model: a model with adapters.
        names: one name or several.
        trainable: those of them that train; all of them by default.

    Raises:
        ValueError: an unknown or repeated name, or two adapters that train the same bias or module. Nothing changes.
        RuntimeError: the model is merged, or inside disable_adapters.
    """
    chosen = [names] if isinstance(names, str) else list(names)
    training = chosen if trainable is None else [trainable] if isinstance(trainable, str) else list(trainable)
    known = adapter_names(model)
    for name in (*chosen, *training):
        if name not in known:
            raise ValueError(f"no adapter {name!r} here; there are: {', '.join(known) or 'none, call inject first'}")
    if len(set(chosen)) < len(chosen):
        raise ValueError(f"adapters {chosen}: each can be active once; name it once")
    if not set(training) <= set(chosen):
        raise ValueError(f"trainable={training}: only active adapters train, and those are {chosen}; name one of them")
    require_unmerged(model, "choose adapters")
    require_enabled(model, "choose adapters")
    clash = trained.conflict(model, chosen)
    if clash:
        raise ValueError(clash)
    for layer in oft_layers(model).values():
        state = state_of(layer)
        if state is None:
            continue
        state.active = [name for name in chosen if name in state.configs]
        for name in state.configs:
            for rotation in rotations_of(layer, name).values():
                rotation.requires_grad_(name in training)
                if name not in training:
                    rotation.weight.grad = None
    trained.switch(model, chosen, set(training))
    settle_norms(model)


def remember_choice(model: nn.Module) -> Callable[[], None]:
    """A function that makes the choice of `set_adapter` again what it is now."""
    states = [state for layer in oft_layers(model).values() if (state := state_of(layer)) is not None]
    active = [(state, state.active) for state in states]
    live = [(tensor, slot, slot.live) for _, tensor, slot in trained.slots(model)]
    trainable = [(parameter, parameter.requires_grad) for parameter in model.parameters()]

    def restore() -> None:
        for state, names in active:
            state.active = names
        for tensor, slot, owner in live:
            trained.put(tensor, slot, owner)
        for parameter, trains in trainable:
            parameter.requires_grad_(trains)
        settle_norms(model)

    return restore


@contextlib.contextmanager
def disable_adapters(model: nn.Module) -> Iterator[None]:
    """Within this context the model is its base, to the bit: no rotation, and the base's own biases and modules.

    Raises:
        RuntimeError: the model is merged, where the base is no longer at hand; call unmerge first.
    """
    require_unmerged(model, "disable adapters")
    states = [state for layer in oft_layers(model).values() if (state := state_of(layer)) is not None]
    before = [state.enabled for state in states]
    held = [(tensor, slot, slot.live) for _, tensor, slot in trained.slots(model)]
    fused = _fused_layers(model)
    try:
        for state in states:
            state.enabled = False
        for tensor, slot, _ in held:
            trained.put(tensor, slot, trained.BASE)
        settle_norms(model)
        _let_fuse(model, fused, True)
        yield
    finally:
        for state, enabled in zip(states, before, strict=True):
            state.enabled = enabled
        for tensor, slot, owner in held:
            trained.put(tensor, slot, owner)
        settle_norms(model)
        _let_fuse(model, fused, False)


def _fused_layers(model: nn.Module) -> list[nn.Module]:
    """Adapted layers below an nn.TransformerEncoderLayer: the base takes its fused path only with no hook below it.

    torch.compile does not see hooks change, so where it is in use they stay (the difference is rounding).
    """
    if _is_compiled(model):
        return []
    encoders = [module for _, module in walk(model) if isinstance(module, nn.TransformerEncoderLayer)]
    layers = [layer for encoder in encoders for layer in oft_layers(encoder).values()]
    return [layer for layer in layers if (state := state_of(layer)) is not None and state.enabled]


def _is_compiled(model: nn.Module) -> bool:
    """Whether torch.compile holds code of this process, or will of this model. Lightning imports it in any case."""
    dynamo = sys.modules.get("torch._dynamo")
    if dynamo is None:
        return False
    waiting = (
        module._compiled_call_impl is not None or "OptimizedModule" in class_names(module) for module in model.modules()
    )
    return bool(dynamo.convert_frame.input_codes.seen_ids) or any(waiting)


def _let_fuse(model: nn.Module, layers: list[nn.Module], fuse: bool) -> None:
    for layer in layers:
        state = state_of(layer)
        if state is not None:
            (state.kind.detach if fuse else state.kind.attach)(layer)
    if layers:
        guard_nested_tensors(model)
    if layers and not fuse and _is_compiled(model):  # compiled in between, when the hooks were away
        forget_compiled()


@torch.no_grad()
def project(model: nn.Module) -> None:
    """Pull every constrained rotation below a module back into its ball (COFT), in place. Idempotent.

    Layers that are merged stay as they are: their rotation is in the weight, and `unmerge` must find the same one.
    """
    for layer in oft_layers(model).values():
        state = state_of(layer)
        for name in state.configs if state is not None and state.merged is None else ():
            for rotation in rotations_of(layer, name).values():
                rotation.project()
