"""Floor 1: the Rotation module, and how one module gets it and loses it."""

from lightning_oft.layers import conv, experts, linear, own_forward  # noqa: F401  they register their layer types
from lightning_oft.layers.base import LayerType, RotatedWeight, layer_type_of, register_layer_type
from lightning_oft.layers.experts import Experts
from lightning_oft.layers.own_forward import OwnForward
from lightning_oft.layers.rotation import Rotation
from lightning_oft.layers.state import LayerState, applied_rotations, rotated_weight, rotations_of, state_of

__all__ = ["Experts", "LayerState", "LayerType", "OwnForward", "RotatedWeight", "Rotation", "applied_rotations", "layer_type_of",
           "register_layer_type", "rotated_weight", "rotations_of", "state_of"]  # fmt: skip
