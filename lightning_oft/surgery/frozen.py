"""What freezing means: no gradient, no drifting statistics, and a way back."""

from __future__ import annotations

from torch import nn

from ..layers import is_adapted
from ..layers.in_place import InPlace, put_on, take_off
from ..layers.state import FROZEN
from .trained import BASE, slots_of
from .walk import walk

_NESTED = "_oft_use_nested_tensor"
_StatisticsNorm = nn.modules.batchnorm._NormBase
_TransformerEncoder = nn.TransformerEncoder


class _FrozenNorm(InPlace):
    """Stays in eval: the running statistics of a frozen base must not drift with the new data."""

    def train(self: nn.Module, mode: bool = True) -> nn.Module:  # type: ignore[misc]
        self.training = False
        return self


def freeze(model: nn.Module) -> None:
    """Freeze everything but adapters: parameters lose their gradient, batch norms keep their statistics.

    Idempotent; whatever was trainable is remembered for `unload`.
    """
    for _, module in walk(model):
        slots = slots_of(module)
        for name, parameter in module._parameters.items():
            if parameter is None or not parameter.requires_grad:
                continue
            if name in slots and slots[name].live != BASE:
                continue
            parameter.requires_grad_(False)
            module.__dict__.setdefault(FROZEN, set()).add(name)
        if isinstance(module, _StatisticsNorm) and module.track_running_stats and not any(slots):
            put_on(module, _FrozenNorm)
            module.train(False)


def thaw(model: nn.Module) -> None:
    """Undo freeze."""
    for _, module in walk(model):
        for name in module.__dict__.pop(FROZEN, ()):
            parameter = module._parameters.get(name)
            if parameter is not None:
                parameter.requires_grad_(True)
        if isinstance(module, _FrozenNorm):
            take_off(module)
            module.train(model.training)


def guard_nested_tensors(model: nn.Module) -> None:
    """nn.TransformerEncoder packs padded batches for its layers' fused path, which an adapted layer does not take."""
    for _, module in walk(model):
        if not isinstance(module, _TransformerEncoder):
            continue
        adapted = any(is_adapted(below) and "oft_R" in below._modules for below in module.modules())
        if adapted and _NESTED not in module.__dict__:
            module.__dict__[_NESTED] = module.use_nested_tensor
            module.use_nested_tensor = False
        elif not adapted and _NESTED in module.__dict__:
            module.use_nested_tensor = module.__dict__.pop(_NESTED)
