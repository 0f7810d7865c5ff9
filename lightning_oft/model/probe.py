"""Trying layers before they are adapted: does one with a forward of its own compute what its type says, and can a
rotation of it train? On copies: of the model nothing changes."""

import contextlib
import copy
import logging
import math
import warnings
from collections.abc import Hashable, Iterable, Iterator, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_oft.codecs import PlainCodec, codec_of, local_part, packed_codec, parameter_of
from lightning_oft.config import OFTConfig
from lightning_oft.layers.base import LayerType, has_forward_of_its_own, has_own_forward, layer_type_of
from lightning_oft.layers.own_forward import OwnForward, merges_as_called
from lightning_oft.layers.rotation import Rotation
from lightning_oft.layers.state import LayerState, make_record
from lightning_oft.model.folding import folded_weights
from lightning_oft.model.mergeable import OFFLOADED, OTHER_FORWARD
from lightning_oft.model.traversal import some

log = logging.getLogger(__name__)

_EXACT, _TOLERANCE = 1e-4, 0.02
"""Relative differences up to which a rotated layer and a merged one are the same: where they compute alike, and where
a layer that runs a forward of its own may round inside."""

Magnitude = Literal["joint", "after"] | None


class Unfit(Exception):
    """Why a layer cannot be adapted, and the remedy."""


def fitting_types(layers: Mapping[str, tuple[nn.Module, Mapping[str, int]]], wanted: OFTConfig) -> dict[str, LayerType]:
    """For each layer, given with the block sizes of its parts, the type that rotates it so that merged is as trained, on
    the side and with the magnitudes that a configuration has.

    That of its class, where the forward is that of the class or a trial on a copy shows that it computes the same; else
    OwnForward, which rotates the weight below the forward. Layers of one kind are tried once. Warns of a forward on the
    instance that cannot be tried. Raises ValueError where a merged layer would not be the trained one.
    """
    tried: dict[Hashable, LayerType | Unfit | None] = {}
    types: dict[str, LayerType] = {}
    unfit: dict[str, list[str]] = {}
    untried: list[str] = []
    for name, (layer, sizes) in layers.items():
        kind = _kind(layer, sizes)
        if kind not in tried:
            try:
                tried[kind] = _fitting_type(layer, sizes, wanted)
            except Unfit as error:
                tried[kind] = error
        found = tried[kind]
        if isinstance(found, Unfit):
            unfit.setdefault(str(found), []).append(name)
        elif found is None:
            untried.append(name)
        types[name] = found if isinstance(found, LayerType) else layer_type_of(layer, wanted.side)  # type: ignore[assignment]
    if unfit:
        raise ValueError("; ".join(f"{some(names)}: {reason}" for reason, names in unfit.items()))
    if untried:
        what = f"the forward of {some(untried)} was replaced on the instance"
        remedy = "make it the forward of a subclass, or leave the layer out with exclude_modules"
        warnings.warn(f"{what}; a merge changes the model if it computes something else: {remedy}", stacklevel=5)
    own = [name for name, layer_type in types.items() if isinstance(layer_type, OwnForward)]
    if own:
        log.info("inject: %s run a forward of their own, below which the weight is rotated", some(own))
    return types


def _kind(layer: nn.Module, sizes: Mapping[str, int]) -> Hashable:
    """What layers have in common that need one trial: class, tensors, settings and blocks."""
    if (
        type(layer) is nn.Linear and not has_forward_of_its_own(layer) and not layer._forward_hooks
    ):  # most of most models
        weight: Any = layer._parameters.get("weight")
        return nn.Linear, None if weight is None else (type(weight.data), weight.dtype, weight.is_meta)
    tensors = [(key, t.dtype, t.device, type(t.data)) for key, t in _own_tensors(layer)]
    values = [(key, value) for key, value in vars(layer).items() if isinstance(value, bool | int | float | str)]
    own = id(layer.__dict__["forward"]) if has_forward_of_its_own(layer) else 0, bool(layer._forward_hooks)
    return type(layer), tuple(tensors), tuple(values), tuple(sizes.items()), own


def _own_tensors(layer: nn.Module) -> list[tuple[str, Tensor]]:
    return [(key, t) for key, t in (*layer._parameters.items(), *layer._buffers.items()) if t is not None]


def _fitting_type(layer: nn.Module, sizes: Mapping[str, int], wanted: OFTConfig) -> LayerType | None:
    layer_type, magnitude = layer_type_of(layer, wanted.side), wanted.magnitude
    assert layer_type is not None  # a plan has no other layers
    weights = layer_type.rotated_weights(layer)
    names = [weights[part].parameter for part in sizes]
    _check_stored(layer, names)
    if has_forward_of_its_own(layer) and any(tensor.is_meta for _, tensor in _own_tensors(layer)):
        raise Unfit(
            f"its tensors are offloaded to where no rotation can be: {OFFLOADED}, and offload once it is adapted"
        )
    if not all(isinstance(codec_of(layer, name), PlainCodec) for name in names):
        if _is_dead(layer):
            raise Unfit(_DEAD)
        return layer_type  # a quantized layer: its forward alone knows the weight
    if has_forward_of_its_own(layer) and hasattr(layer_type.mixin, "forward"):  # by accelerate's hooks, for one
        raise Unfit(
            "its forward was replaced on the instance, which hides that of a class: adapt the layer before that"
        )
    if has_forward_of_its_own(layer):
        is_same = merges_as_called(layer, layer_type, magnitude is not None)
        if is_same is False:
            raise Unfit(OTHER_FORWARD)
        return layer_type if is_same or not has_own_forward(layer) else None
    if not has_own_forward(layer):
        # A hook on the output is given the input too, and that of a merged layer is not rotated.
        return OwnForward(layer_type) if layer_type.input_hook is not None and layer._forward_hooks else layer_type
    with _unnoticed(layer):
        found = _confirmed_type(layer, layer_type, sizes, magnitude)
    if found is not None:
        return found
    cls = type(layer).__name__
    what = f"a {cls} does not compute from its {names[0]} what a layer of type {layer_type.name} does"
    raise Unfit(f"{what}: add it to exclude_modules, or say how it rotates with register_layer_type({cls}, like=...)")


def _check_stored(layer: nn.Module, names: Iterable[str]) -> None:
    """Raise Unfit where there is no weight to merge into: no parameter, nothing that a codec knows or packed codes."""
    lost = [name for name in names if parameter_of(layer, name) is None and codec_of(layer, name) is None]
    if not lost:
        return
    packed = [t for t in (*layer.parameters(), *layer.buffers()) if t.element_size() == 1 or not t.is_floating_point()]
    if not packed and not callable(getattr(layer, "weight", None)):  # which it is in torch.ao's quantized layers
        cls = type(layer).__name__
        remedy = f"add it to exclude_modules, or make `{lost[0]}` a parameter of {cls}"
        raise Unfit(f"a {cls} looks like a known layer and has no parameter `{lost[0]}` to merge into: {remedy}")


@contextlib.contextmanager
def _unnoticed(layer: nn.Module) -> Iterator[None]:
    """Random numbers are drawn and warnings raised as if nothing within were run."""
    devices = [t.device for _, t in _own_tensors(layer) if t.device.type == "cuda"][:1]
    with warnings.catch_warnings(), torch.random.fork_rng(devices), torch.enable_grad():
        warnings.simplefilter("ignore")
        yield


def _confirmed_type(
    layer: nn.Module, layer_type: LayerType, sizes: Mapping[str, int], magnitude: Magnitude
) -> LayerType | None:
    """The type of the layer's class or OwnForward, whichever a trial confirms first; None where neither is right."""
    own_forward = OwnForward(layer_type)
    try:
        torch.manual_seed(0)
        inputs: Any = layer_type.example(layer)
        if inputs is None:  # a type of somebody's own, who has not said how to try it
            return layer_type
        one = torch.ones((), requires_grad=True)
        output = _run(_copy(layer), tuple(x * one if x.is_floating_point() else x for x in inputs))
    except Exception:
        return own_forward  # it cannot run here and now, and this is right whatever it computes
    if inputs[0].is_floating_point() and not output.requires_grad:
        raise Unfit(_DEAD)
    candidates = ((layer_type, _EXACT), (own_forward, _TOLERANCE))
    return next(
        (one for one, most in candidates if _difference(_copy(layer), one, sizes, inputs, magnitude) < most), None
    )


def _difference(
    copied: nn.Module, layer_type: LayerType, sizes: Mapping[str, int], inputs: tuple[Tensor, ...], magnitude: Magnitude
) -> float:
    """How far a layer with large rotations beside its weights is from one with them folded in; infinite where they
    would not train."""
    weights = layer_type.rotated_weights(copied)
    config = OFTConfig(oft_block_size=2, use_cayley_neumann=False, magnitude=magnitude and "joint")
    parameters: dict[str, Any] = {part: parameter_of(copied, weights[part].parameter) for part in sizes}
    made = {
        part: Rotation(weights[part].fan, size, config, parameters[part].device, weights[part].neurons)
        for part, size in sizes.items()
    }
    for part, rotation in made.items():
        nn.init.normal_(rotation.weight, std=rotation.block_size**-0.5)
        if rotation.magnitude is not None:
            nn.init.normal_(rotation.magnitude)
        if not bool(parameters[part].any()):
            nn.init.normal_(parameters[part])
    copied.oft_R = nn.ModuleDict({"trial": made[""] if "" in made else nn.ModuleDict(made)})
    state = make_record(copied).layer = LayerState(layer_type, {"trial": config}, ["trial"])
    try:
        layer_type.attach(copied)
        rotated = _run(copied, inputs)
        layer_type.detach(copied)
        with torch.no_grad():
            for weight in folded_weights(copied, state):
                weight.codec.write(copied, weight.part.parameter, weight.folded())
            merged = _run(copied, inputs)
    except Exception:  # a weight of another shape, or a forward that takes no rotated one
        return math.inf
    return float((rotated.detach() - merged).norm() / merged.norm()) if rotated.requires_grad else math.inf


def _copy(layer: nn.Module) -> nn.Module:
    """A frozen float32 copy in eval that no hook watches; on the CPU with random values where the layer is on meta."""
    copied = copy.deepcopy(layer).requires_grad_(False).eval()
    for module in copied.modules():
        module._forward_pre_hooks.clear()
        module._forward_hooks.clear()
    if any(tensor.is_meta for tensor in (*copied.parameters(), *copied.buffers())):
        copied = copied.to_empty(device="cpu")
        for tensor in (*copied.parameters(), *copied.buffers()):
            tensor.normal_() if tensor.is_floating_point() else tensor.zero_()
    return copied.float()


def _run(layer: nn.Module, inputs: tuple[Tensor, ...]) -> Tensor:
    """The first output, from the same random numbers every time."""
    torch.manual_seed(1)
    device = next(tensor.device for _, tensor in _own_tensors(layer))
    output = layer(*(x.to(device) for x in inputs))
    first: Tensor = output if isinstance(output, Tensor) else output[0]
    return first


_DEAD = (
    "the output of the base layer does not require grad when its input does, so a rotation of the input could never "
    "train (activation quantization is such a case); exclude these layers or load the base with weight-only quantization"
)


def _is_dead(layer: Any) -> bool:
    """Whether a linear layer passes no gradient to its input, which would leave its rotation untrained."""
    weight = getattr(layer, "weight", None)
    is_plain = type(layer) is nn.Linear and isinstance(weight, Tensor) and type(local_part(weight.data)) is Tensor
    codec = packed_codec(layer)
    if is_plain or not hasattr(layer, "in_features") or (codec is not None and codec.passes_gradient):
        return False
    dtype = weight.dtype if isinstance(weight, Tensor) and weight.is_floating_point() else torch.float32
    device = next((p.device for p in layer._parameters.values() if p is not None), None)
    try:
        with torch.enable_grad():
            probe = torch.zeros(1, layer.in_features, dtype=dtype, device=device, requires_grad=True)
            output = layer(probe)
            if not isinstance(output, Tensor) or not output.requires_grad:
                return isinstance(output, Tensor)
            return torch.autograd.grad(output.sum(), probe, allow_unused=True)[0] is None
    except Exception:  # a layer that cannot run here and now; the guard after the first backward sees it
        return False
