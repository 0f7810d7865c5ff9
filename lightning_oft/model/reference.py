"""The reference: what an adapted model is compared with while it trains, without a second copy of its weights.

It is the base, with every adapter off; or, where training starts from an adapter that has learned something, a frozen
copy of that adapter, which stands beside it in the model under the name "reference".
"""

import contextlib
import warnings
from collections.abc import Iterator

from torch import nn

from lightning_oft.codecs import whole
from lightning_oft.layers.state import every_rotation
from lightning_oft.model import freezing, saved_modules, traversal
from lightning_oft.model.activation import disable_adapters, has_learned, remember_choice
from lightning_oft.model.adapter_state import copied, describe
from lightning_oft.model.loading import put
from lightning_oft.model.traversal import active_names, adapted, adapter_names, walk

REFERENCE = "reference"
"""Name of the frozen copy."""


def has_reference(model: nn.Module) -> bool:
    """Whether the model has adapters, so that there is something to turn off."""
    return bool(adapter_names(walk(model)))


def is_reference(model: nn.Module) -> bool:
    """Whether the model computes what its reference does: no adapter has learned anything yet. Of shards, which one
    process cannot judge, this is denied."""
    return not has_learned(walk(model))


def keep_reference(model: nn.Module) -> bool:
    """Copy the active adapter to one named "reference" that stays as it is now, where it is more than the base.
    Returns whether the model has such a copy now; one that is there already is kept.

    Raises:
        ValueError: several adapters are active, of which a single one cannot be a copy.
        RuntimeError: the model is merged.
    """
    modules = walk(model)
    if REFERENCE in adapter_names(modules):
        return True
    if not adapter_names(modules) or not has_learned(modules):
        return False
    names = active_names(modules)
    if len(names) != 1:
        raise ValueError(f"adapters {names} are active, and a reference is a copy of one; choose one by set_adapter")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="adapter .* is not active on")  # nor should it be
        put(model, describe(modules, names[0], copied), REFERENCE, ignore_mismatched_base=True)
    return True


def require_reference(model: nn.Module) -> None:
    """Raise ValueError where an adapter has learned and no copy of it was kept, as where layers are split before they are
    adapted: the base would silently stand for it. A collective call where generators are sharded."""
    modules = walk(model)
    if REFERENCE in adapter_names(modules):
        return
    rotations = [rotation for _, layer, _ in adapted(modules) for rotation in every_rotation(layer)]
    if any(bool(whole(one.detach()).any()) for rotation in rotations for one in rotation.parameters()):
        raise ValueError(
            "the adapter that the fit starts from came too late to be copied as its reference; merge it first "
            "(lightning-oft merge), and start from that model"
        )


@contextlib.contextmanager
def reference(model: nn.Module) -> Iterator[None]:
    """Within this context the model is its reference, to the bit: rotations, biases and modules trained whole. What
    trains, gradients and a backward that is still to come are not touched.

    Raises:
        RuntimeError: the model is merged, where the base is no longer at hand; call unmerge first.
    """
    modules = walk(model)
    if REFERENCE not in adapter_names(modules):
        with disable_adapters(model):
            yield
        return
    traversal.require_unmerged(modules, "compare with the reference")
    restore = remember_choice(modules)
    try:
        for _, _, state in adapted(modules):
            state.active = [REFERENCE] if REFERENCE in state.configs else []
        for _, tensor, slot in saved_modules.saved_tensors(modules):
            saved_modules.exchange(tensor, slot, REFERENCE if REFERENCE in slot.owners else saved_modules.BASE)
        freezing.freeze_norms(modules)
        yield
    finally:
        restore()
