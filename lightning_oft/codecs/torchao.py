"""torchao's tensor subclasses, which leave a layer an nn.Linear and its weight a parameter."""

import sys
from typing import Any

from torch import Tensor, nn
from typing_extensions import override

from lightning_oft.codecs.base import register_codec
from lightning_oft.codecs.packed import PackedCodec


class TorchAO(PackedCodec):
    """int8, intx (1 to 8 bits) and float8 are read and written; other formats of torchao are read."""

    tensors = ("torchao.TorchAOBaseTensor",)

    @override
    def storage(self, module: nn.Module) -> str | None:
        weight: Any = module._parameters["weight"]
        kind = getattr(weight.data, "target_dtype", None)  # of intx, which has several
        return type(weight.data).__name__ if kind is None else str(kind).removeprefix("torch.")

    @override
    def can_write(self, module: nn.Module) -> bool:
        weight: Any = module._parameters["weight"]
        return type(weight.data).__name__ in ("Int8Tensor", "IntxUnpackedToInt8Tensor", "Float8Tensor")

    @override
    def write(self, module: nn.Module, parameter: str, values: Tensor) -> None:
        weight: Any = module._parameters[parameter]
        weight, values = weight.data, values.to(weight.device, weight.dtype)
        if type(weight).__name__ == "IntxUnpackedToInt8Tensor":
            made = type(weight).from_hp(
                values,
                weight.block_size,
                weight.target_dtype,
                mapping_type=_mapping(symmetric=not bool(weight.zero_point.any())),
                activation_quantization=weight.activation_quantization,
            )
        elif type(weight).__name__ == "Float8Tensor":
            made = type(weight).from_hp(
                values,
                weight.qdata.dtype,
                _granularity(weight),
                mm_config=weight.mm_config,
                kernel_preference=weight.kernel_preference,
                act_quant_kwargs=weight.act_quant_kwargs,
            )
        else:
            symmetric = weight.zero_point is None or not bool(weight.zero_point.any())
            made = type(weight).from_hp(
                values, _granularity(weight), _mapping(symmetric), act_quant_kwargs=weight.act_quant_kwargs
            )
        module._parameters[parameter] = nn.Parameter(made, requires_grad=False)


class TorchAONF4(PackedCodec):
    """torchao's NF4Tensor, which is none of its base class."""

    sharded_by = ("ModelParallelStrategy",)
    tensors = ("torchao.NF4Tensor",)

    @override
    def storage(self, module: nn.Module) -> str | None:
        return "NF4Tensor"

    @override
    def read(self, module: nn.Module, parameter: str) -> Tensor:
        weight: Any = module._parameters[parameter]
        values: Tensor = weight.data.get_original_weight()
        return values

    @override
    def write(self, module: nn.Module, parameter: str, values: Tensor) -> None:
        weight: Any = module._parameters[parameter]
        weight = weight.data
        to_nf4 = sys.modules[type(weight).__module__].to_nf4
        made = to_nf4(values.to(weight.device, weight.dtype), weight.block_size, weight.scaler_block_size)
        module._parameters[parameter] = nn.Parameter(made, requires_grad=False)


def _granularity(weight: Any) -> Any:
    """Of how many values torchao takes one scale, by the block that it has written down."""
    from torchao.quantization.granularity import PerGroup, PerRow, PerTensor

    rows, width = weight.block_size
    if width < weight.shape[1]:
        return PerGroup(width)
    return PerRow() if rows == 1 else PerTensor()


def _mapping(symmetric: bool) -> Any:
    from torchao.quantization.quant_primitives import MappingType

    return MappingType.SYMMETRIC if symmetric else MappingType.ASYMMETRIC


register_codec(TorchAO())
register_codec(TorchAONF4())
