"""Floor 1: the Rotation module, and how one module gets it and loses it."""

from lightning_oft.layers.attention import ATTENTION
from lightning_oft.layers.base import (
    LayerType,
    RotatedWeight,
    layer_type_named,
    layer_type_of,
    refusal,
    register_layer_type,
)
from lightning_oft.layers.conv import CONV, CONV_TRANSPOSE
from lightning_oft.layers.linear import CONV1D, EMBEDDING, LINEAR
from lightning_oft.layers.rotation import Rotation
from lightning_oft.layers.state import LayerState, rotations_of, state_of

__all__ = [
    "ATTENTION",
    "CONV",
    "CONV1D",
    "CONV_TRANSPOSE",
    "EMBEDDING",
    "LINEAR",
    "LayerState",
    "LayerType",
    "RotatedWeight",
    "Rotation",
    "layer_type_named",
    "layer_type_of",
    "refusal",
    "register_layer_type",
    "rotations_of",
    "state_of",
]
