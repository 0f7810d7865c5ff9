"""Choosing which adapters act, holding them in their ball, and asking the base for its opinion."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

import torch
from torch import nn

from ..layers import rotations_of, state_of
from . import trained
from .walk import adapter_names, oft_layers, require_unmerged, walk


def set_adapter(model: nn.Module, names: str | list[str], trainable: str | list[str] | None = None) -> None:
    """Make adapters active, applied in the order given: y = base(x . R_first . R_second). Others fall silent.

    Args:
        model: a model with adapters.
        names: one name or several.
        trainable: those of them that train; all of them by default.

    Raises:
        ValueError: an unknown or repeated name, or two adapters that train the same bias or module. Nothing changes.
        RuntimeError: the model is merged.
    """
    chosen = [names] if isinstance(names, str) else list(names)
    training = chosen if trainable is None else [trainable] if isinstance(trainable, str) else list(trainable)
    known = adapter_names(model)
    for name in (*chosen, *training):
        if name not in known:
            raise ValueError(f"no adapter {name!r} here; there are: {', '.join(known) or 'none'}")
    if len(set(chosen)) < len(chosen):
        raise ValueError(f"adapters {chosen}: each can be active once")
    if not set(training) <= set(chosen):
        raise ValueError(f"trainable={training}: only active adapters train, and those are {chosen}")
    require_unmerged(model, "choose adapters")
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
        _attach(fused, False)
        yield
    finally:
        for state, enabled in zip(states, before, strict=True):
            state.enabled = enabled
        for tensor, slot, owner in held:
            trained.put(tensor, slot, owner)
        _attach(fused, True)


def _fused_layers(model: nn.Module) -> list[nn.Module]:
    """Adapted layers below an nn.TransformerEncoderLayer: the base takes its fused path only with no hook below it.

    torch.compile does not see hooks change, so where it is in use they stay (the difference is rounding).
    """
    if "torch._dynamo" in sys.modules:
        return []
    encoders = [module for _, module in walk(model) if isinstance(module, nn.TransformerEncoderLayer)]
    return [layer for encoder in encoders for layer in oft_layers(encoder).values()]


def _attach(layers: list[nn.Module], attached: bool) -> None:
    for layer in layers:
        state = state_of(layer)
        if state is not None:
            (state.kind.attach if attached else state.kind.detach)(layer)


@torch.no_grad()
def project(model: nn.Module) -> None:
    """Pull every constrained rotation below a module back into its ball (COFT), in place. Idempotent."""
    for layer in oft_layers(model).values():
        state = state_of(layer)
        for name in state.configs if state else ():
            for rotation in rotations_of(layer, name).values():
                rotation.project()


