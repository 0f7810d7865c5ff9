"""Counts the bytes of tensor memory that a process holds, op by op: the same on every machine."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """`peak`: the most bytes held at once; `largest`: the most bytes of one memory block made while watching.

    FSDP2 frees a gathered parameter by resizing its memory to nothing, so sizes are asked again at every op.
    """

    def __init__(self, held: Iterable[torch.Tensor]) -> None:
        super().__init__()
        self._storages: dict[int, Any] = {}
        self.peak = self.largest = 0
        for tensor in held:
            self._see(tensor)
        self.restart()

    def _see(self, tensor: torch.Tensor) -> bool:
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        if isinstance(local, AsyncCollectiveTensor):  # its own storage has a size and no memory
            local = local.elem
        storage = local.untyped_storage()
        key = storage._cdata
        known = self._storages.get(key)
        if known is not None and known() is storage:
            return False
        self._storages[key] = weakref.ref(storage)
        return True

    def now(self) -> int:
        """Bytes held now."""
        alive = {key: storage for key, ref in self._storages.items() if (storage := ref()) is not None}
        self._storages = {key: self._storages[key] for key in alive}
        return sum(storage.nbytes() for storage in alive.values())

    def restart(self) -> int:
        """Begin to look for a new peak; returns the bytes held now."""
        self.peak, self.largest = self.now(), 0
        return self.peak

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # DTensor first: its local operations come here again
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and leaf.device.type != "meta" and self._see(leaf):
                self.largest = max(self.largest, leaf.untyped_storage().nbytes())
        self.peak = max(self.peak, self.now())
        return result
