"""From generators to rotations by plain formulas: the exact Cayley map and its truncated series."""

import math

import torch
from torch import Tensor


def generator_size(block_size: int) -> int:
    """Number of free entries of one skew block, b(b-1)/2."""
    return block_size * (block_size - 1) // 2


def block_size_of(generator_size: int) -> int:
    """Block size b whose generator has b(b-1)/2 entries. Raises ValueError where there is none."""
    b = (1 + math.isqrt(1 + 8 * generator_size)) // 2
    if b * (b - 1) // 2 != generator_size:
        raise ValueError(f"{generator_size} is not b(b-1)/2 for any block size b")
    return b


def skew(generator: Tensor, block_size: int) -> Tensor:
    """Skew matrices Q = U - U^T with U the strict upper triangle. (n, b(b-1)/2) -> (n, b, b), no factor 1/2."""
    rows, columns = torch.triu_indices(block_size, block_size, 1, device=generator.device)
    upper = generator.new_zeros(generator.shape[0], block_size, block_size)
    upper = torch.index_put(upper, (torch.arange(len(upper), device=upper.device)[:, None], rows, columns), generator)
    return upper - upper.mT


def cayley(q: Tensor) -> Tensor:
    """Cayley map R = (I + Q)(I - Q)^-1. Q: (n, b, b) skew -> R: (n, b, b) orthogonal. Qiu et al. 2023, eq. 5.

    A float32 solve alone is off orthogonality by 1e-6 at ||Q||_2 = 3 and by 1e-5 at 100; R + R (I - R^T R) / 2, one step
    of Newton's method for the nearest orthogonal matrix, is off by 5e-7 (measured, b = 64). On a GPU it is
    computed as `positive_cayley` does.
    """
    if q.is_cuda:
        return positive_cayley(q)
    eye = torch.eye(q.shape[-1], dtype=q.dtype, device=q.device)
    solved: Tensor = torch.linalg.solve(eye - q, eye + q)
    return solved + solved @ (eye - solved.mT @ solved) / 2


def positive_cayley(q: Tensor) -> Tensor:
    """The same map as 2 (I + Q)(I - Q^2)^-1 - I, in float64: torch's batched LU waits for all that a GPU still has to do,
    and the Cholesky factors of a positive definite matrix do not. Of the dtype of Q."""
    wide, eye = q.double(), torch.eye(q.shape[-1], dtype=torch.float64, device=q.device)
    turned: Tensor = 2 * (eye + wide) @ inverse_of_positive(eye - wide @ wide) - eye
    return turned.to(q.dtype)


def inverse_of_positive(matrix: Tensor) -> Tensor:
    """The inverse of symmetric positive definite matrices, (n, b, b), without waiting for the device: L^-T L^-1."""
    factor = torch.linalg.cholesky_ex(matrix)[0]
    eye = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device).expand_as(matrix)
    inverted: Tensor = torch.linalg.solve_triangular(factor, eye, upper=False)
    return inverted.mT @ inverted


def cayley_neumann(q: Tensor, terms: int, halve_last: bool = True) -> Tensor:
    """Truncated Cayley map, R_k = I + 2Q + ... + 2Q^(k-2) + Q^(k-1) = cayley(Q)(I - Q^(k-1)), k = `terms`.

    Q: (n, b, b) -> R: (n, b, b). ||R^T R - I|| = t^(2(k-1)) for even k and about 2 t^(k-1) for odd k, t = ||Q||_2:
    prefer even k; the series diverges at t >= 1. The numbers are PEFT's for every k: k <= 1 is the identity, k = 2 is
    I + 2Q, k = 3 is computed as k = 4. `halve_last=False` is the series of PEFT before 0.18, whose last term is
    2Q^(k-1). Qiu et al. 2025 (OFTv2), section 4.
    """
    eye = torch.eye(q.shape[-1], dtype=q.dtype, device=q.device)
    if terms <= 1:
        return eye.expand_as(q)
    if not halve_last:
        return 2 * _geometric(q, terms, eye) - eye
    if terms == 2:
        return eye + 2 * q
    partial = _geometric(q, max(terms, 4) - 1, eye)
    return partial + q @ partial


def _geometric(q: Tensor, terms: int, eye: Tensor) -> Tensor:
    """I + Q + ... + Q^(terms-1) by doubling, in about 2 log2(terms) products. (n, b, b) -> (n, b, b)."""
    if terms <= 2:
        return eye.expand_as(q) if terms == 1 else eye + q
    square = q @ q
    if terms == 3:
        return eye + q + square
    half = _geometric(square, terms // 2, eye)
    return half + q @ half if terms % 2 == 0 else eye + (q + square) @ half


def plain_rotation(generator: Tensor, block_size: int, terms: int | None, halve_last: bool) -> Tensor:
    """R of a generator by the plain formulas, as `rotation_of`."""
    q_nbb = skew(generator, block_size)
    return cayley(q_nbb) if terms is None else cayley_neumann(q_nbb, terms, halve_last)
