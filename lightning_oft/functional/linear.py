"""F.linear of a rotated input, by way of its weight rotated instead. Shapes: n blocks of size b, fan-in i = n*b, fan-out o."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_map_only

from lightning_oft.functional.geometry import inverse_of_positive, inverse_transposed
from lightning_oft.functional.products import (
    block_gradient,
    columns,
    columns_are_exact,
    has_avx512,
    keep,
    kept,
    product,
    rotate,
)
from lightning_oft.functional.tracing import is_recorded, without_autocast

_FEW = 3 * 2**13
"""Entries of R, 768 inputs in blocks of 32, up to which R^-T of a layer by itself is worth a few operators more."""
_SMALL_WEIGHT = 2**20
"""Entries of a weight up to which a CPU rotates it faster by columns than by convolutions; not one thread of AVX512 (measured)."""


def _rotated_matrix(x: Tensor, weight: Tensor, r_nbb: Tensor) -> Tensor:
    """W . blockdiag(R)^T for a product with x, which reads it by rows or by columns."""
    is_small = weight.is_cpu and weight.numel() <= _SMALL_WEIGHT and len(r_nbb) > 1 and weight.is_contiguous()
    is_faster = is_small and not (has_avx512() and torch.get_num_threads() == 1)
    if is_faster and columns_are_exact(x, len(weight)):
        return columns(weight, r_nbb.mT)
    return product(weight, r_nbb.mT)


class _RotatedLinear(torch.autograd.Function):
    """(x . blockdiag(R)) W^T + bias with the weight rotated instead of the input, afresh in backward: keeps x and R."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, r_nbb: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        keep(ctx, r_nbb, x, weight)
        return F.linear(x, _rotated_matrix(x, weight, r_nbb), bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, r_nbb = kept(ctx)
        grad, grad_bias = grads[0], None
        if ctx.needs_input_grad[3]:
            grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0)
        with without_autocast(x):
            if torch.is_grad_enabled():  # to be differentiated once more
                through = grad @ weight
                return rotate(through, r_nbb.mT), block_gradient(x, through, r_nbb), None, grad_bias
            grad_x = grad @ _rotated_matrix(x, weight, r_nbb)
            if not ctx.needs_input_grad[1]:
                return grad_x, None, None, grad_bias
            # x^T (grad W) = x^T (grad W') R^-T, for grad W' = grad W R^T is at hand.
            outer, inverted = block_gradient(x, grad_x, r_nbb), ctx.source.inverse(r_nbb) if ctx.source else None
            grad_r = _times_inverse(outer, r_nbb) if inverted is None else torch.bmm(outer, inverted)
        return grad_x, grad_r, None, grad_bias


def _times_inverse(outer: Tensor, r_nbb: Tensor) -> Tensor:
    """outer R^-T of any invertible R, in float32 or wider."""
    if outer.is_cuda:
        return positive_times_inverse(outer, r_nbb)
    wide = torch.float64 if outer.dtype == torch.float64 else torch.float32
    outer_nbb, r = outer.to(wide), r_nbb.to(wide)
    if type(outer) is Tensor and outer.is_cpu and outer.numel() <= _FEW:
        return torch.bmm(outer_nbb, inverse_transposed(r)).to(outer.dtype)
    solved: Tensor = torch.linalg.solve_ex(r, outer_nbb.mT)[0]
    return solved.mT.to(outer.dtype)


def positive_times_inverse(outer: Tensor, r_nbb: Tensor) -> Tensor:
    """outer R^-T as outer R (R^T R)^-1 in float64, which on a GPU waits for nothing; see `positive_cayley`."""
    r = r_nbb.double()
    return (outer.double() @ r @ inverse_of_positive(r.mT @ r)).to(outer.dtype)


def rotated_linear(x: Tensor, rotation: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """linear(x . blockdiag(R), W, bias) by way of the rotated weight: cheaper where x has more rows than the fan-out.

    Args:
        x: (..., n*b).
        rotation: R, (n, b, b), invertible.
        weight: W, (o, n*b), frozen: it gets no gradient.
        bias: (o,).

    Returns:
        (..., o). All of one floating dtype. Differentiable in x, R and the bias, as often as one likes.
    """
    with without_autocast(x):
        if not is_recorded():
            return F.linear(x, _rotated_matrix(x, weight, rotation), bias)
        return _RotatedLinear.apply(x, rotation, weight, bias)  # type: ignore[no-any-return, no-untyped-call]


class RotatedInput(Tensor):
    """x . blockdiag(R), not computed yet: F.linear rotates its weight instead, anything else finds the product.

    The tensor itself is empty, so that what reads it past torch's functions fails and never sees an input unrotated.
    """

    _x: Tensor
    _r_nbb: Tensor
    _product: Tensor | None

    @classmethod
    def of(cls, x: Tensor, rotation: Tensor) -> "RotatedInput":
        """x: (..., n*b), R: (n, b, b) or (1, b, b)."""
        made = torch.empty(0).as_subclass(cls)
        made._x, made._r_nbb, made._product = x, rotation, None
        return made

    def product(self) -> Tensor:
        """The rotated input as an ordinary tensor, computed once."""
        if self._product is None:
            self._product = rotate(self._x, self._r_nbb)
        return self._product

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            if func is F.linear and not kwargs and type(args[0]) is cls and args[0]._product is None:
                return rotated_linear(args[0]._x, args[0]._r_nbb, *args[1:])
            args, kwargs = tree_map_only(cls, cls.product, (args, kwargs or {}))
            return func(*args, **kwargs)
