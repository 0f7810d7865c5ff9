"""What freezing means: no gradient, no drifting statistics, and a way back."""

from __future__ import annotations

from torch import nn

from lightning_oft.layers import state_of
from lightning_oft.layers.in_place import InPlace, put_on, take_off
from lightning_oft.layers.state import FROZEN

from .trained import BASE, slots, slots_of
from .walk import walk

_MODE = "_oft_mode"
_LET_GO = "_oft_let_go"
_NESTED = "_oft_use_nested_tensor"
_StatisticsNorm = nn.modules.batchnorm._NormBase
_TransformerEncoder = nn.TransformerEncoder


class _FrozenNorm(InPlace):
    """Stays in eval unless an adapter owns its statistics: those of a frozen base must not drift with the new data."""

    def train(self: nn.Module, mode: bool = True) -> nn.Module:  # type: ignore[misc]
        self.__dict__[_MODE] = mode
        self.training = mode and _owned(self)
        return self


def _owned(module: nn.Module) -> bool:
    """Whether an adapter trains the module whole, statistics included."""
    statistics = {key: slot for key, slot in slots_of(module).items() if key in module._buffers}
    # Of batch norms, and the power iterations of both kinds of spectral norm.
    return any(slot.live != BASE for key, slot in statistics.items() if key == "running_mean" or key.endswith("_u"))


def _has_statistics(module: nn.Module) -> bool:
    if isinstance(module, _StatisticsNorm):
        return bool(module.track_running_stats)
    old = any(type(hook).__name__ == "SpectralNorm" for hook in module._forward_pre_hooks.values())
    return old or type(module).__name__ == "_SpectralNorm"


def freeze(model: nn.Module) -> None:
    """Freeze everything but adapters: parameters lose their gradient, batch and spectral norms keep their statistics.

    Idempotent; whatever was trainable is remembered for `unload`.
    """
    # By the tensor, not by its place: a head that an adapter trains may be tied to an embedding that none does.
    trains = {id(tensor) for _, tensor, slot in slots(model) if slot.live != BASE}
    for _, module in walk(model):
        for name, parameter in module._parameters.items():
            if parameter is None or not parameter.requires_grad or id(parameter) in trains:
                continue
            parameter.requires_grad_(False)
            module.__dict__.setdefault(FROZEN, set()).add(name)
        if isinstance(module, _FrozenNorm) or _has_statistics(module):
            put_on(module, _FrozenNorm)
            module.train(module.__dict__.get(_MODE, module.training))


def settle_norms(model: nn.Module) -> None:
    """Let every norm train or rest by whose statistics are in it now."""
    for _, module in walk(model):
        if isinstance(module, _FrozenNorm):
            module.train(module.__dict__[_MODE])


def release_norms(model: nn.Module) -> None:
    """Give norms their own class back, as a merged model has it; `hold_norms` returns them."""
    for _, module in walk(model):
        if isinstance(module, _FrozenNorm):
            take_off(module)
            module.train(module.__dict__[_MODE])


def let_go(model: nn.Module) -> None:
    """Make a merged model as trainable as it was before any adapter; `take_hold` undoes it."""
    release_norms(model)
    for _, module in walk(model):
        before = module.__dict__.get(FROZEN, set())
        names = before | {key for key in slots_of(module) if key in module._parameters}
        now = {name: p.requires_grad for name in names if (p := module._parameters.get(name)) is not None}
        for name in now:
            module._parameters[name].requires_grad_(name in before)  # type: ignore[union-attr]
        if now:
            module.__dict__[_LET_GO] = now


def take_hold(model: nn.Module) -> None:
    """Freeze again what `let_go` released, and nothing else."""
    for _, module in walk(model):
        for name, trains in module.__dict__.pop(_LET_GO, {}).items():
            parameter = module._parameters.get(name)
            if parameter is not None:
                parameter.requires_grad_(trains)
    hold_norms(model)


def hold_norms(model: nn.Module) -> None:
    """Freeze the norms again that `release_norms` let go."""
    for _, module in walk(model):
        if _MODE in module.__dict__:
            put_on(module, _FrozenNorm)
            module.train(module.training)


def is_quiet(model: nn.Module) -> bool:
    """Whether all that is in eval within a training model are the norms of the frozen base."""
    resting = [module for module in model.modules() if not module.training]
    return bool(resting) and all(isinstance(module, _FrozenNorm) for module in resting)


def is_resting_norm(module: nn.Module) -> bool:
    """Whether a module is a norm whose statistics are those of the frozen base."""
    return isinstance(module, _FrozenNorm) and not _owned(module)


def thaw(model: nn.Module) -> None:
    """Undo freeze."""
    for _, module in walk(model):
        module.__dict__.pop(_LET_GO, None)
        for name in module.__dict__.pop(FROZEN, ()):
            parameter = module._parameters.get(name)
            if parameter is not None:
                parameter.requires_grad_(True)
        mode = module.__dict__.pop(_MODE, None)
        if isinstance(module, _FrozenNorm):
            take_off(module)
            module.train(bool(mode))


def guard_nested_tensors(model: nn.Module) -> None:
    """nn.TransformerEncoder packs padded batches for its layers' fused path, which a rotated layer does not take."""
    for _, module in walk(model):
        if not isinstance(module, _TransformerEncoder):
            continue
        states = [state for below in module.modules() if (state := state_of(below)) is not None]
        rotated = any(state.enabled and state.merged is None for state in states)
        if rotated and _NESTED not in module.__dict__:
            module.__dict__[_NESTED] = module.use_nested_tensor
            module.use_nested_tensor = False
        elif not rotated and _NESTED in module.__dict__:
            module.use_nested_tensor = module.__dict__.pop(_NESTED)
