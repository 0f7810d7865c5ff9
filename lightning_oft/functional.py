"""The mathematics of orthogonal finetuning: pure functions on tensors, torch only.

Legend of shapes: n blocks of size b, fan-in i = n*b, fan-out o. A generator is the strict upper triangle of a
skew-symmetric Q, row by row: (n, b(b-1)/2). One convention everywhere: R = (I + Q)(I - Q)^-1 per block,
y = base(x . blockdiag(R)), hence W' = W . blockdiag(R)^T. One block (n = 1) may serve every slice of the fan-in.
"""

import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

SERIES_TOLERANCE = 1e-6
"""Largest ||R^T R - I||_2 of a truncated series that passes without a word: float32's own accuracy."""


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Autocast switched off on a device; the meta device has none to switch."""
    if not torch.amp.is_autocast_available(device.type):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


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


class _Cayley(torch.autograd.Function):
    """One solve forward, three products backward: (I - Q)^-1 = (I + R)/2, so nothing but R is kept."""

    @staticmethod
    def forward(ctx: Any, q_nbb: Tensor) -> Tensor:
        eye = torch.eye(q_nbb.shape[-1], dtype=q_nbb.dtype, device=q_nbb.device)
        solved: Tensor = torch.linalg.solve(eye - q_nbb, eye + q_nbb)
        ctx.save_for_backward(solved)
        return solved

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (r_nbb,) = ctx.saved_tensors
        eye = torch.eye(r_nbb.shape[-1], dtype=r_nbb.dtype, device=r_nbb.device)
        twice_t = (eye + r_nbb).mT
        grad: Tensor = 0.5 * twice_t @ grads[0] @ twice_t
        return grad


def cayley(q: Tensor) -> Tensor:
    """Cayley map R = (I + Q)(I - Q)^-1. Q: (n, b, b) skew -> R: (n, b, b) orthogonal. Qiu et al. 2023, eq. 5."""
    return _Cayley.apply(q)  # type: ignore[no-any-return, no-untyped-call]


def _geometric(q: Tensor, terms: int, eye: Tensor) -> Tensor:
    """I + Q + ... + Q^(terms-1) by doubling, in about 2 log2(terms) products. (n, b, b) -> (n, b, b)."""
    if terms <= 2:
        return eye.expand_as(q) if terms == 1 else eye + q
    square = q @ q
    if terms == 3:
        return eye + q + square
    half = _geometric(square, terms // 2, eye)
    return half + q @ half if terms % 2 == 0 else eye + (q + square) @ half


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


def _blocks_last(x: Tensor, r_nbb: Tensor) -> Tensor:
    """x: (t, n*b) times the blocks of R: (n or 1, b, b) -> (t, n*b), without a transposed copy where torch allows."""
    n, b, _ = r_nbb.shape
    if n == 1:
        return (x.reshape(-1, b) @ r_nbb[0]).view(x.shape)
    blocks = x.view(-1, n, b)
    if torch.compiler.is_compiling() or torch.overrides.has_torch_function((x, r_nbb)):
        return torch.bmm(blocks.transpose(0, 1), r_nbb).transpose(0, 1).reshape(x.shape)
    out = torch.empty_like(x)
    torch.bmm(blocks.transpose(0, 1), r_nbb, out=out.view(-1, n, b).transpose(0, 1))
    return out


class _Rotate(torch.autograd.Function):
    """x . blockdiag(R) that keeps x and R for backward and nothing else; differentiable twice."""

    @staticmethod
    def forward(ctx: Any, x_ti: Tensor, r_nbb: Tensor) -> Tensor:
        # With a separate setup_context torch binds the arguments by signature, at more cost than a small product.
        ctx.save_for_backward(x_ti, r_nbb)
        with without_autocast(x_ti.device):
            return _blocks_last(x_ti, r_nbb)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x_ti, r_nbb = ctx.saved_tensors
        grad = grads[0].contiguous()
        grad_x = grad_r = None
        if ctx.needs_input_grad[0]:
            grad_x = _Rotate.apply(grad, r_nbb.mT)  # type: ignore[no-untyped-call]
        if ctx.needs_input_grad[1]:
            n, b, _ = r_nbb.shape
            x_tnb, grad_tnb = x_ti.reshape(-1, n, b), grad.view(-1, n, b)
            with without_autocast(grad.device):
                grad_r = torch.bmm(x_tnb.permute(1, 2, 0), grad_tnb.transpose(0, 1))
        return grad_x, grad_r


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """Rotate the last dimension, x . blockdiag(R). x: (..., n*b), R: (n, b, b) or (1, b, b) shared -> (..., n*b).
    Both of one floating dtype. Raises ValueError where the last dimension is not n*b."""
    n, b, _ = rotation.shape
    fan_in = x.shape[-1] if x.dim() else 0
    if (fan_in != n * b) if n > 1 else (fan_in == 0 or fan_in % b != 0):
        raise ValueError(f"cannot rotate an input of shape {tuple(x.shape)}: its last dimension must be {n * b}")
    flat = x.reshape(-1, fan_in)
    if torch.is_grad_enabled() and (x.requires_grad or rotation.requires_grad):
        return _Rotate.apply(flat, rotation).view(x.shape)  # type: ignore[no-any-return, no-untyped-call]
    with without_autocast(x.device):
        return _blocks_last(flat, rotation).view(x.shape)


def rotate_weight(weight: Tensor, rotation: Tensor) -> Tensor:
    """Rotate a weight as its inputs would be, W . blockdiag(R)^T. W: (o, i), R: (n or 1, b, b) -> (o, i)."""
    return rotate(weight, rotation.mT)


def unrotate_weight(weight: Tensor, rotation: Tensor) -> Tensor:
    """Undo rotate_weight for any invertible R by solving, W = W' . blockdiag(R)^-T. (o, i) -> (o, i).
    A truncated series is not exactly orthogonal, so R^T would not do. Solved in float64, returned in W's dtype."""
    return rotate(weight.double(), torch.linalg.inv(rotation.double().mT)).to(weight.dtype)


def frobenius_norm(generator: Tensor) -> Tensor:
    """||Q_i||_F of each block from its generator: sqrt(2) ||generator_i||. (n, m) -> (n,)."""
    return torch.mul(torch.linalg.vector_norm(generator, dim=-1), math.sqrt(2))


def eps_radius(eps: float, block_size: int, blocks: int) -> float:
    """Radius of COFT's ball in ||Q_i||_F as in the paper's released code: eps b^2 / sqrt(n), n stored blocks."""
    return eps * block_size**2 / math.sqrt(blocks)


def angle_radius(max_angle: float) -> float:
    """Radius in ||Q_i||_F inside which no plane turns by more than `max_angle` degrees: sqrt(2) tan(angle / 2).
    ||Q||_2 <= ||Q||_F / sqrt(2) for a skew Q, and a plane of Cayley(Q) turns by 2 atan of its singular value."""
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
    return torch.rad2deg(torch.linalg.eigvals(rotation).angle().abs().amax(-1))
