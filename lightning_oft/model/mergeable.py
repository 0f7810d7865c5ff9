"""Whether layers can be merged, and what a merge or a file would do, or has cost, without a word."""

import contextlib
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from lightning_oft.codecs import is_scattered, packed_codec, parameter_of, whole
from lightning_oft.layers.base import has_forward_of_its_own, has_own_forward, refusal
from lightning_oft.layers.own_forward import OwnForward, merges_as_called
from lightning_oft.layers.state import every_rotation, rotations_of, state_of
from lightning_oft.model import first_forward
from lightning_oft.model.folding import exact_codecs, is_finite
from lightning_oft.model.packed import writable_codec
from lightning_oft.model.traversal import Modules, adapted, some

log = logging.getLogger(__name__)

OFFLOADED = (
    "load them onto a device first (accelerate.hooks.remove_hook_from_module(model, recurse=True) takes back what was "
    "offloaded)"
)
"""The remedy for tensors that are not at hand."""

OTHER_FORWARD = (
    "the forward that was put on it does not compute the same with a rotated input and a merged weight: make it "
    "the forward of a subclass before the injection, or leave the layer out with exclude_modules"
)

_SPARSE = 0.2
"""Share of zeros from which on a weight is taken for a pruned one; pretrained weights have next to none."""

Gathered = Callable[[nn.Module], contextlib.AbstractContextManager[Any]]
"""Within it, the tensors of a layer are at hand."""

_BOTH_WAYS = (
    "save_merged(model, directory) writes a merged model with plain weights, merge(model, requantize=True) writes these "
    "back in their own format, which costs a second quantization error"
)
_NO_WAY_BACK = (
    "nothing here writes their format; save_merged(model, directory) writes a merged model with plain weights"
)


def check_mergeable(layers: dict[str, nn.Module], gathered: Gathered, requantize: bool) -> dict[str, bool]:
    """Raise ValueError where a layer cannot be merged, with `requantize` into its own format. Returns of each that
    has active rotations whether one is not the identity."""
    packed, absent, broken, has_turned = [], [], [], {}
    for name, layer, state in adapted(layers):
        check_stored(name, layer)
        codecs = exact_codecs(layer, state) or (writable_codec(layer) if requantize else None)
        if codecs is None:
            packed.append(name)
            continue
        with gathered(layer):
            rotations = [rotation for one in state.active for rotation in rotations_of(layer, one).values()]
            # The whole generators, on every process: one that alone raised would leave the others waiting.
            generators = [whole(one.detach()) for rotation in rotations for one in rotation.parameters()]
            weights = [codec.read(layer, parameter) for parameter, codec in codecs.items()]
            if any(tensor.is_meta for tensor in (*generators, *weights)):
                absent.append(name)
                continue
            check_forward(name, layer)
            if not all(map(is_finite, generators)):
                broken.append(name)
            elif rotations:  # those of an adapter that is not merged say nothing
                has_turned[name] = any(bool(generator.any()) for generator in generators)
    has_way_back = not requantize and all(writable_codec(layers[name]) is not None for name in packed)
    for names, what, remedy in (
        (packed, "the weights of {} are quantized or packed", _BOTH_WAYS if has_way_back else _NO_WAY_BACK),
        (absent, "the weights of {} are on the meta device, not loaded or offloaded", OFFLOADED),
        (broken, "generators of {} are NaN or infinite", "load an earlier state of the adapter"),
    ):
        if names:
            raise ValueError(f"cannot merge: {what.format(some(names))}; nothing was changed: {remedy}")
    return has_turned


def check_stored(name: str, layer: nn.Module) -> None:
    """Raise ValueError where a weight is no parameter any more, such as one that was given a weight norm since."""
    if (reason := refusal(layer)) is not None:
        raise ValueError(f"cannot merge {some([name])}: {reason}; nothing was changed")


def check_forward(name: str, layer: nn.Module) -> None:
    """Raise ValueError where an adapted layer was given, since the injection, a forward or a class that computes
    something else of a merged weight, or that has lost its rotation."""
    state = state_of(layer)
    if state is None:
        return
    if state.layer_type.mixin is not None and not isinstance(layer, state.layer_type.mixin):
        what = f"its class was changed to {type(layer).__name__} after the injection, which took its rotation away"
        raise ValueError(f"cannot merge {some([name])}: {what}; change it before")
    is_own = has_forward_of_its_own(layer) or has_own_forward(layer)
    is_scaled = any(state.configs[name].magnitude is not None for name in state.active)
    if is_own and merges_as_called(layer, state.layer_type, is_scaled) is False:
        raise ValueError(f"cannot merge {some([name])}: {OTHER_FORWARD}; nothing was changed")


def report_untrained(has_turned: Mapping[str, bool], action: str) -> None:
    """Log the layers whose rotation is still the identity where others are not; `has_turned` says it of each."""
    idle = [name for name, turned in has_turned.items() if not turned]
    if 0 < len(idle) < len(has_turned):
        what = "still the identity, though others have been trained"
        why = "their layers are not called or do not reach the loss"
        log.warning(
            "%s: the rotations of %s are %s: %s; leave them out with exclude_modules", action, some(idle), what, why
        )


def report_requantized(layers: dict[str, nn.Module], errors: dict[str, float]) -> None:
    """Log what writing weights back in their formats has put the outputs of their layers off by."""
    formats = {codec.storage(layers[name]) for name in errors if (codec := packed_codec(layers[name])) is not None}
    worst = max(errors, key=errors.__getitem__)
    log.warning(
        "merge: %d layers are requantized (%s): on random inputs their outputs are off by %.2g of their norm on average, "
        "by %.2g at most (%s)",
        len(errors), ", ".join(sorted(map(str, formats))), sum(errors.values()) / len(errors), errors[worst], worst,
    )  # fmt: skip


@contextlib.contextmanager
def notes_on_merge(modules: Modules) -> Iterator[None]:
    """Around a merge: says what it has filled or changed that nobody could look at."""
    sparse = set(sparse_layers(modules))
    rotations = (rotation for _, layer, _ in adapted(modules) for rotation in every_rotation(layer))
    is_unseen = first_forward.is_pending(modules[""]) and any(
        p.grad is not None for one in rotations for p in one.parameters()
    )
    yield
    if sparse and (filled := sorted(sparse.difference(sparse_layers(modules)))):
        kept = all(
            one is not None for name, _, state in adapted(modules) if name in filled for one in state.base.values()
        )
        remedy = ", or unmerge(model) and keep the rotations beside them" if kept else " (no base was kept)"
        what = f"merge: the weights of {some(filled)} were sparse, and their zeros are filled"
        warnings.warn(f"{what}: prune them again{remedy}", stacklevel=5)
    if is_unseen:
        what = "merge: no forward of the model was looked at (compiled, sharded, or only its other methods were called)"
        log.warning("%s: a weight that is used past its layer has changed what it computes; compare outputs", what)


def sparse_layers(modules: Mapping[str, nn.Module]) -> list[str]:
    """Names of the adapted layers whose weights have been pruned: a merge fills their zeros. Not of those that run a
    forward of their own, which may make the zeros anew."""
    return [
        name
        for name, layer, state in adapted(modules)
        if not isinstance(state.layer_type, OwnForward) and packed_codec(layer) is None
        for part in state.layer_type.rotated_weights(layer).values()
        if (weight := parameter_of(layer, part.parameter)) is not None
        and not (weight.is_meta or is_scattered(weight) or not weight.is_floating_point())
        and _is_sparse(state.layer_type.to_matrix(layer, weight.detach()))
    ]


def _is_sparse(matrix_oi: Tensor) -> bool:
    """Whether rows have zeros among their entries. Rows that are zero altogether stay it, however they are turned."""
    zeros = matrix_oi[:: max(1, len(matrix_oi) // 64)] == 0
    others = zeros[~zeros.all(1)]
    return len(others) > 0 and float(others.float().mean()) > _SPARSE
