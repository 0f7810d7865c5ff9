"""Tensors of the base that an adapter trains whole: modules_to_save and biases.

The values of the active adapter live in the module itself, under the names they always had; those of the base and of
other adapters wait beside it. Switching exchanges `.data` and never copies into it, so that a backward in flight finds
its values again after `disable_adapters`; after a lasting switch it raises.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lightning_oft.layers.state import Slot, drop_empty_record, make_record, record_of
from lightning_oft.model.traversal import Modules, joined, tensor_of

BASE = ""
"""Owner name of the base's own values."""


class Saved(NamedTuple):
    """A tensor that an adapter trains whole, by full name."""

    name: str
    tensor: Tensor
    slot: Slot


def slots_of(module: nn.Module) -> dict[str, Slot]:
    """The slots of a module's own tensors, by name."""
    record = record_of(module)
    return record.slots if record is not None else {}


def saved_tensors(modules: Modules) -> Iterator[Saved]:
    """Everything that adapters train whole."""
    for name, module in modules.items():
        for key, slot in slots_of(module).items():
            yield Saved(joined(name, key), tensor_of(module, key), slot)


def base_value(module: nn.Module, key: str) -> Tensor:
    """The base's own value of a tensor, whoever's is in it now."""
    slot = slots_of(module).get(key)
    if slot is None or slot.live == BASE:
        return tensor_of(module, key).detach()
    return slot.waiting[BASE]


def claim(module: nn.Module, key: str, adapter_name: str, active: bool, known: dict[int, Slot]) -> None:
    """Let an adapter own a tensor from now on; its values start as the base's.

    `known` are the slots by id of their tensor: one that two modules hold (tied embeddings) has a single slot.
    """
    tensor, record = tensor_of(module, key), make_record(module)
    if key not in record.slots:
        record.slots[key] = known.setdefault(id(tensor), Slot(live=BASE))
        if tensor.requires_grad and not record.slots[key].owners:  # as `freeze` would note it: `unload` returns to that
            record.frozen.add(key)
    slot = record.slots[key]
    if adapter_name in slot.owners:
        return
    slot.owners.add(adapter_name)
    base = tensor.data if slot.live == BASE else slot.waiting[BASE]
    slot.waiting[adapter_name] = base.clone()
    if active and slot.live == BASE:
        exchange(tensor, slot, adapter_name)
        if isinstance(tensor, nn.Parameter) and tensor.is_floating_point():
            tensor.requires_grad_(True)


def exchange(tensor: Tensor, slot: Slot, owner: str) -> None:
    """Exchange the values in a tensor for another owner's."""
    if owner == slot.live:
        return
    slot.waiting[slot.live] = tensor.data
    tensor.data = slot.waiting.pop(owner).to(device=tensor.device, dtype=tensor.dtype)
    slot.live = owner


def switch(modules: Modules, names: list[str], trainable: set[str]) -> None:
    """Give every slot to the first of the named adapters that owns it, else to the base."""
    for _, tensor, slot in saved_tensors(modules):
        owner = next((name for name in names if name in slot.owners), BASE)
        if owner != slot.live:
            exchange(tensor, slot, owner)
            # A backward in flight raises instead of reading the new values.
            torch.autograd.graph.increment_version(tensor)
        if tensor.is_floating_point() and isinstance(tensor, nn.Parameter):
            tensor.requires_grad_(owner in trainable)
            if owner not in trainable:
                tensor.grad = None


def conflict(modules: Modules, names: list[str]) -> str | None:
    """A tensor that two of the adapters own, which cannot both be active."""
    for name, _, slot in saved_tensors(modules):
        both = [adapter for adapter in names if adapter in slot.owners]
        if len(both) > 1:
            return f"{both[0]!r} and {both[1]!r} both train {name}: only one of them can be active"
    return None


def disown(modules: Modules, adapter_name: str) -> None:
    """Forget one adapter's values; where they were live, the base's return."""
    for module in modules.values():
        for key, slot in list(slots_of(module).items()):
            tensor = tensor_of(module, key)
            if slot.live == adapter_name:
                exchange(tensor, slot, BASE)
                tensor.requires_grad_(False)
            slot.owners.discard(adapter_name)
            slot.waiting.pop(adapter_name, None)
            if not slot.owners:
                del make_record(module).slots[key]


def release(modules: Modules, to_base: bool) -> None:
    """Forget all owners and freeze what they had; what stays is the base's values, or those that are live."""
    for module in modules.values():
        for key, slot in slots_of(module).items():
            tensor = tensor_of(module, key)
            if to_base:
                exchange(tensor, slot, BASE)
            tensor.requires_grad_(False)
        if slots_of(module):
            make_record(module).slots = {}
            drop_empty_record(module)


@torch.no_grad()
def values_of(modules: Modules, adapter_name: str) -> dict[str, Tensor]:
    """The values that an adapter trained whole, live or waiting, by full name."""
    return {
        name: tensor.detach() if slot.live == adapter_name else slot.waiting[adapter_name]
        for name, tensor, slot in saved_tensors(modules)
        if adapter_name in slot.owners
    }
