"""Tensors of the base that an adapter trains whole: modules_to_save and biases.

The values of the active adapter live in the module itself, under the names they always had; those of the base and of
other adapters wait beside it. Switching exchanges `.data` and never copies into it, so that a backward in flight finds
its values again after `disable_adapters`; after a lasting switch it raises.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from lightning_oft.layers.state import FROZEN

from .walk import walk

_ATTRIBUTE = "_oft_trained"
BASE = ""
"""Owner name of the base's own values."""


@dataclass
class Slot:
    """One tensor with several owners: whose values are in it now, and the values of the others."""

    live: str
    owners: set[str] = field(default_factory=set)
    waiting: dict[str, Tensor] = field(default_factory=dict)


def slots_of(module: nn.Module) -> dict[str, Slot]:
    """The slots of a module's own tensors, by name."""
    found: dict[str, Slot] = module.__dict__.get(_ATTRIBUTE, {})
    return found


def slots(model: nn.Module) -> Iterator[tuple[str, Tensor, Slot]]:
    """(full name, tensor, slot) of everything an adapter trains whole below a module."""
    for name, module in walk(model):
        for key, slot in slots_of(module).items():
            yield f"{name}.{key}" if name else key, tensor_of(module, key), slot


def tensor_of(module: nn.Module, key: str) -> Tensor:
    """A module's own parameter or buffer."""
    tensor: Tensor | None = module._parameters.get(key)
    tensor = module._buffers.get(key) if tensor is None else tensor
    assert tensor is not None
    return tensor


def own_tensors(module: nn.Module) -> list[str]:
    """Names of a module's own parameters and of those buffers that are saved."""
    buffers = [
        key for key, b in module._buffers.items() if b is not None and key not in module._non_persistent_buffers_set
    ]
    return [key for key, p in module._parameters.items() if p is not None] + buffers


def claim(module: nn.Module, key: str, adapter_name: str, active: bool, known: dict[int, Slot]) -> None:
    """Let an adapter own a tensor from now on; its values start as the base's.

    `known` are the slots by id of their tensor: one that two modules hold (tied embeddings) has a single slot.
    """
    tensor = tensor_of(module, key)
    found = module.__dict__.setdefault(_ATTRIBUTE, {})
    if key not in found:
        found[key] = known.setdefault(id(tensor), Slot(live=BASE))
        if tensor.requires_grad and not found[key].owners:  # as `freeze` would note it: `unload` returns to that
            module.__dict__.setdefault(FROZEN, set()).add(key)
    slot = found[key]
    if adapter_name in slot.owners:
        return
    slot.owners.add(adapter_name)
    base = tensor.data if slot.live == BASE else slot.waiting[BASE]
    slot.waiting[adapter_name] = base.clone()
    if active and slot.live == BASE:
        put(tensor, slot, adapter_name)
        if isinstance(tensor, nn.Parameter) and tensor.is_floating_point():
            tensor.requires_grad_(True)


def put(tensor: Tensor, slot: Slot, owner: str) -> None:
    """Exchange the values in a tensor for another owner's."""
    if owner == slot.live:
        return
    slot.waiting[slot.live] = tensor.data
    tensor.data = slot.waiting.pop(owner).to(device=tensor.device, dtype=tensor.dtype)
    slot.live = owner


def owned(slot: Slot, names: list[str]) -> str:
    """The first of the names that owns a slot, else the base."""
    return next((name for name in names if name in slot.owners), BASE)


def switch(model: nn.Module, names: list[str], trainable: set[str]) -> None:
    """Give every slot to the first of the named adapters that owns it, else to the base."""
    for _, tensor, slot in slots(model):
        owner = owned(slot, names)
        if owner != slot.live:
            put(tensor, slot, owner)
            torch.autograd.graph.increment_version(
                tensor
            )  # a backward in flight raises instead of reading the new values
        if tensor.is_floating_point() and isinstance(tensor, nn.Parameter):
            tensor.requires_grad_(owner in trainable)
            if owner not in trainable:
                tensor.grad = None


def conflict(model: nn.Module, names: list[str]) -> str | None:
    """A tensor that two of the adapters own, which cannot both be active."""
    for name, _, slot in slots(model):
        both = [adapter for adapter in names if adapter in slot.owners]
        if len(both) > 1:
            return f"{both[0]!r} and {both[1]!r} both train {name}: only one of them can be active"
    return None


def release(model: nn.Module, to_base: bool) -> None:
    """Forget all owners and freeze what they had; what stays is the base's values, or those that are live."""
    for _, module in walk(model):
        for key, slot in slots_of(module).items():
            tensor = tensor_of(module, key)
            if to_base:
                put(tensor, slot, BASE)
            tensor.requires_grad_(False)
        module.__dict__.pop(_ATTRIBUTE, None)


@torch.no_grad()
def values(model: nn.Module, adapter_name: str) -> dict[str, Tensor]:
    """The values that an adapter trained whole, live or waiting, by full name."""
    found = {}
    for name, tensor, slot in slots(model):
        if adapter_name in slot.owners:
            found[name] = tensor.detach() if slot.live == adapter_name else slot.waiting[adapter_name]
    return found
