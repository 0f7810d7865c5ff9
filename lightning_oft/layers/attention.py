"""nn.MultiheadAttention: it reads the weights of its projections and never calls them, so the weights rotate."""

from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_oft.layers.base import LayerType, RotatedWeight, register_layer_type
from lightning_oft.layers.own_forward import RotatedParameters, keep_off_fast_path


class Attention(LayerType):
    """nn.MultiheadAttention, packed or with projections of its own for keys and values."""

    name = "attention"
    in_all_linear = True
    mixin = RotatedParameters
    input_hook = staticmethod(keep_off_fast_path)

    @override
    def rotated_weights(self, layer: Any) -> dict[str, RotatedWeight]:
        sizes = {"q_proj": layer.embed_dim, "k_proj": layer.kdim, "v_proj": layer.vdim}
        if layer._qkv_same_embed_dim:
            sizes = {"in_proj": layer.embed_dim}
        rows = {"in_proj": 3 * layer.embed_dim}
        return {
            **{
                part: RotatedWeight(f"{part}_weight", size, neurons=rows.get(part, layer.embed_dim))
                for part, size in sizes.items()
            },
            "out_proj": RotatedWeight("out_proj.weight", layer.embed_dim, neurons=layer.embed_dim),
        }

    @override
    def example(self, layer: Any) -> tuple[Tensor, ...]:
        return tuple(torch.randn(3, 1, size) for size in (layer.embed_dim, layer.kdim, layer.vdim))


register_layer_type(nn.MultiheadAttention, Attention())
