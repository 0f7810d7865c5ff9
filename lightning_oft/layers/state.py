"""What an adapted layer remembers beside its rotations. It lives on the layer, so any module above it can be asked."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from lightning_oft.config import OFTConfig

from .rotation import Rotation

if TYPE_CHECKING:
    from .kinds import Kind

_ATTRIBUTE = "_oft_state"
FROZEN = "_oft_frozen"
"""Attribute of a module that names the parameters which were trainable before an adapter froze the base."""


@dataclass
class LayerState:
    """The adapters of one layer.

    `oft_R` of the layer maps adapter names to rotations; `active` are those applied, in order. A merged layer keeps
    its rotations out of the module tree, and in `base` the weights to return to, by parameter name.
    """

    kind: Kind
    configs: dict[str, OFTConfig] = field(default_factory=dict)
    active: list[str] = field(default_factory=list)
    enabled: bool = True
    merged: tuple[str, ...] | None = None
    base: dict[str, Tensor | None] = field(default_factory=dict)
    merged_fingerprints: dict[str, str | None] = field(default_factory=dict)
    fingerprint: str | None = None

    def applied(self) -> list[str]:
        """Names of the adapters that a forward applies now, in order."""
        return self.active if self.enabled and self.merged is None else []


def state_of(module: nn.Module) -> LayerState | None:
    """The state of an adapted layer, merged or not; None for any other module."""
    return module.__dict__.get(_ATTRIBUTE)


def set_state(module: nn.Module, state: LayerState | None) -> None:
    """Give a module its state, or take it away."""
    if state is None:
        module.__dict__.pop(_ATTRIBUTE, None)
    else:
        module.__dict__[_ATTRIBUTE] = state


def is_adapted(module: nn.Module) -> bool:
    """Whether the module carries rotations, merged or not."""
    return _ATTRIBUTE in module.__dict__


def rotations_of(layer: nn.Module, adapter_name: str) -> dict[str, Rotation]:
    """The rotations of one adapter of a layer by part; the part's name is empty where a layer has one rotation."""
    entry: Any = layer.oft_R[adapter_name]  # type: ignore[index]
    # A rotation may stand behind the wrapper of its own FSDP1 unit, which must be called and answers for it.
    parts: Any = entry.items() if isinstance(entry, nn.ModuleDict) else [("", entry)]
    return dict(parts)


def applied_rotations(layer: nn.Module, part: str) -> list[Rotation]:
    """The rotations that a forward applies to one part of a layer now, in order."""
    state = state_of(layer)
    if state is None:
        return []
    found = (rotations_of(layer, name).get(part) for name in state.applied())
    return [rotation for rotation in found if rotation is not None]
