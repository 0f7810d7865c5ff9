"""From generators to rotations as plain formulas, how far one turns, how far it is from orthogonal, and the ball that
holds it (COFT). All but what works in place is differentiable by torch, as often as one likes."""

import functools
import itertools
import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from lightning_oft.functional.tracing import full_float32

SERIES_TOLERANCE = 1e-6
"""Largest ||R^T R - I||_2 of a truncated series that passes without a word: float32's own accuracy."""

EXACT_RADIUS = math.sqrt(2) * 10.0
"""Radius in ||Q_i||_F of the ball in which a plain float32 solve of the exact map, such as PEFT's, is good to 1e-5:
planes turn by up to 169 degrees. Beyond it a generator can hardly turn its rotation any further."""


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


def inverse_transposed(r_nbb: Tensor) -> Tensor:
    """R^-T of any invertible R, (n, b, b), float32 or wider; asks how far R is from a rotation, which waits for the device."""
    eye = torch.eye(r_nbb.shape[-1], dtype=r_nbb.dtype, device=r_nbb.device)
    off = torch.baddbmm(eye, r_nbb.mT, r_nbb, beta=-1)
    # R^-T = R (I + off)^-1, to which R (I - off) is equal but for off^2.
    low, high = off.aminmax()  # in a tenth of the time of a norm
    if max(-float(low), float(high)) * len(eye) < torch.finfo(r_nbb.dtype).eps ** 0.5:
        return torch.baddbmm(r_nbb, r_nbb, off, alpha=-1)
    inverted: Tensor = torch.linalg.inv_ex(r_nbb)[0]
    return inverted.mT


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


def formula(generator: Tensor, block_size: int, terms: int | None, halve_last: bool) -> Tensor:
    """R of a generator, (n, b(b-1)/2) -> (n, b, b): exact where `terms` is None."""
    q_nbb = skew(generator, block_size)
    return cayley(q_nbb) if terms is None else cayley_neumann(q_nbb, terms, halve_last)


def generator_size(block_size: int) -> int:
    """Number of free entries of one skew block, b(b-1)/2."""
    return block_size * (block_size - 1) // 2


def block_size_of(generator_size: int) -> int:
    """Block size b whose generator has b(b-1)/2 entries. Raises ValueError where there is none."""
    b = (1 + math.isqrt(1 + 8 * generator_size)) // 2
    if b * (b - 1) // 2 != generator_size:
        raise ValueError(f"{generator_size} is not b(b-1)/2 for any block size b")
    return b


def series_error(norm: float, terms: int) -> float:
    """Bound of ||R_k^T R_k - I||_2 for a truncated series of `terms` terms at t = ||Q||_2 = `norm`."""
    if terms <= 2:
        return 0.0 if terms <= 1 or norm == 0 else 4 * norm**2
    k = max(terms, 4)
    power = norm ** (k - 1) if norm < 1e6 else math.inf
    return power**2 if k % 2 == 0 else 2 * power + power**2


def series_reach(terms: int, tolerance: float = SERIES_TOLERANCE, halve_last: bool = True) -> float:
    """Largest t = ||Q||_2 at which a series of `terms` terms stays within `tolerance`; the inverse of series_error.

    Where the last term is not halved the error is below 4 t^k for even k and below 4 t^(k+1) for odd k.
    """
    if terms <= 1:
        return math.inf
    if not halve_last:
        return float((tolerance / 4) ** (1 / (terms + terms % 2)))
    if terms == 2:
        return math.sqrt(tolerance) / 2
    k = max(terms, 4)
    power = math.sqrt(tolerance) if k % 2 == 0 else math.sqrt(1 + tolerance) - 1
    return float(power ** (1 / (k - 1)))


def reach_radius(terms: int, halve_last: bool = True) -> float:
    """Radius in ||Q_i||_F of the ball in which a series is orthogonal to SERIES_TOLERANCE, with room for float32's
    rounding, which adds up to 1.2e-7 (measured): sqrt(2) of its reach."""
    return math.sqrt(2) * series_reach(terms, 0.8 * SERIES_TOLERANCE, halve_last)


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
    rounding never leaves it outside. On a CPU nothing is written where nothing is outside, so that autograd counts no
    change between a forward and its backward. Qiu et al. 2023, section 3.3 (COFT).
    """
    norm = frobenius_norm(generator)[:, None]
    outside = norm > radius
    if not _is_told(generator) and not outside.any():
        return generator
    return generator.mul_(torch.where(outside, radius * (1 - 1e-6) / norm, 1.0))


@torch.no_grad()
def project_all(generators: Sequence[Tensor], radius: float) -> None:
    """`project` of several generators, each (n_i, m_i); on a GPU by a dozen operators for all of one block size."""
    for places in _groups(generators):
        ones = [generators[place] for place in places]
        if len(ones) == 1:
            project(ones[0], radius)
            continue
        joint = torch.cat(ones)
        project(joint, radius)
        torch._foreach_copy_(ones, list(torch.split(joint, [len(one) for one in ones])))


@torch.no_grad()
def largest_norms(generators: Sequence[Tensor]) -> Tensor:
    """The largest ||Q_i||_F of each generator, (n_i, m_i) -> (generators,), on the device of the first; infinite where one
    is not finite, 0 where it has no blocks. On a GPU computed together."""
    found = [generators[0].new_zeros(())] * len(generators)
    for places in _groups(generators):
        ones = [generators[place] for place in places]
        if len(ones) == 1:
            largest = torch.linalg.vector_norm(ones[0], dim=-1).amax()[None]
        else:
            norms = torch.linalg.vector_norm(torch.cat(ones), dim=-1)
            largest = norms.take(_rows(tuple(len(one) for one in ones), norms.device)).amax(1)
        for place, norm in zip(places, largest.to(found[0].device).unbind(), strict=True):
            found[place] = norm
    return (math.sqrt(2) * torch.stack(found)).nan_to_num(nan=math.inf, posinf=math.inf)


_TOGETHER = 2**24
"""Entries of generators that are copied side by side at a time."""


def _groups(generators: Sequence[Tensor]) -> Iterator[list[int]]:
    """Places of generators that had better lie in one tensor, as it takes longer to tell a GPU than to do it; on a CPU each
    by itself, as copies cost more. Those without blocks are in none."""
    alike: dict[object, list[int]] = {}
    for place, one in enumerate(generators):
        if one.numel():
            alike.setdefault((one.shape[1], one.dtype, one.device) if _is_told(one) else place, []).append(place)
    for places in alike.values():
        ends = itertools.accumulate(generators[place].numel() for place in places)
        for _, pairs in itertools.groupby(zip(places, ends, strict=True), lambda pair: pair[1] // _TOGETHER):
            yield [place for place, _ in pairs]


def _is_told(tensor: Tensor) -> bool:
    """Whether operators on the tensor are queued for a device."""
    return tensor.device.type != "cpu"


@functools.lru_cache(maxsize=64)
def _rows(sizes: tuple[int, ...], device: torch.device) -> Tensor:
    """Which rows of a joint tensor are each part's, (parts, the largest size); of a smaller one the last ones again."""
    with torch.inference_mode(False):
        ends = torch.tensor(list(itertools.accumulate(sizes)))[:, None]
        within = torch.minimum(torch.arange(max(sizes)), torch.tensor(sizes)[:, None] - 1)
        return (ends - torch.tensor(sizes)[:, None] + within).to(device)


def orthogonality_error(rotation: Tensor) -> Tensor:
    """Spectral norm of R^T R - I of each block. R: (n, b, b) -> (n,)."""
    eye = torch.eye(rotation.shape[-1], dtype=rotation.dtype, device=rotation.device)
    error: Tensor = torch.linalg.matrix_norm(rotation.mT @ rotation - eye, 2)
    return error


def rotation_angle(rotation: Tensor) -> Tensor:
    """Largest angle in degrees by which each block turns a plane. R: (n, b, b) -> (n,), each in [0, 180]."""
    angles: Tensor = torch.linalg.eigvals(rotation).angle().abs().amax(-1)
    return torch.rad2deg(angles)


def error_bound(generator: Tensor, block_size: int, terms: int | None, halve_last: bool = True) -> float:
    """Upper bound of ||R^T R - I||_2 over the blocks of a generator, (n, b(b-1)/2); 0 where `terms` is None, which is
    the exact map. Waits for the device."""
    if terms is None or generator.numel() == 0:
        return 0.0
    if not halve_last:
        with full_float32(generator):
            return float(orthogonality_error(formula(generator, block_size, terms, halve_last)).max())
    norm = float(frobenius_norm(generator).max()) / 2**0.5
    if series_error(norm, terms) > SERIES_TOLERANCE:  # the exact norm costs more
        norm = float(torch.linalg.matrix_norm(skew(generator, block_size), 2).max())
    return series_error(norm, terms)


@torch.no_grad()
def exact_generator(generator: Tensor, block_size: int, terms: int, halve_last: bool = True) -> Tensor:
    """The generator by which the exact Cayley map turns as a truncated series does by this one.

    The two maps of one generator differ by t^(k-1), t = ||Q||_2: by 1e-3 at the reach of k = 6, where the series is
    orthogonal to 1e-6, since Cayley(Q) (I - Q^5) turns a little less. Its rotation is Cayley(Q'), where Q' is the skew
    part of (R_k - I)(R_k + I)^-1, up to its own orthogonality error; ||Q' - Q||_2 is below t^(k-1). A block beyond the
    reach, where the series is no rotation, is moved as if it lay on its edge. Computed in float64.
    (n, b(b-1)/2) -> the same, of the same dtype.
    """
    q = skew(generator.double(), block_size)
    norm = torch.linalg.matrix_norm(q, 2)
    inside = (series_reach(terms, halve_last=halve_last) / norm).clamp(max=1).nan_to_num(1.0)[:, None, None]
    generator_in, eye = generator.double() * inside[:, 0], torch.eye(block_size, dtype=q.dtype, device=q.device)
    r_nbb = formula(generator_in, block_size, terms, halve_last)
    whole = torch.linalg.solve(r_nbb + eye, r_nbb - eye)
    moved = (whole - whole.mT) / 2 - q * inside
    rows, columns = torch.triu_indices(block_size, block_size, 1, device=q.device)
    exact: Tensor = generator.double() + moved[:, rows, columns]
    return exact.to(generator.dtype)
