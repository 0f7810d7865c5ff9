"""Floor 0: the mathematics of orthogonal finetuning, pure functions on tensors, torch only.

Legend of shapes: n blocks of size b, fan-in i = n*b, fan-out o. A generator is the strict upper triangle of a
skew-symmetric Q, row by row: (n, b(b-1)/2). One convention everywhere: R = (I + Q)(I - Q)^-1 per block,
y = base(x . blockdiag(R)), hence W' = W . blockdiag(R)^T. One block (n = 1) may serve every slice of the fan-in.
"""

from lightning_oft.functional.geometry import (
    EXACT_RADIUS,
    SERIES_TOLERANCE,
    angle_radius,
    block_size_of,
    cayley,
    cayley_neumann,
    eps_radius,
    error_bound,
    exact_generator,
    frobenius_norm,
    generator_size,
    largest_angle,
    largest_norms,
    orthogonality_error,
    project,
    project_all,
    reach_radius,
    rotation_angle,
    series_error,
    series_reach,
    skew,
)
from lightning_oft.functional.maps import has_kernel, rotation_of, rotations_of
from lightning_oft.functional.products import RotatedInput, inverse, rotate, rotate_weight, rotated_linear
from lightning_oft.functional.tracing import (
    constant_in_onnx,
    full_float32,
    is_alone,
    is_recorded,
    is_traced,
    without_autocast,
)

__all__ = [
    "EXACT_RADIUS",
    "SERIES_TOLERANCE",
    "RotatedInput",
    "angle_radius",
    "block_size_of",
    "cayley",
    "cayley_neumann",
    "constant_in_onnx",
    "eps_radius",
    "error_bound",
    "exact_generator",
    "frobenius_norm",
    "full_float32",
    "generator_size",
    "has_kernel",
    "inverse",
    "is_alone",
    "is_recorded",
    "is_traced",
    "largest_angle",
    "largest_norms",
    "orthogonality_error",
    "project",
    "project_all",
    "reach_radius",
    "rotate",
    "rotate_weight",
    "rotated_linear",
    "rotation_angle",
    "rotation_of",
    "rotations_of",
    "series_error",
    "series_reach",
    "skew",
    "without_autocast",
]
