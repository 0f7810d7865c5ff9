"""How far a rotation turns, how far it is from orthogonal, and the ball that holds it (COFT)."""

import math

import torch
from torch import Tensor

SERIES_TOLERANCE = 1e-6
"""Largest ||R^T R - I||_2 of a truncated series that passes without a word: float32's own accuracy."""


def series_error(norm: float, terms: int) -> float:
    """Bound of ||R_k^T R_k - I||_2 for a truncated series of `terms` terms at t = ||Q||_2 = `norm`."""
    if terms <= 2:
        return 0.0 if terms <= 1 or norm == 0 else 4 * norm**2
    k = max(terms, 4)
    power = norm ** (k - 1) if norm < 1e6 else math.inf
    return power**2 if k % 2 == 0 else 2 * power + power**2


def series_reach(terms: int, tolerance: float = SERIES_TOLERANCE) -> float:
    """Largest t = ||Q||_2 at which a series of `terms` terms stays within `tolerance`; the inverse of series_error."""
    if terms <= 2:
        return math.sqrt(tolerance) / 2 if terms == 2 else math.inf
    k = max(terms, 4)
    power = math.sqrt(tolerance) if k % 2 == 0 else math.sqrt(1 + tolerance) - 1
    return float(power ** (1 / (k - 1)))


def frobenius_norm(generator: Tensor) -> Tensor:
    """||Q_i||_F of each block from its generator: sqrt(2) ||generator_i||. (n, m) -> (n,)."""
    norm: Tensor = torch.linalg.vector_norm(generator, dim=-1)
    return math.sqrt(2) * norm


def eps_radius(eps: float, block_size: int, blocks: int) -> float:
    """Radius of COFT's ball in ||Q_i||_F as in the paper's released code: eps b^2 / sqrt(n), n stored blocks."""
    return eps * block_size**2 / math.sqrt(blocks)


def angle_radius(max_angle: float) -> float:
    """Radius in ||Q_i||_F inside which no plane turns by more than `max_angle` degrees: sqrt(2) tan(angle / 2).

    ||Q||_2 <= ||Q||_F / sqrt(2) for a skew Q, and a plane of Cayley(Q) turns by 2 atan of its singular value.
    """
    return math.sqrt(2) * math.tan(math.radians(max_angle) / 2)


def largest_angle(radius: float) -> float:
    """Largest angle in degrees that a ball of this radius in ||Q_i||_F allows; the inverse of angle_radius."""
    return 2 * math.degrees(math.atan(radius / math.sqrt(2)))


@torch.no_grad()
def project(generator: Tensor, radius: float) -> Tensor:
    """Project each block into the ball ||Q_i||_F <= radius, in place. (n, m) -> the same tensor.

    A block outside lands within 1e-6 of the sphere, on its inner side, so that projecting twice changes nothing and
    rounding never leaves it outside. Qiu et al. 2023, section 3.3 (COFT).
    """
    norm = frobenius_norm(generator)
    scale = torch.where(norm > radius, radius * (1 - 1e-6) / norm, torch.ones_like(norm))
    return generator.mul_(scale[:, None])


def orthogonality_error(rotation: Tensor) -> Tensor:
    """Spectral norm of R^T R - I of each block. R: (n, b, b) -> (n,)."""
    eye = torch.eye(rotation.shape[-1], dtype=rotation.dtype, device=rotation.device)
    error: Tensor = torch.linalg.matrix_norm(rotation.mT @ rotation - eye, 2)
    return error


def rotation_angle(rotation: Tensor) -> Tensor:
    """Largest angle in degrees by which each block turns a plane. R: (n, b, b) -> (n,), each in [0, 180]."""
    angles: Tensor = torch.linalg.eigvals(rotation).angle().abs().amax(-1)
    return torch.rad2deg(angles)
