"""Floor 1: the Rotation module, and how one module gets it and loses it."""

from .kinds import Kind, Part, kind_of, refusal
from .rotation import Rotation
from .state import LayerState, is_adapted, rotations_of, state_of

__all__ = [
    "Kind",
    "LayerState",
    "Part",
    "Rotation",
    "is_adapted",
    "kind_of",
    "refusal",
    "rotations_of",
    "state_of",
]
