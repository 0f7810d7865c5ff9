"""Tensors of the base that an adapter trains whole: modules_to_save and biases.

The values of the active adapter are in the module itself; those of the base and of other adapters wait beside it.
Switching exchanges `.data` and never copies into it, so that a backward in flight finds its values again after
`disable_adapters`; after a lasting switch it raises.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lightning_oft.layers.state import Slot, drop_empty_record, make_record, record_of
from lightning_oft.model.traversal import Modules, joined, records, tensor_of

BASE = ""
"""Owner name of the base's own values."""


class Saved(NamedTuple):
    """A tensor that an adapter trains whole, by full name."""

    name: str
    tensor: Tensor
    slot: Slot

    def value(self, adapter_name: str) -> Tensor:
        """An owner's values, live or waiting."""
        return self.tensor.detach() if self.slot.live == adapter_name else self.slot.waiting[adapter_name]


def saved_tensors(modules: Modules) -> Iterator[Saved]:
    """Everything that adapters train whole."""
    for name, module, record in records(modules):
        for key, slot in list(record.slots.items()):
            yield Saved(joined(name, key), tensor_of(module, key), slot)


def base_value(module: nn.Module, key: str) -> Tensor:
    """The base's own value of a tensor, whoever's is in it now."""
    record = record_of(module)
    slot = record.slots.get(key) if record is not None else None
    return tensor_of(module, key).detach() if slot is None or slot.live == BASE else slot.waiting[BASE]


def claim(module: nn.Module, key: str, adapter_name: str, active: bool, known: dict[int, Slot]) -> None:
    """Let an adapter own a tensor from now on; its values start as the base's.
    `known` are the slots by id of their tensor: one that two modules hold (tied embeddings) has a single slot."""
    tensor, record = tensor_of(module, key), make_record(module)
    if key not in record.slots:
        record.slots[key] = known.setdefault(id(tensor), Slot(live=BASE))
        if tensor.requires_grad and not record.slots[key].owners:  # as `freeze` would note it: `unload` returns to that
            record.frozen.add(key)
    slot = record.slots[key]
    if adapter_name not in slot.owners:
        slot.owners.add(adapter_name)
        slot.waiting[adapter_name] = base_value(module, key).clone()
        if active and slot.live == BASE:
            exchange(tensor, slot, adapter_name)
            _set_trainable(tensor, True)


def exchange(tensor: Tensor, slot: Slot, owner: str) -> None:
    """Exchange the values in a tensor for another owner's."""
    if owner == slot.live:
        return
    slot.waiting[slot.live] = tensor.data
    tensor.data = slot.waiting.pop(owner).to(device=tensor.device, dtype=tensor.dtype)
    slot.live = owner


def switch(modules: Modules, names: list[str], trainable: list[str]) -> None:
    """Give every slot to the first of the named adapters that owns it, else to the base."""
    for _, tensor, slot in saved_tensors(modules):
        owner = next((name for name in names if name in slot.owners), BASE)
        if owner != slot.live:
            exchange(tensor, slot, owner)
            # A backward in flight raises instead of reading the new values.
            torch.autograd.graph.increment_version(tensor)
        _set_trainable(tensor, owner in trainable)


def _set_trainable(tensor: Tensor, trains: bool) -> None:
    if isinstance(tensor, nn.Parameter) and tensor.is_floating_point():
        tensor.requires_grad_(trains)
        tensor.grad = tensor.grad if trains else None


def release(modules: Modules, adapter_names: list[str], to_base: bool = True) -> None:
    """Forget adapters' values; where they are live, those of the base return, or stay frozen as they are."""
    for _, tensor, slot in saved_tensors(modules):
        if slot.live in adapter_names:
            if to_base:
                exchange(tensor, slot, BASE)
            tensor.requires_grad_(False)
        slot.owners.difference_update(adapter_names)
        for name in adapter_names:
            slot.waiting.pop(name, None)
    for _, module, record in records(modules):
        record.slots = {key: slot for key, slot in record.slots.items() if slot.owners}
        drop_empty_record(module)
