"""Products with block-diagonal rotations. Shapes: t rows, n blocks of size b, fan-in i = n*b, fan-out o."""

import functools
from typing import Any

import torch
from torch import Tensor

from lightning_oft.functional.maps import MatrixSource
from lightning_oft.functional.tracing import NOTHING, full_float32, is_batched, is_recorded, is_traced, without_autocast

_SMALL_ON_CPU, _SMALL_ON_GPU = 2**19, 2**22
"""Numbers that are copied faster than it takes to write them by rows at once: on a CPU torch multiplies blocks in a loop where
their products shall lie as x does, and a Function in Python costs more than the operators that torch differentiates itself (measured, on a
GPU with a step that waits for Python)."""
_WIDE = 3 * 2**15
"""Entries of R, 3,072 inputs in blocks of 32, of a layer beside which a few operators are nothing."""
_INVERSE = 4
"""Half of what R^-T of a layer by itself takes on a CPU, in products of a block with as many rows as it has (measured)."""
_HEAVY = 2**20
"""Entries of a weight that takes a GPU longer than being told of a dozen operators."""
_LITTLE_BLOCK, _MANY_PIXELS, _MANY_ENTRIES = 32, 2**17, 3 * 2**17
"""Largest block, and fewest numbers of an input, and of a weight that is folded, which a CPU rotates faster by a convolution
(measured)."""
_MANY_ROWS = 64
"""Rows of x and of a weight from which on torch multiplies them as it does larger ones; 12 were too few (measured)."""
_IMAGE, _FEWEST_IMAGES = (8, 6, 5, 9, 4, 7, 11), 16
"""Rows of an image, the best first, and how many images torch leaves to oneDNN where there is a single thread."""
_ROWS_OF_GRADIENT, _ENTRIES_OF_GRADIENT = 2**10, 2**20
"""Rows of x, and numbers, from which on AVX512 sums up a gradient of R faster by a convolution (measured)."""


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
def has_avx512() -> bool:
    """Whether torch multiplies with AVX512, of which some ways are faster that are slower with AVX2."""
    return torch.backends.cpu.get_cpu_capability() == "AVX512"


@functools.cache
def _has_fast_convolutions() -> bool:
    is_vectorized = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
    return is_vectorized and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]


def _plain_product(x: Tensor, r_nbb: Tensor) -> Tensor:
    n, b, _ = r_nbb.shape
    if n == 1:
        return (x.reshape(-1, b) @ r_nbb[0]).view(x.shape)
    return torch.bmm(x.reshape(-1, n, b).transpose(0, 1), r_nbb).transpose(0, 1).reshape(x.shape)


def product(x: Tensor, r_nbb: Tensor) -> Tensor:
    """x: (..., n*b) times the blocks of R: (n or 1, b, b), without a transposed copy of what comes out."""
    n, b, _ = r_nbb.shape
    if n == 1 or is_batched(x):
        return _plain_product(x, r_nbb)
    if rows := _rows_of_image(x, b):
        return _convolution(x, r_nbb, rows)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    torch.bmm(x.reshape(-1, n, b).transpose(0, 1), r_nbb, out=out.view(-1, n, b).transpose(0, 1))
    return out


def _convolution(x: Tensor, r_nbb: Tensor, rows: int) -> Tensor:
    """The same with rows as pixels of images and blocks as groups of channels; neither R nor its transpose is copied."""
    n, b, _ = r_nbb.shape
    pixels = _as_images(x, rows)
    if r_nbb.is_contiguous():
        turned = torch.conv_transpose2d(pixels, r_nbb.view(n * b, b, 1, 1), groups=n)
    else:
        turned = torch.conv2d(pixels, r_nbb.mT.reshape(n * b, b, 1, 1), groups=n)
    return turned.permute(0, 2, 3, 1).reshape(x.shape)


def _as_images(x: Tensor, rows: int) -> Tensor:
    """x, (..., i) and contiguous, as (images, i, 1, rows)."""
    fan_in = x.shape[-1]
    return x.as_strided((x.numel() // (rows * fan_in), fan_in, 1, rows), (rows * fan_in, 1, rows * fan_in, fan_in))


def columns(x: Tensor, r_nbb: Tensor) -> Tensor:
    """The same by columns, as torch's batched product finds it without copying it to where it shall lie. x is contiguous."""
    n, b, _ = r_nbb.shape
    return torch.bmm(r_nbb.mT, x.view(-1, n, b).permute(1, 2, 0)).permute(2, 0, 1).view(x.shape)


def columns_are_exact(x: Tensor, fan_out: int) -> bool:
    """Whether x, (..., i), times a weight has the same bits when either lies by columns, so that a rotation by the identity
    changes none: in float32, of many rows, and with a fan-out in 32s (measured with MKL of AVX2 and
    1 to 16 threads, on an EPYC with AVX512 and up to 8; `MKL_CBWR=COMPATIBLE` is another kernel, which rounds otherwise)."""
    has_many = x.numel() >= _MANY_ROWS * x.shape[-1] and fan_out >= _MANY_ROWS
    return x.dtype is torch.float32 and has_many and fan_out % 32 == 0 and _has_mkl()


@functools.cache
def _has_mkl() -> bool:
    return torch.backends.mkl.is_available()  # type: ignore[no-untyped-call, no-any-return]


def columns_are_cheaper(x: Tensor, weight: Tensor, bias: Tensor | None, block_size: int) -> bool:
    """Whether `rotate_by_columns` costs less than `rotate` for F.linear (measured on a CPU): nothing is copied, and torch then
    multiplies the gradient with the weight in an order that several threads are faster with, and a single one slower.
    A bias of an x of three dimensions would be added after the product and not in it, which rounds otherwise."""
    if bias is not None and x.dim() != 2:
        return False
    if not x.is_cpu or x.shape[-1:] != weight.shape[1:] or torch.get_num_threads() == 1:
        return False
    return _is_small(x, x.shape[-1] * block_size) and columns_are_exact(x, len(weight))


def block_gradient(x: Tensor, grad: Tensor, r_nbb: Tensor) -> Tensor:
    """Gradient of the blocks, x^T grad of each: (..., n*b) twice -> (n or 1, b, b)."""
    n, b, _ = r_nbb.shape
    if n > 1 and (rows := _rows_of_gradient(x, grad, b)):
        return _gradient_of_convolution(x, grad, r_nbb, rows)
    return torch.bmm(x.reshape(-1, n, b).permute(1, 2, 0), grad.reshape(-1, n, b).transpose(0, 1))


def _rows_of_gradient(x: Tensor, grad: Tensor, block_size: int) -> int:
    """How many rows make an image, in 0.45 to 0.9 of the time of torch's products, which are slow from some 600 rows on, above all
    with fan-ins that are powers of two; AVX2 takes 1.2 to 2.5 times as long (measured). 0 where torch had better do it."""
    is_large = x.numel() >= _ENTRIES_OF_GRADIENT and x.numel() >= _ROWS_OF_GRADIENT * x.shape[-1]
    is_plain = is_large and not torch.is_grad_enabled() and not is_traced(x, grad) and not is_batched(grad)
    if not is_plain or not has_avx512() or grad.dtype is not x.dtype or not grad.is_contiguous():
        return 0
    found = _rows_of_image(x, block_size)
    return found if found in _IMAGE else 0


def _gradient_of_convolution(x: Tensor, grad: Tensor, r_nbb: Tensor, rows: int) -> Tensor:
    """The gradient of the weight of a grouped convolution, from grad to x, whose channels out are those of x."""
    n, b, _ = r_nbb.shape
    images = _as_images(x, rows), _as_images(grad, rows), r_nbb.reshape(n * b, b, 1, 1)
    options: Any = None, (1, 1), (0, 0), (1, 1), False, (0, 0), n, (False, True, False)
    found: Tensor = torch.ops.aten.convolution_backward(*images, *options)[1]
    return found.view(r_nbb.shape)


def keep(ctx: Any, r_nbb: Tensor, *tensors: Tensor) -> None:
    """Keep tensors for the backward, and R last where its map does not compute it again."""
    ctx.source = MatrixSource.of(r_nbb)
    ctx.computes_again = ctx.source is not None and ctx.source.computes_again
    ctx.save_for_backward(*tensors, *(() if ctx.computes_again else (r_nbb,)))


def kept(ctx: Any) -> tuple[Tensor, ...]:
    """What was kept, and R last."""
    return (*ctx.saved_tensors, ctx.source.matrix()) if ctx.computes_again else ctx.saved_tensors


class _Rotate(torch.autograd.Function):
    """x . blockdiag(R) that keeps x and R for backward and nothing else; differentiable twice."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, r_nbb: Tensor) -> Tensor:
        # With a separate setup_context torch binds the arguments by signature, at more cost than a small product.
        keep(ctx, r_nbb, x)
        with without_autocast(x):
            return product(x, r_nbb)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, r_nbb = kept(ctx)
        grad_x = grad_r = None
        if ctx.needs_input_grad[0]:
            grad_x = rotate(grads[0], r_nbb.mT)
        if ctx.needs_input_grad[1]:
            with without_autocast(x):
                grad_r = block_gradient(x, grads[0], r_nbb)
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
        return product(x, rotation)


class _RotateByColumns(torch.autograd.Function):
    """x . blockdiag(R) by columns, and its gradients by rows, for torch's own derivative would give that of x by columns to
    the whole model; differentiable as often as one likes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, r_nbb: Tensor) -> Tensor:
        ctx.save_for_backward(x, r_nbb)
        return columns(x, r_nbb)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, r_nbb = ctx.saved_tensors
        with without_autocast(x):
            grad_x = _plain_product(grads[0], r_nbb.mT) if ctx.needs_input_grad[0] else None
            return grad_x, block_gradient(x, grads[0], r_nbb) if ctx.needs_input_grad[1] else None


def rotate_by_columns(x: Tensor, rotation: Tensor) -> Tensor:
    """`rotate` for those who read a matrix either way, as F.linear: the result has the strides of one that lies by columns.
    x: (..., n*b), contiguous, R: (n, b, b) -> (..., n*b); both of one floating dtype, nothing traced, no autocast."""
    if is_recorded() and (x.requires_grad or rotation.requires_grad):
        return _RotateByColumns.apply(x, rotation)  # type: ignore[no-any-return, no-untyped-call]
    return columns(x, rotation)


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
