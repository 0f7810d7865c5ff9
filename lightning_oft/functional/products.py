"""Products with block-diagonal rotations."""

from typing import Any

import torch
from torch import Tensor

from lightning_oft.functional.tracing import without_autocast


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

    Both of one floating dtype. Raises ValueError where the last dimension is not n*b.
    """
    n, b, _ = rotation.shape
    fan_in = x.shape[-1] if x.dim() else 0
    if (fan_in != n * b) if n > 1 else (fan_in == 0 or fan_in % b != 0):
        raise ValueError(f"cannot rotate an input of shape {tuple(x.shape)}: its last dimension must be {n * b}")
    flat = x.reshape(-1, fan_in)
    if torch.is_grad_enabled() and (x.requires_grad or rotation.requires_grad):
        return _Rotate.apply(flat, rotation).view(x.shape)  # type: ignore[no-any-return, no-untyped-call]
    with without_autocast(x.device):
        return _blocks_last(flat, rotation).view(x.shape)


def rotate_weight(weight: Tensor, rotation: Tensor, out: Tensor | None = None) -> Tensor:
    """Rotate a weight as its inputs would be, W . blockdiag(R)^T. W: (o, i), R: (n or 1, b, b) -> (o, i).

    Into `out`, of any floating dtype, where given. Fastest for some rows at a time: their product and its transposed
    copy stay in a core's cache. Raises RuntimeError where the fan-in is not n*b.
    """
    blocks_onb = weight.view(weight.shape[0], -1, rotation.shape[-1])
    with without_autocast(weight.device):
        if rotation.shape[0] == 1:
            turned_onb = blocks_onb @ rotation[0].mT
        else:
            turned_onb = torch.bmm(blocks_onb.transpose(0, 1), rotation.mT).transpose(0, 1)
    if out is None:
        return turned_onb.reshape(weight.shape)
    out.view(turned_onb.shape).copy_(turned_onb)
    return out


def inverse(rotation: Tensor) -> Tensor:
    """R^-1 of any invertible R, in float64. (n, b, b) -> (n, b, b).

    A truncated series is not exactly orthogonal, so R^T would not do; rotate_weight with it undoes rotate_weight."""
    inverted: Tensor = torch.linalg.inv(rotation.double())
    return inverted
