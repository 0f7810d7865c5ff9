"""Products with block-diagonal rotations. Shapes: t rows, n blocks of size b, fan-in i = n*b, fan-out o."""

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_map_only

from lightning_oft.functional.geometry import inverse_of_positive
from lightning_oft.functional.maps import MatrixSource, inverse_transposed
from lightning_oft.functional.tracing import NOTHING, full_float32, is_recorded, is_traced, without_autocast

_SMALL_ON_CPU, _SMALL_ON_GPU = 2**19, 2**22
"""Numbers that are copied faster than it takes to avoid it: on a CPU torch multiplies blocks in a loop where their products
shall lie as x does, and a Function in Python costs more than the operators that torch differentiates itself (measured, on a
GPU with a step that waits for Python)."""
_WIDE = 3 * 2**15
"""Entries of R, 3,072 inputs in blocks of 32, of a layer beside which a few operators are nothing."""
_INVERSE = 4
"""Half of what R^-T of a layer by itself takes on a CPU, in products of a block with as many rows as it has (measured)."""
_FEW = 3 * 2**13
"""Entries of R, 768 inputs in blocks of 32, up to which R^-T of a layer by itself is worth a few operators more."""
_HEAVY = 2**20
"""Entries of a weight that takes a GPU longer than being told of a dozen operators."""
_LITTLE_BLOCK, _MANY_PIXELS, _MANY_ENTRIES = 32, 2**17, 3 * 2**17
"""Largest block, and fewest numbers of an input, and of a weight that is folded, which a CPU rotates faster by a convolution
(measured)."""
_IMAGE, _FEWEST_IMAGES = (8, 6, 5, 9, 4, 7, 11), 16
"""Rows of an image, the best first, and how many images torch leaves to oneDNN where there is a single thread."""


def _is_small(x: Tensor, entries: int) -> bool:
    """Whether x had better be copied: not a single row, which lies either way as it shall, nor one that would be copied
    and kept already before the product, nor beside a layer, of so many entries of R, that takes so long that nothing is
    gained."""
    most = _SMALL_ON_CPU if x.is_cpu else _SMALL_ON_GPU if x.is_cuda else 0
    return x.shape[-1] < x.numel() <= most and entries < _WIDE and x.is_contiguous()


def weight_is_cheaper(x: Tensor, weight: Tensor, block_size: int) -> bool:
    """Whether a training step costs less with the weight rotated than with its input. By counting, an input of t rows
    costs 3 t products with a block, a weight of o rows 2 o and t of them, and R^-T; so they meet at t = o + half of what
    R^-T takes. On a GPU, measured, at 1.5 o, where products take longer than launching them. x: (..., i), W: (o, i)."""
    fan_out, fan_in = weight.shape
    rows = x.numel() // fan_in
    if x.is_cuda:
        return 2 * rows >= 3 * fan_out and weight.numel() >= _HEAVY
    return rows >= fan_out + _INVERSE * block_size and not _is_small(x, fan_in * block_size)


def _rows_of_image(x: Tensor, block_size: int) -> int:
    """How many rows of x make an image for oneDNN's convolutions, in 0.55 to 0.8 of the time of torch's products (measured):
    so few lie in a core's first cache while all blocks are multiplied, where torch takes one block after another and for
    each all of x from memory. 0 where x had better be multiplied by torch."""
    is_fit = (
        x.is_cpu
        and x.dtype is torch.float32
        and block_size <= _LITTLE_BLOCK
        and x.numel() >= _MANY_PIXELS
        and x.is_contiguous()
        and torch._C._get_mkldnn_enabled()
        and _has_fast_convolutions()
    )
    if not is_fit:
        return 0
    rows = x.numel() // x.shape[-1]
    several = torch.get_num_threads() > 1
    found = next((one for one in _IMAGE if rows % one == 0), rows if several else 0)
    return found if several or found * _FEWEST_IMAGES <= rows else 0


@functools.cache
def _has_fast_convolutions() -> bool:
    is_vectorized = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
    return is_vectorized and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]


def _plain_product(x: Tensor, r_nbb: Tensor) -> Tensor:
    n, b, _ = r_nbb.shape
    if n == 1:
        return (x.reshape(-1, b) @ r_nbb[0]).view(x.shape)
    return torch.bmm(x.reshape(-1, n, b).transpose(0, 1), r_nbb).transpose(0, 1).reshape(x.shape)


def _product(x: Tensor, r_nbb: Tensor) -> Tensor:
    """x: (..., n*b) times the blocks of R: (n or 1, b, b), without a transposed copy of what comes out."""
    n, b, _ = r_nbb.shape
    if n == 1:
        return _plain_product(x, r_nbb)
    if rows := _rows_of_image(x, b):
        return _convolution(x, r_nbb, rows)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    torch.bmm(x.reshape(-1, n, b).transpose(0, 1), r_nbb, out=out.view(-1, n, b).transpose(0, 1))
    return out


def _convolution(x: Tensor, r_nbb: Tensor, rows: int) -> Tensor:
    """The same with rows as pixels of images and blocks as groups of channels; neither R nor its transpose is copied."""
    n, b, _ = r_nbb.shape
    pixels = x.as_strided((x.numel() // (rows * n * b), n * b, 1, rows), (rows * n * b, 1, rows * n * b, n * b))
    if r_nbb.is_contiguous():
        turned = torch.conv_transpose2d(pixels, r_nbb.view(n * b, b, 1, 1), groups=n)
    else:
        turned = torch.conv2d(pixels, r_nbb.mT.reshape(n * b, b, 1, 1), groups=n)
    return turned.permute(0, 2, 3, 1).reshape(x.shape)


def _outer(x: Tensor, grad: Tensor, r_nbb: Tensor) -> Tensor:
    """Gradient of the blocks, x^T grad of each: (..., n*b) twice -> (n or 1, b, b)."""
    n, b, _ = r_nbb.shape
    return torch.bmm(x.reshape(-1, n, b).permute(1, 2, 0), grad.reshape(-1, n, b).transpose(0, 1))


def _keep(ctx: Any, r_nbb: Tensor, *tensors: Tensor) -> None:
    """Keep tensors for the backward, and R last where its map does not compute it again."""
    ctx.source = MatrixSource.of(r_nbb)
    ctx.computes_again = ctx.source is not None and ctx.source.computes_again
    ctx.save_for_backward(*tensors, *(() if ctx.computes_again else (r_nbb,)))


def _kept(ctx: Any) -> tuple[Tensor, ...]:
    return (*ctx.saved_tensors, ctx.source.matrix()) if ctx.computes_again else ctx.saved_tensors


class _Rotate(torch.autograd.Function):
    """x . blockdiag(R) that keeps x and R for backward and nothing else; differentiable twice."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, r_nbb: Tensor) -> Tensor:
        # With a separate setup_context torch binds the arguments by signature, at more cost than a small product.
        _keep(ctx, r_nbb, x)
        with without_autocast(x):
            return _product(x, r_nbb)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, r_nbb = _kept(ctx)
        grad_x = grad_r = None
        if ctx.needs_input_grad[0]:
            grad_x = rotate(grads[0], r_nbb.mT)
        if ctx.needs_input_grad[1]:
            with without_autocast(x):
                grad_r = _outer(x, grads[0], r_nbb)
        return grad_x, grad_r


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """Rotate the last dimension, x . blockdiag(R). x: (..., n*b), R: (n, b, b) or (1, b, b) shared -> (..., n*b).
    Both of one floating dtype. Raises ValueError where the last dimension is not n*b."""
    n, b, _ = rotation.shape
    fan_in = x.shape[-1] if x.dim() else 0
    if (fan_in != n * b) if n > 1 else (fan_in == 0 or fan_in % b != 0):
        raise ValueError(f"cannot rotate an input of shape {tuple(x.shape)}: its last dimension must be {n * b}")
    without = without_autocast(x)
    # Whether it is traced is asked first: a size that is compared becomes a condition of the traced code.
    if is_traced(x, rotation) or (without is NOTHING and _is_small(x, rotation.numel())):
        with without:
            return _plain_product(x, rotation)
    if is_recorded() and (x.requires_grad or rotation.requires_grad):
        return _Rotate.apply(x, rotation)  # type: ignore[no-any-return, no-untyped-call]
    with without:
        return _product(x, rotation)


def rotate_weight(weight: Tensor, rotation: Tensor, out: Tensor | None = None) -> Tensor:
    """Rotate a weight as its inputs would be, W . blockdiag(R)^T. W: (o, i), R: (n or 1, b, b) -> (o, i).

    Into `out`, of any floating dtype, where given, which may be W itself. Fastest for some rows at a time: they, their
    product and its copy stay in a core's cache. Raises RuntimeError where the fan-in is not n*b.
    """
    blocks_onb = weight.view(weight.shape[0], -1, rotation.shape[-1])
    with full_float32(weight):
        if rotation.shape[0] == 1:
            turned_onb = blocks_onb @ rotation[0].mT
        elif weight.numel() >= _MANY_ENTRIES and (rows := _rows_of_image(weight, rotation.shape[-1])):
            turned_onb = _convolution(weight, rotation.mT, rows).view(blocks_onb.shape)
        else:
            blocks_nob = blocks_onb.transpose(0, 1)
            if weight.device.type == "cpu" and weight.stride(1) == 1:  # it multiplies blocks that lie together faster
                blocks_nob = blocks_nob.contiguous()
            turned_onb = torch.bmm(blocks_nob, rotation.mT).transpose(0, 1)
    if out is None:
        return turned_onb.reshape(weight.shape)
    out.view(turned_onb.shape).copy_(turned_onb)
    return out


def inverse(rotation: Tensor) -> Tensor:
    """R^-1 of any invertible R, in float64. (n, b, b) -> (n, b, b).

    A truncated series is not exactly orthogonal, so R^T would not do; rotate_weight with it undoes rotate_weight."""
    inverted: Tensor = torch.linalg.inv(rotation.double())
    return inverted


class _RotatedLinear(torch.autograd.Function):
    """(x . blockdiag(R)) W^T + bias with the weight rotated instead of the input, afresh in backward: keeps x and R."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, r_nbb: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        _keep(ctx, r_nbb, x, weight)
        return F.linear(x, _product(weight, r_nbb.mT), bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, r_nbb = _kept(ctx)
        grad, grad_bias = grads[0], None
        if ctx.needs_input_grad[3]:
            grad_bias = grad.flatten(0, -2).sum(0)
        with without_autocast(x):
            if torch.is_grad_enabled():  # to be differentiated once more
                through = grad @ weight
                return rotate(through, r_nbb.mT), _outer(x, through, r_nbb), None, grad_bias
            grad_x = grad @ _product(weight, r_nbb.mT)
            if not ctx.needs_input_grad[1]:
                return grad_x, None, None, grad_bias
            # x^T (grad W) = x^T (grad W') R^-T, for grad W' = grad W R^T is at hand.
            outer, inverted = _outer(x, grad_x, r_nbb), ctx.source.inverse() if ctx.source else None
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
            return F.linear(x, _product(weight, rotation.mT), bias)
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
