"""From generators to rotations, several at once: each map with a backward written by hand.

Where torch.compile or torch.func look on, and for derivatives of derivatives, the plain formulas are used instead.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_oft.functional.geometry import cayley, formula, inverse_transposed
from lightning_oft.functional.tracing import NOTHING, full_float32, is_checkpointed, is_traced


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
    with full_float32(generator):
        return formula(generator, block_size, terms, halve_last)


def rotations_of(
    generators: Sequence[Tensor], block_size: int, terms: int | None, dtype: torch.dtype, whole: bool = False
) -> list[Tensor]:
    """R of several generators of one block size by one map. Only where `has_kernel`, and nothing is traced.

    Args:
        generators: each (n_i, b(b-1)/2), of one dtype and device.
        block_size: b.
        terms: 6, or None for the exact map.
        dtype: of the result.
        whole: whether the generators can be read in the backward as they are now, so that the matrices which it needs
            need not be kept where they are large, or an activation checkpoint would ask for as many once more. As of
            any weight, what changes them past autograd's count in between (`.data`, a fused optimizer) is not seen.

    Returns:
        (n_i, b, b) of `dtype` for each. One that does not reach a loss gets no gradient. Backward may run through them
        as often as one likes while the generators stay as they are, with or without `retain_graph`.
    """
    unrecorded = torch.no_grad() if torch.is_inference_mode_enabled() else NOTHING  # whatever was enabled within
    with full_float32(generators[0]), unrecorded:
        is_large = block_size**2 * sum(map(len, generators)) >= _LARGE
        is_small = not is_large or (terms is None and dtype is generators[0].dtype)  # R alone, as products do
        keeps = not whole or (is_small and not is_checkpointed())
        return list(_Map.apply(block_size, terms is None, dtype, keeps, *generators))  # type: ignore[no-untyped-call]


_LARGE = 2**19
"""Entries of R from which the backward computes again what it needs: 13 kB a token of a Llama layer of 4096/11008."""


def has_kernel(terms: int | None, halve_last: bool) -> bool:
    """Whether there is a backward written by hand for this map."""
    return terms is None or (terms == 6 and halve_last)


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


def _six_parts(q: Tensor, eye: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Q, M = Q + Q^2 and U = I + QM, of which R = Q + U + MU: what its backward needs."""
    m = torch.baddbmm(q, q, q)
    return q, m, torch.baddbmm(eye, q, m)


def _six_terms_backward(grad: Tensor, q: Tensor, m: Tensor, u: Tensor) -> Tensor:
    """Gradient of Q, of which the skew part counts. In few new matrices, each of which costs a CPU up to half a product."""
    du = torch.baddbmm(grad, m.mT, grad)
    dm = torch.bmm(grad, u.mT).baddbmm_(q, du, alpha=-1)  # Q^T = -Q
    # Of dM Q + Q dM the skew part, which alone counts, is that of Q (dM + dM^T).
    symmetric = dm + dm.mT
    return dm.add_(grad).baddbmm_(du, m.mT).baddbmm_(q, symmetric, alpha=-1)


def _six_terms_rotate(q: Tensor, m: Tensor, u: Tensor) -> bool:
    """Whether R is a rotation but for rounding. It is the exact map's times I - Q^5, so R^T R = I - (Q^2)^5, and the
    eigenvalues of Q^2 come in pairs."""
    square = float(torch.linalg.vector_norm(m - q, dim=(1, 2)).amax()) / 2**0.5
    return square < torch.finfo(q.dtype).eps ** 0.2


def _exact(q: Tensor, eye: Tensor) -> Tensor:
    if q.is_cuda:
        return cayley(q)
    one_plus = q + eye
    solved: Tensor = torch.linalg.solve_ex(one_plus.mT, one_plus)[0]  # I - Q = (I + Q)^T
    # The step of Newton's method, as in `cayley`; of a rotation it is none, so the backward need not know of it.
    return torch.baddbmm(solved, solved, torch.baddbmm(eye, solved.mT, solved, alpha=-1), alpha=0.5)


def _exact_backward(grad: Tensor, r: Tensor, eye: Tensor) -> Tensor:
    """No solve, since (I - Q)^-1 = (I + R)/2."""
    half = torch.add(eye * 2**-0.5, r, alpha=2**-0.5).mT
    return torch.bmm(torch.bmm(half, grad), half)


class _Map(torch.autograd.Function):
    """Generators to rotations, several at once: keeps what `_parts` finds, or computes it again."""

    @staticmethod
    def forward(
        ctx: Any, b: int, is_exact: bool, dtype: torch.dtype, keeps: bool, *generators: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.b, ctx.is_exact, ctx.generators, ctx.keeps, ctx.dtype = b, is_exact, generators, keeps, dtype
        ctx.is_spent, ctx.kept, ctx.left = False, None, {*range(len(generators))}
        ctx.again = ctx.inverses = None
        # A checkpoint computes with generators as they are then, as with any other weight.
        ctx.versions = None if is_checkpointed() else _versions(generators)
        parts = _parts(ctx, range(len(generators)))
        ctx.save_for_backward(*(parts if keeps else ()))
        return _matrices(ctx, parts, range(len(generators)))

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        generators, b = ctx.generators, ctx.b
        places = [place for place, grad in enumerate(grads) if grad is not None]
        kept = _kept_parts(ctx, places)
        if torch.is_grad_enabled():  # to be differentiated once more
            _require_same(ctx, places)
            return *_NO_GRADIENTS, *map(functools.partial(_differentiable, ctx), generators, grads)
        if not places:
            return *_NO_GRADIENTS, *grads
        with full_float32(generators[0]):
            at, parts = ([*range(len(grads))], kept) if kept is not None else _parts_again(ctx, places)
            rows = [len(generators[place]) for place in at]
            pairs = zip([grads[place] for place in at], rows, strict=True)
            every = [generators[0].new_zeros(n, b, b) if grad is None else grad for grad, n in pairs]
            grad_r = (every[0] if len(every) == 1 else torch.cat(every)).to(generators[0].dtype)
            tables = _tables(b, grad_r.device, grad_r.dtype)
            dq = _exact_backward(grad_r, parts[0], tables.eye) if ctx.is_exact else _six_terms_backward(grad_r, *parts)
            found = (dq - dq.mT).reshape(-1, b * b).index_select(1, tables.upper)
        pieces = dict(zip(at, torch.split(found, rows), strict=True))
        return *_NO_GRADIENTS, *(None if grad is None else pieces[place] for place, grad in enumerate(grads))


def _kept_parts(ctx: Any, places: Sequence[int]) -> Any:
    """What was kept, for the rotations at these places; None where nothing was, or all have been through a backward.
    Rotations may meet in several, and autograd lets go of what it saved in the first."""
    parts = ctx.kept if ctx.is_spent or not ctx.keeps else ctx.saved_tensors
    ctx.is_spent, ctx.inverses = True, None
    ctx.left.difference_update(places)
    ctx.kept = parts if ctx.left else None
    return parts


def _parts_again(ctx: Any, places: Sequence[int]) -> tuple[Any, Any]:
    """The places of the rotations whose parts are computed again, and these."""
    _require_same(ctx, places)
    again, ctx.again = _again(ctx), None
    return again[:2] if again is not None else (places, _parts(ctx, places))


def _again(ctx: Any) -> Any:
    """What a product has computed again, if the generators are still those."""
    return ctx.again if ctx.again is not None and ctx.again[3] == _versions(ctx.generators) else None


_NO_GRADIENTS = (None,) * 4  # of what is not a generator


class MatrixSource(NamedTuple):
    """Where one R comes from, for a backward that needs it."""

    node: Any
    place: int

    @classmethod
    def of(cls, r_nbb: Tensor) -> "MatrixSource | None":
        """That of an R as its map gave it; None for any other."""
        node: Any = r_nbb.grad_fn
        return cls(node, r_nbb.output_nr) if getattr(node, "_forward_cls", None) is _Map else None

    @property
    def computes_again(self) -> bool:
        """Whether R is a copy in another precision and not worth keeping."""
        return not self.node.keeps and self.is_copy

    @property
    def is_copy(self) -> bool:
        """Whether R has another precision than its generator."""
        return self.node.dtype is not self.node.generators[0].dtype

    def inverse(self, r_nbb: Tensor) -> Tensor | None:
        """R^-T, (n, b, b), which is R but for rounding or computed with all those of the map when the first of them is asked
        for; None where R is a copy, not on a CPU, or the map has not kept what it was made of."""
        node = self.node
        # What an activation checkpoint keeps may be read only once.
        if self.is_copy or not node.keeps or node.versions is None or not node.generators[0].is_cpu:
            return None
        if node.inverses is None:
            parts = node.kept if node.is_spent else node.saved_tensors
            if parts is None:
                return None
            are_rotations = node.is_exact or _six_terms_rotate(*parts)
            joint = None if are_rotations else inverse_transposed(_joint(node, parts))
            node.inverses = () if joint is None else _apart(node, joint, range(len(node.generators)))
        return node.inverses[self.place] if node.inverses else r_nbb

    def matrix(self) -> Tensor:
        """R once more, computed together with those of its map; differentiable where gradients are recorded."""
        node = self.node
        _require_same(node, [self.place])
        again = None if torch.is_grad_enabled() else _again(node)
        if again is not None and self.place in again[2]:
            return again[2][self.place]  # type: ignore[no-any-return]
        generators, terms = node.generators, None if node.is_exact else 6
        with full_float32(generators[0]):
            if torch.is_grad_enabled():
                return formula(generators[self.place], node.b, terms, True).to(node.dtype)
            now = _versions(generators)
            same = [at for at, version in enumerate(now) if version == (node.versions or now)[at]]
            parts = _parts(node, same)
            found = dict(zip(same, _matrices(node, parts, same), strict=True))
            node.again = same, parts, found, now  # until its own backward takes them
        return found[self.place]


def _require_same(ctx: Any, places: Sequence[int]) -> None:
    now, before = _versions(ctx.generators), ctx.versions
    if before is not None and any(now[place] != before[place] for place in places):
        which = "second backward" if ctx.keeps else "backward"
        raise RuntimeError(f"generators of a rotation were changed between its forward and its {which}")


def _joint(ctx: Any, parts: tuple[Tensor, ...]) -> Tensor:
    """R of all blocks whose parts these are."""
    return parts[0] if ctx.is_exact else (parts[0] + parts[2]).baddbmm_(*parts[1:])


def _apart(ctx: Any, joint_nbb: Tensor, places: Sequence[int]) -> tuple[Tensor, ...]:
    """The blocks of each of the generators at these places."""
    return torch.split(joint_nbb, [len(ctx.generators[place]) for place in places])


def _matrices(ctx: Any, parts: tuple[Tensor, ...], places: Sequence[int]) -> tuple[Tensor, ...]:
    """R of each of the generators at these places."""
    return _apart(ctx, _joint(ctx, parts).to(ctx.dtype), places)


def _versions(generators: Sequence[Tensor]) -> list[int]:
    """What autograd counts of changes in place; a tensor of inference mode has no count."""
    return [0 if generator.is_inference() else generator._version for generator in generators]


def _parts(ctx: Any, places: Sequence[int]) -> tuple[Tensor, ...]:
    """What R of the generators at these places is made of: (R,) of the exact map, (Q, M, U) of the series."""
    generators = [ctx.generators[place] for place in places]
    joint = generators[0] if len(generators) == 1 else torch.cat(generators)
    tables = _tables(ctx.b, joint.device, joint.dtype)
    # Q by one gather and its signs.
    q = joint.index_select(1, tables.source).mul_(tables.sign).view(-1, ctx.b, ctx.b)
    return (_exact(q, tables.eye),) if ctx.is_exact else _six_parts(q, tables.eye)


def _differentiable(ctx: Any, generator: Tensor, grad: Tensor | None) -> Tensor | None:
    """The gradient of one generator by the plain formula, as something that can be differentiated."""
    if grad is None:
        return None
    with torch.enable_grad(), full_float32(generator):
        r_nbb = formula(generator, ctx.b, None if ctx.is_exact else 6, True)
        (found,) = torch.autograd.grad(r_nbb, generator, grad.to(r_nbb.dtype), create_graph=True)
    return found
