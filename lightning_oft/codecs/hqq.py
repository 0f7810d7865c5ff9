"""Layers of the HQQ library, which are no nn.Linear and have no parameter named weight."""

from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_oft.codecs.base import register_codec
from lightning_oft.codecs.packed import PackedCodec


class HQQ(PackedCodec):
    """HQQLinear of any number of bits."""

    layers = ("hqq.HQQLinear",)

    @override
    def storage(self, module: nn.Module) -> str | None:
        layer: Any = module
        return f"hqq{layer.meta['nbits']}" if layer.ready else None

    @override
    def read(self, module: nn.Module, parameter: str) -> Tensor:
        layer: Any = module
        values: Tensor = layer.dequantize()
        return values

    @override
    def write(self, module: nn.Module, parameter: str, values: Tensor) -> None:
        layer: Any = module
        options = {"compute_dtype": layer.compute_dtype, "device": str(layer.device), "initialize": False}
        config = {**layer.quant_config, "offload_meta": layer.offload_meta}
        made = next(cls for cls in type(layer).__mro__ if cls.__name__ == "HQQLinear")(None, config, **options)
        made.quantize(values.to(layer.compute_dtype), **layer.quant_config)
        layer.W_q, layer.meta = made.W_q, made.meta

    @override
    def keep(self, module: nn.Module, parameter: str, device: torch.device | str) -> Any:
        layer: Any = module
        return layer.W_q, layer.meta

    @override
    def restore(self, module: nn.Module, parameter: str, kept: Any) -> None:
        layer: Any = module
        layer.W_q, layer.meta = kept


register_codec(HQQ())
