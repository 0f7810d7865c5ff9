"""From generators to rotations: the exact Cayley map and its truncated series, each with a backward written by hand.

Where torch.compile or torch.func look on, and for derivatives of derivatives, the plain formulas are used instead.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_oft.functional.tracing import full_float32, is_traced


def generator_size(block_size: int) -> int:
    """Number of free entries of one skew block, b(b-1)/2."""
    return block_size * (block_size - 1) // 2


def block_size_of(generator_size: int) -> int:
    """Block size b whose generator has b(b-1)/2 entries. Raises ValueError where there is none."""
    b = (1 + math.isqrt(1 + 8 * generator_size)) // 2
    if b * (b - 1) // 2 != generator_size:
        raise ValueError(f"{generator_size} is not b(b-1)/2 for any block size b")
    return b


class _Tables(NamedTuple):
    """Constants of one block size: which entry of the generator each entry of Q is, its sign, the upper triangle, I."""

    source: Tensor
    sign: Tensor
    upper: Tensor
    eye: Tensor


@functools.lru_cache(maxsize=64)
def _tables(b: int, device: torch.device, dtype: torch.dtype) -> _Tables:
    with torch.inference_mode(False), torch.no_grad():
        rows, columns = torch.triu_indices(b, b, 1)
        source, sign = torch.zeros(b, b, dtype=torch.int64), torch.zeros(b, b, dtype=dtype)
        source[rows, columns] = source[columns, rows] = torch.arange(len(rows))
        sign[rows, columns], sign[columns, rows] = 1, -1
        upper, eye = rows * b + columns, torch.eye(b, dtype=dtype)
        return _Tables(*(table.to(device) for table in (source.view(-1), sign.view(-1), upper, eye)))


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


def rotation_of(generator: Tensor, block_size: int, terms: int | None, halve_last: bool = True) -> Tensor:
    """R of a generator: by the exact Cayley map where `terms` is None, else by its series.

    Args:
        generator: (n, b(b-1)/2), floating point.
        block_size: b.
        terms: terms of the series.
        halve_last: whether its last term is halved, as in PEFT since 0.18.

    Returns:
        (n, b, b) of the generator's dtype. Differentiable as often as one likes.
    """
    if has_kernel(terms, halve_last) and not is_traced(generator) and generator.numel() and not generator.is_meta:
        return rotations_of([generator], block_size, terms, generator.dtype)[0]
    with full_float32(generator.device):
        return _formula(generator, block_size, terms, halve_last)


def rotations_of(generators: Sequence[Tensor], block_size: int, terms: int | None, dtype: torch.dtype) -> list[Tensor]:
    """R of several generators of one block size by one map. Only where `has_kernel`, and nothing is traced.

    Args:
        generators: each (n_i, b(b-1)/2), of one dtype and device.
        block_size: b.
        terms: 6, or None for the exact map.
        dtype: of the result.

    Returns:
        (n_i, b, b) of `dtype` for each. One that does not reach a loss gets no gradient. Backward may run through them
        as often as one likes while the generators stay as they are, with or without `retain_graph`.
    """
    with full_float32(generators[0].device):
        return list(_Map.apply(block_size, terms is None, dtype, *generators))  # type: ignore[no-untyped-call]


def has_kernel(terms: int | None, halve_last: bool) -> bool:
    """Whether there is a backward written by hand for this map."""
    return terms is None or (terms == 6 and halve_last)


def _formula(generator: Tensor, block_size: int, terms: int | None, halve_last: bool) -> Tensor:
    q_nbb = skew(generator, block_size)
    return cayley(q_nbb) if terms is None else cayley_neumann(q_nbb, terms, halve_last)


def _six_terms(q: Tensor, eye: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    """R = Q + U + MU with M = Q + Q^2 and U = I + QM, three products; and what the backward needs."""
    m = torch.baddbmm(q, q, q)
    u = torch.baddbmm(eye, q, m)
    return torch.baddbmm(q + u, m, u), (q, m, u)


def _six_terms_backward(grad: Tensor, q: Tensor, m: Tensor, u: Tensor) -> Tensor:
    du = torch.baddbmm(grad, m.mT, grad)
    dm = torch.baddbmm(torch.bmm(grad, u.mT), q, du, alpha=-1)  # Q^T = -Q
    dq = torch.baddbmm(grad + dm, du, m.mT)
    # Of dM Q + Q dM the skew part, which alone counts, is that of Q (dM + dM^T).
    return dq.baddbmm_(q, dm + dm.mT, alpha=-1)


def _exact(q: Tensor, eye: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    if q.is_cuda:
        r = cayley(q)
        return r, (r,)
    one_plus = q + eye
    solved: Tensor = torch.linalg.solve_ex(one_plus.mT, one_plus)[0]  # I - Q = (I + Q)^T
    # The step of Newton's method, as in `cayley`; of a rotation it is none, so the backward need not know of it.
    r = torch.baddbmm(solved, solved, torch.baddbmm(eye, solved.mT, solved, alpha=-1), alpha=0.5)
    return r, (r,)


def _exact_backward(grad: Tensor, r: Tensor, eye: Tensor) -> Tensor:
    """No solve, since (I - Q)^-1 = (I + R)/2."""
    half = torch.add(eye * 2**-0.5, r, alpha=2**-0.5).mT
    return torch.bmm(torch.bmm(half, grad), half)


class _Map(torch.autograd.Function):
    """Generators to rotations, several at once: keeps three matrices a block of the series, one of the exact map."""

    @staticmethod
    def forward(ctx: Any, b: int, is_exact: bool, dtype: torch.dtype, *generators: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.b, ctx.is_exact, ctx.generators, ctx.is_spent = b, is_exact, generators, False
        ctx.versions = _versions(generators)
        r, kept = _computed(generators, b, is_exact)
        ctx.save_for_backward(*kept)
        return torch.split(r.to(dtype), [len(generator) for generator in generators])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        generators, b = ctx.generators, ctx.b
        if (ctx.is_spent or torch.is_grad_enabled()) and _versions(generators) != ctx.versions:
            raise RuntimeError("generators of a rotation were changed between its forward and its second backward")
        if torch.is_grad_enabled():  # to be differentiated once more
            return None, None, None, *map(functools.partial(_differentiable, ctx), generators, grads)
        if all(grad is None for grad in grads):
            return None, None, None, *grads
        with full_float32(generators[0].device):
            kept = ctx.saved_tensors if not ctx.is_spent else _computed(generators, b, ctx.is_exact)[1]
            ctx.is_spent = True  # rotations that are shared may meet in two backwards: the second computes them again
            whole = [
                generator.new_zeros(len(generator), b, b) if grad is None else grad
                for generator, grad in zip(generators, grads, strict=True)
            ]
            grad_r = (whole[0] if len(whole) == 1 else torch.cat(whole)).to(kept[0].dtype)
            tables = _tables(b, grad_r.device, grad_r.dtype)
            dq = _exact_backward(grad_r, kept[0], tables.eye) if ctx.is_exact else _six_terms_backward(grad_r, *kept)
            found = (dq - dq.mT).flatten(1).index_select(1, tables.upper)
        pieces = torch.split(found, [len(generator) for generator in generators])
        return None, None, None, *(None if grad is None else piece for grad, piece in zip(grads, pieces, strict=True))


def _versions(generators: Sequence[Tensor]) -> list[int]:
    """What autograd counts of changes in place; a tensor of inference mode has no count."""
    return [0 if generator.is_inference() else generator._version for generator in generators]


def _computed(generators: Sequence[Tensor], b: int, is_exact: bool) -> tuple[Tensor, tuple[Tensor, ...]]:
    """R of all generators together, and what its backward needs."""
    joint = generators[0] if len(generators) == 1 else torch.cat(list(generators))
    tables = _tables(b, joint.device, joint.dtype)
    # Q by one gather and its signs.
    q = joint.index_select(1, tables.source).mul_(tables.sign).view(-1, b, b)
    return _exact(q, tables.eye) if is_exact else _six_terms(q, tables.eye)


def _differentiable(ctx: Any, generator: Tensor, grad: Tensor | None) -> Tensor | None:
    """The gradient of one generator by the plain formula, as something that can be differentiated."""
    if grad is None:
        return None
    with torch.enable_grad(), full_float32(generator.device):
        r_nbb = _formula(generator, ctx.b, None if ctx.is_exact else 6, True)
        (found,) = torch.autograd.grad(r_nbb, generator, grad.to(r_nbb.dtype), create_graph=True)
    return found
