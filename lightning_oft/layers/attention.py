"""nn.MultiheadAttention: it reads the weights of its projections and never calls them, so the weights rotate."""

from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_oft.layers.base import LayerType, RotatedWeight, SwappedClass, register_layer_type
from lightning_oft.layers.state import record_of, rotated_weight, state_of


class _RotatedAttention(SwappedClass):
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        """Run the original forward on a view of this module that has the rotated weights in place of its own.
        A view rather than a swap: two threads may call one module, and a forward of any subclass keeps working."""
        base = self._oft_base
        rotated = {
            part.parameter: _weight_in_use(self, name, part.parameter)
            for name, part in state_of(self).layer_type.rotated_weights(self).items()  # type: ignore[union-attr]
        }
        weight = rotated.pop("out_proj.weight", self.out_proj.weight)
        projection = _view(self.out_proj, type(self.out_proj), {"weight": weight})
        view = _view(self, base, rotated)
        view.__dict__["_modules"] = {**self._modules, "out_proj": projection}
        return base.forward(view, *args, **kwargs)


def _weight_in_use(layer: nn.Module, part: str, parameter: str) -> Tensor:
    """The weight, rotated. Where no gradient is recorded it is as trainable as before the base was frozen: torch folds
    a batched product or not by `requires_grad` of its operands, and the identity would be exact to 1e-7 only."""
    weight = rotated_weight(layer, part, layer.get_parameter(parameter))
    owner, _, key = parameter.rpartition(".")
    record = record_of(layer.get_submodule(owner))
    if torch.is_grad_enabled() or weight.requires_grad or record is None or key not in record.frozen:
        return weight
    return weight.detach().requires_grad_()


def _view(module: nn.Module, cls: type[nn.Module], parameters: dict[str, Tensor]) -> nn.Module:
    view = object.__new__(cls)
    view.__dict__.update(module.__dict__)
    view.__dict__["_parameters"] = {**module._parameters, **parameters}
    return view


def keep_off_fast_path(layer: nn.Module, args: Any, kwargs: Any) -> None:
    """Does nothing by being there: nn.TransformerEncoderLayer reads raw weights in eval unless a hook is below it."""


class Attention(LayerType):
    """nn.MultiheadAttention, packed or with projections of its own for keys and values."""

    name = "attention"
    in_all_linear = True
    mixin = _RotatedAttention
    input_hook = staticmethod(keep_off_fast_path)

    @override
    def rotated_weights(self, layer: Any) -> dict[str, RotatedWeight]:
        sizes = {"q_proj": layer.embed_dim, "k_proj": layer.kdim, "v_proj": layer.vdim}
        if layer._qkv_same_embed_dim:
            sizes = {"in_proj": layer.embed_dim}
        projections = {part: RotatedWeight(f"{part}_weight", size) for part, size in sizes.items()}
        return {**projections, "out_proj": RotatedWeight("out_proj.weight", layer.embed_dim)}


register_layer_type(nn.MultiheadAttention, Attention())
