"""What the library remembers of a module. It lives on the module, so any module above it can be asked."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from lightning_oft.config import OFTConfig
from lightning_oft.layers.base import LayerType, Side
from lightning_oft.layers.reuse import NextToken
from lightning_oft.layers.rotation import Rotation

ATTRIBUTE = "_oft"


@dataclass
class LayerState:
    """The adapters of one layer. Its `oft_R`, when merged out of the module tree, maps their names to rotations."""

    layer_type: LayerType
    configs: dict[str, OFTConfig] = field(default_factory=dict)
    active: list[str] = field(default_factory=list)  # those that are applied, in order
    enabled: bool = True
    merged: dict[str, str | None] | None = None  # fingerprints of the weights as the merge left them, by parameter
    base: dict[str, Any] = field(default_factory=dict)  # weights that an unmerge returns to, by parameter
    fingerprint: str | None = None
    quick: NextToken | None = field(default=None, repr=False, compare=False)

    def __setattr__(self, name: str, value: Any) -> None:
        """Whatever changes may change what is applied."""
        super().__setattr__(name, value)
        if name != "quick":
            super().__setattr__("quick", None)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "quick": None}


@dataclass
class Slot:
    """One tensor with several owners: whose values are in it now, and the values of the others."""

    live: str
    owners: set[str] = field(default_factory=set)
    waiting: dict[str, Tensor] = field(default_factory=dict)


@dataclass
class Record:
    """All that the library remembers of one module, adapted or not: the only attribute that it adds to a module."""

    layer: LayerState | None = None
    slots: dict[str, Slot] = field(default_factory=dict)  # the module's own tensors that adapters train whole
    base: dict[str, str | None] = field(default_factory=dict)  # fingerprints of its own tensors as they were injected
    frozen: set[str] = field(default_factory=set)  # parameters that were trainable before an adapter froze the base
    released: dict[str, bool] = field(default_factory=dict)  # what trained when a merge made the model trainable again
    norm_mode: bool | None = None  # the mode that was asked of a norm whose statistics are frozen
    nested_tensor: bool | None = None  # an nn.TransformerEncoder's own choice of packing padded batches
    first_forward: Any = None  # what watches this model's first forward, while it runs
    tied: bool = False  # whether a merge untied the weights of this transformers model


def record_of(module: nn.Module) -> Record | None:
    """The record of a module, if it has one."""
    found: Record | None = module.__dict__.get(ATTRIBUTE)
    return found


def make_record(module: nn.Module) -> Record:
    """The record of a module, made where it has none."""
    found: Record = module.__dict__.setdefault(ATTRIBUTE, Record())
    return found


def drop_empty_record(module: nn.Module) -> None:
    """Take the record off a module where it says nothing."""
    if record_of(module) == Record():
        del module.__dict__[ATTRIBUTE]


def state_of(module: nn.Module) -> LayerState | None:
    """The state of an adapted layer, merged or not; None for any other module."""
    record = record_of(module)
    return record.layer if record is not None else None


def rotations_of(layer: nn.Module, adapter_name: str) -> dict[str, Rotation]:
    """The rotations of one adapter of a layer by part; the part's name is empty where a layer has one rotation."""
    entry: Any = layer.oft_R[adapter_name]  # type: ignore[index]
    # A rotation may stand behind the wrapper of its own FSDP1 unit, which must be called and answers for it.
    parts: Any = entry.items() if isinstance(entry, nn.ModuleDict) else [("", entry)]
    return dict(parts)


def every_rotation(layer: nn.Module) -> Iterator[Rotation]:
    """All rotations of a layer, of every adapter and part."""
    for adapter_name in layer.oft_R:  # type: ignore[union-attr]
        yield from rotations_of(layer, adapter_name).values()


def train_rotations(layer: nn.Module, adapter_name: str, trains: bool) -> None:
    """Let the rotations of one adapter of a layer train or rest; where magnitudes are fitted afterwards, these alone."""
    for rotation in rotations_of(layer, adapter_name).values():
        rotation.requires_grad_(trains)
        if not rotation.turns:
            rotation.weight.requires_grad_(False)


def applied_rotations(layer: nn.Module, part: str) -> Sequence[Rotation]:
    """The rotations that a forward applies to one part of a layer now, in order."""
    state = state_of(layer)
    if state is None or not state.enabled or state.merged is not None:
        return ()
    if part == "" and len(state.active) == 1:  # every token of a generation comes by here, past nn.Module's look-ups
        adapters: Any = layer._modules["oft_R"]
        entry = adapters[state.active[0]]
        if not isinstance(entry, nn.ModuleDict):
            return (entry,)
    found = (rotations_of(layer, name).get(part) for name in state.active)
    return [rotation for rotation in found if rotation is not None]


def remember(layer: nn.Module, rotation: Rotation, x: Tensor) -> None:
    """Where x is a single vector, let the next one be rotated by the R that it was rotated by: that of the only rotation
    which is applied to the layer, whose blocks are not shared."""
    cached, state = rotation.cached, state_of(layer)
    is_vector = x.numel() == rotation.fan_in and len(rotation.weight) == rotation.blocks
    knows_autocast = x.is_cpu or x.is_cuda  # torch's one question for all devices leaves some out
    if is_vector and knows_autocast and cached is not None and state is not None:
        state.quick = NextToken(layer, state.active[0], rotation, cached)
        if applied_rotations(layer, "") != (rotation,):  # another thread, or a hook, has changed that meanwhile
            state.quick = None


def rotated_weight(layer: nn.Module, part: str, weight: Tensor, side: Side = "input") -> Tensor:
    """The weight as a forward uses it now; through Rotation.__call__, so that FSDP gathers what it must."""
    state, rotations = state_of(layer), applied_rotations(layer, part)
    if state is None or not rotations:
        return weight
    matrix = state.layer_type.to_matrix(layer, weight)
    for rotation in rotations if side == "output" else reversed(rotations):
        matrix = rotation(matrix, transpose=side == "input")
    return state.layer_type.from_matrix(layer, matrix, weight)
