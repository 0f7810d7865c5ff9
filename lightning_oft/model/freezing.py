"""What freezing means: no gradient, no drifting statistics, and a way back."""

from collections.abc import Iterator, Mapping

from torch import nn

from lightning_oft.layers.base import SwappedClass, restore_class, swap_class
from lightning_oft.layers.state import drop_empty_record, make_record, record_of
from lightning_oft.model import first_forward
from lightning_oft.model.library import sync_library_models
from lightning_oft.model.saved_modules import BASE, saved_tensors
from lightning_oft.model.traversal import Modules, adapted, joined, records, reset_compiled_code


class _FrozenNorm(SwappedClass):
    """Stays in eval unless an adapter owns its statistics: those of a frozen base must not drift with the new data."""

    def train(self: nn.Module, mode: bool = True) -> nn.Module:  # type: ignore[misc]
        make_record(self).norm_mode = mode
        self.training = mode and not is_frozen_norm(self)
        return self


def is_frozen_norm(module: nn.Module) -> bool:
    """Whether a module is a norm whose statistics are those of the frozen base: no adapter trains it whole."""
    record = record_of(module)
    slots = record.slots.items() if record is not None else ()
    # Statistics of batch norms, and the power iterations of both kinds of spectral norm.
    statistics = [slot for key, slot in slots if key in module._buffers and key.endswith(("running_mean", "_u"))]
    return isinstance(module, _FrozenNorm) and all(slot.live == BASE for slot in statistics)


def only_norms_rest(modules: Modules) -> bool:
    """Whether all that is in eval within a training model are the norms of the frozen base."""
    resting = [module for module in modules.values() if not module.training]
    return bool(resting) and all(isinstance(module, _FrozenNorm) for module in resting)


def freeze(modules: Modules) -> None:
    """Freeze everything but adapters: parameters lose their gradient, batch and spectral norms keep their statistics.
    Idempotent; whatever was trainable is remembered for `unload`."""
    # By the tensor, not by its place: a head that an adapter trains may be tied to an embedding that none does.
    trains = {id(saved.tensor) for saved in saved_tensors(modules) if saved.slot.live != BASE}
    for module in modules.values():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.requires_grad and id(parameter) not in trains:
                parameter.requires_grad_(False)
                make_record(module).frozen.add(name)
        old = any(type(hook).__name__ == "SpectralNorm" for hook in module._forward_pre_hooks.values())
        is_batch_norm = isinstance(module, nn.modules.batchnorm._NormBase) and module.track_running_stats
        has_statistics = is_batch_norm or old or type(module).__name__ == "_SpectralNorm"
        if has_statistics and not isinstance(module, _FrozenNorm):
            make_record(module).norm_mode = module.training
    freeze_norms(modules)


def frozen_parameters(modules: Modules) -> Iterator[tuple[str, nn.Parameter]]:
    """(name, parameter) of what trained before an adapter froze the base."""
    for name, module, record in records(modules):
        for key in sorted(record.frozen):
            if (parameter := module._parameters.get(key)) is not None:
                yield joined(name, key), parameter


def freeze_norms(modules: Modules) -> None:
    """Let every norm that was ever frozen train or rest by whose statistics are in it now."""
    for _, module, record in records(modules):
        if record.norm_mode is not None:
            asked = record.norm_mode if isinstance(module, _FrozenNorm) else module.training
            swap_class(module, _FrozenNorm)
            module.train(asked)


def asked_mode(module: nn.Module) -> bool:
    """The mode that was asked of a module, which a norm of the frozen base need not be in."""
    record = record_of(module)
    asked = record.norm_mode if record is not None and isinstance(module, _FrozenNorm) else None
    return module.training if asked is None else asked


def ask_norms(modules: Modules, modes: Mapping[nn.Module, bool]) -> None:
    """Ask norms of the frozen base for modes again. Who notes the modes of a model and gives them back, as Lightning does
    around a validation, notes that they rest, and they would rest for good when they are frozen no more."""
    for _, module, record in records(modules):
        if record.norm_mode is not None and module in modes:
            record.norm_mode = modes[module]


def unfreeze_norms(modules: Modules) -> None:
    """Give norms their own class back, as a merged model has it; `freeze_norms` undoes it."""
    for _, module, record in records(modules):
        if isinstance(module, _FrozenNorm):
            restore_class(module)
            module.train(bool(record.norm_mode))


def unfreeze_merged(modules: Modules) -> None:
    """Make a merged model as trainable as it was before any adapter; `freeze_unmerged` undoes it."""
    unfreeze_norms(modules)
    for _, module, record in records(modules):
        names = record.frozen | record.slots.keys()
        own = {name: p for name, p in module._parameters.items() if p is not None and name in names}
        record.released = record.released or {name: parameter.requires_grad for name, parameter in own.items()}
        for name, parameter in own.items():
            parameter.requires_grad_(name in record.frozen)


def freeze_unmerged(modules: Modules) -> None:
    """Freeze again what `unfreeze_merged` released, and nothing else."""
    freeze_norms(modules)
    for _, module, record in records(modules):
        for name, trains in record.released.items():
            if (parameter := module._parameters.get(name)) is not None:
                parameter.requires_grad_(trains)
        record.released = {}


def sync_nested_tensors(modules: Modules) -> None:
    """nn.TransformerEncoder packs padded batches for its layers' fused path, which a rotated layer does not take."""
    for name, encoder in modules.items():
        if isinstance(encoder, nn.TransformerEncoder):
            rotated = any(state.enabled and state.merged is None for _, _, state in adapted(modules.below(name)))
            record = make_record(encoder)
            if rotated and record.nested_tensor is None:
                record.nested_tensor = bool(encoder.use_nested_tensor)
                encoder.use_nested_tensor = False
            elif not rotated and record.nested_tensor is not None:
                encoder.use_nested_tensor, record.nested_tensor = record.nested_tensor, None
            drop_empty_record(encoder)


def layers_changed(modules: Modules) -> None:
    """What depends on which layers rotate follows: packed batches, library models, the watch of a first forward and
    compiled code."""
    if all(state.merged is not None for _, _, state in adapted(modules)):
        for module in modules.values():
            first_forward.unwatch(module)
    sync_nested_tensors(modules)
    sync_library_models(modules)
    reset_compiled_code()
