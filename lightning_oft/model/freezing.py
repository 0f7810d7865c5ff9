"""What freezing means: no gradient, no drifting statistics, and a way back."""

from __future__ import annotations

from torch import nn

from lightning_oft.layers.class_swap import SwappedClass, restore_class, swap_class
from lightning_oft.layers.state import drop_empty_record, make_record, record_of, state_of
from lightning_oft.model.saved_modules import BASE, saved_tensors, slots_of
from lightning_oft.model.traversal import Modules

_StatisticsNorm = nn.modules.batchnorm._NormBase
_TransformerEncoder = nn.TransformerEncoder


class _FrozenNorm(SwappedClass):
    """Stays in eval unless an adapter owns its statistics: those of a frozen base must not drift with the new data."""

    def train(self: nn.Module, mode: bool = True) -> nn.Module:  # type: ignore[misc]
        make_record(self).norm_mode = mode
        self.training = mode and _is_owned(self)
        return self


def _is_owned(module: nn.Module) -> bool:
    """Whether an adapter trains the module whole, statistics included."""
    statistics = {key: slot for key, slot in slots_of(module).items() if key in module._buffers}
    # Of batch norms, and the power iterations of both kinds of spectral norm.
    return any(slot.live != BASE for key, slot in statistics.items() if key == "running_mean" or key.endswith("_u"))


def _has_statistics(module: nn.Module) -> bool:
    if isinstance(module, _StatisticsNorm):
        return bool(module.track_running_stats)
    old = any(type(hook).__name__ == "SpectralNorm" for hook in module._forward_pre_hooks.values())
    return old or type(module).__name__ == "_SpectralNorm"


def freeze(modules: Modules) -> None:
    """Freeze everything but adapters: parameters lose their gradient, batch and spectral norms keep their statistics.

    Idempotent; whatever was trainable is remembered for `unload`.
    """
    # By the tensor, not by its place: a head that an adapter trains may be tied to an embedding that none does.
    trains = {id(saved.tensor) for saved in saved_tensors(modules) if saved.slot.live != BASE}
    for module in modules.values():
        for name, parameter in module._parameters.items():
            if parameter is None or not parameter.requires_grad or id(parameter) in trains:
                continue
            parameter.requires_grad_(False)
            make_record(module).frozen.add(name)
        if isinstance(module, _FrozenNorm) or _has_statistics(module):
            swap_class(module, _FrozenNorm)
            record = record_of(module)
            asked = record.norm_mode if record is not None else None
            module.train(module.training if asked is None else asked)


def _norm_modes(modules: Modules) -> list[tuple[nn.Module, bool]]:
    """The norms that were ever frozen, and the mode that was asked of each."""
    records = [(module, record) for module in modules.values() if (record := record_of(module)) is not None]
    return [(module, record.norm_mode) for module, record in records if record.norm_mode is not None]


def sync_norm_modes(modules: Modules) -> None:
    """Let every norm train or rest by whose statistics are in it now."""
    for module, mode in _norm_modes(modules):
        if isinstance(module, _FrozenNorm):
            module.train(mode)


def restore_norm_classes(modules: Modules) -> None:
    """Give norms their own class back, as a merged model has it; `swap_norm_classes` undoes it."""
    for module, mode in _norm_modes(modules):
        if isinstance(module, _FrozenNorm):
            restore_class(module)
            module.train(mode)


def swap_norm_classes(modules: Modules) -> None:
    """Freeze the norms again whose class `restore_norm_classes` gave back."""
    for module, _ in _norm_modes(modules):
        swap_class(module, _FrozenNorm)
        module.train(module.training)


def unfreeze_merged(modules: Modules) -> None:
    """Make a merged model as trainable as it was before any adapter; `freeze_unmerged` undoes it."""
    restore_norm_classes(modules)
    for module in modules.values():
        record = record_of(module)
        if record is None:
            continue
        names = record.frozen | {key for key in record.slots if key in module._parameters}
        now = {name: p.requires_grad for name in names if (p := module._parameters.get(name)) is not None}
        for name in now:
            module._parameters[name].requires_grad_(name in record.frozen)  # type: ignore[union-attr]
        if now:
            record.released = now


def freeze_unmerged(modules: Modules) -> None:
    """Freeze again what `unfreeze_merged` released, and nothing else."""
    for module in modules.values():
        record = record_of(module)
        if record is None:
            continue
        for name, trains in record.released.items():
            parameter = module._parameters.get(name)
            if parameter is not None:
                parameter.requires_grad_(trains)
        record.released = {}
    swap_norm_classes(modules)


def only_norms_rest(modules: Modules) -> bool:
    """Whether all that is in eval within a training model are the norms of the frozen base."""
    resting = [module for module in modules.values() if not module.training]
    return bool(resting) and all(isinstance(module, _FrozenNorm) for module in resting)


def is_frozen_norm(module: nn.Module) -> bool:
    """Whether a module is a norm whose statistics are those of the frozen base."""
    return isinstance(module, _FrozenNorm) and not _is_owned(module)


def unfreeze(modules: Modules) -> None:
    """Undo freeze."""
    restore_norm_classes(modules)
    for module in modules.values():
        record = record_of(module)
        if record is None:
            continue
        for name in record.frozen:
            parameter = module._parameters.get(name)
            if parameter is not None:
                parameter.requires_grad_(True)
        record.frozen, record.released, record.norm_mode = set(), {}, None
        drop_empty_record(module)


def sync_nested_tensors(modules: Modules) -> None:
    """nn.TransformerEncoder packs padded batches for its layers' fused path, which a rotated layer does not take."""
    for encoder in modules.values():
        if not isinstance(encoder, _TransformerEncoder):
            continue
        below = [state for module in encoder.modules() if (state := state_of(module)) is not None]
        rotated = any(state.enabled and state.merged is None for state in below)
        record = make_record(encoder)
        if rotated and record.nested_tensor is None:
            record.nested_tensor = bool(encoder.use_nested_tensor)
            encoder.use_nested_tensor = False
        elif not rotated and record.nested_tensor is not None:
            encoder.use_nested_tensor, record.nested_tensor = record.nested_tensor, None
        drop_empty_record(encoder)
