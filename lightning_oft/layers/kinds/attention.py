"""nn.MultiheadAttention: it reads the weights of its projections and never calls them, so the weights rotate."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_oft.layers.in_place import InPlace, put_on, take_off
from lightning_oft.layers.state import FROZEN

from .base import Kind, Part, add_hook, drop_hook, rotated_weight


class _RotatedAttention(InPlace):
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        """Run the original forward on a view of this module that has the rotated weights in place of its own.

        A view rather than a swap: two threads may call one module, and a forward of any subclass keeps working.
        """
        base = self._oft_base
        rotated = {
            part.parameter: _as_trainable(self, part.parameter, rotated_weight(self, ATTENTION, name, weight))
            for name, part in ATTENTION.parts(self).items()
            for weight in (self.get_parameter(part.parameter),)
        }
        projection = _view(self.out_proj, type(self.out_proj), {"weight": rotated.pop("out_proj.weight")})
        view = _view(self, base, rotated)
        view.__dict__["_modules"] = {**self._modules, "out_proj": projection}
        return base.forward(view, *args, **kwargs)


def _as_trainable(layer: nn.Module, parameter: str, weight: Tensor) -> Tensor:
    """Where no gradient is recorded, the weight as the base had it before it was frozen.

    torch folds a batched product or not by `requires_grad` of its operands, also without recording: the same numbers
    come out rounded otherwise, and the identity at injection would be exact to 1e-7 only.
    """
    if torch.is_grad_enabled() or weight.requires_grad:
        return weight
    owner, _, key = parameter.rpartition(".")
    was_trainable = key in layer.get_submodule(owner).__dict__.get(FROZEN, ())
    return weight.detach().requires_grad_() if was_trainable else weight


def _view(module: nn.Module, cls: type[nn.Module], parameters: dict[str, Tensor]) -> nn.Module:
    view = object.__new__(cls)
    view.__dict__.update(module.__dict__)
    view.__dict__["_parameters"] = {**module._parameters, **parameters}
    return view


def keep_off_fast_path(layer: nn.Module, args: Any) -> None:
    """Does nothing by being there: nn.TransformerEncoderLayer reads raw weights in eval unless a hook is below it."""


class Attention(Kind):
    """nn.MultiheadAttention: it reads the weights of its projections and never calls them, so the weights rotate."""

    name = "attention"

    @override
    def parts(self, layer: nn.Module) -> dict[str, Part]:
        embed: Any = layer.embed_dim
        if layer._qkv_same_embed_dim:
            projections = {"in_proj": Part("in_proj_weight", embed)}
        else:
            sizes: dict[str, Any] = {"q": embed, "k": layer.kdim, "v": layer.vdim}
            projections = {f"{key}_proj": Part(f"{key}_proj_weight", size) for key, size in sizes.items()}
        return {**projections, "out_proj": Part("out_proj.weight", embed)}

    @override
    def attach(self, layer: nn.Module) -> None:
        put_on(layer, _RotatedAttention)
        add_hook(layer._forward_pre_hooks, layer.register_forward_pre_hook, keep_off_fast_path)

    @override
    def detach(self, layer: nn.Module) -> None:
        take_off(layer)
        drop_hook(layer, keep_off_fast_path)


ATTENTION = Attention()
