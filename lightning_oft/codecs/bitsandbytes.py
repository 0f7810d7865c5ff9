"""bitsandbytes' 4-bit and 8-bit layers, also as Lightning's BitsandbytesPrecision derives them."""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_oft.codecs.base import register_codec
from lightning_oft.codecs.packed import PackedCodec


class Bitsandbytes4bit(PackedCodec):
    """nf4 and fp4, with double quantization or without, stored in any dtype."""

    passes_gradient = True
    sharded_by = ("ModelParallelStrategy", "FSDPStrategy")
    layers = ("bitsandbytes.Linear4bit",)
    tensors = ("bitsandbytes.Params4bit",)

    @override
    def storage(self, module: nn.Module) -> str | None:
        weight: Any = module._parameters["weight"]
        return weight.quant_type if _quant_state(module) is not None else None

    @override
    def enable_gradients(self, module: nn.Module) -> None:
        """On CPUs with AVX512-BF16 a forward in eval mode packs the weight anew, after which the layer passes no gradient
        to its input, in training mode either; Lightning's sanity validation is such a forward."""
        layer: Any = module
        layer.support_avx512bf16_for_cpu = False
        state = _quant_state(module)
        if getattr(state, "packing_format_for_cpu", False):
            from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse

            layer.weight.data, layer.weight.quant_state = _convert_weight_packed_for_cpu_inverse(
                layer.weight.data, state
            )

    @override
    def survives_cast(self, module: nn.Module, dtype: torch.dtype) -> bool:
        """Codes that are stored as floating-point numbers would be rounded; the kernels give NaN in float64."""
        weight: Any = module._parameters["weight"]
        is_stored_as_floats = weight.is_floating_point() and _quant_state(module) is not None
        return dtype != torch.float64 and (weight.dtype == dtype or not is_stored_as_floats)

    @override
    def read(self, module: nn.Module, parameter: str) -> Tensor:
        weight: Any = module._parameters[parameter]
        if _quant_state(module) is None:  # quantized only when it is moved to a device
            plain: Tensor = weight.data
            return plain
        from bitsandbytes import functional

        self.enable_gradients(module)
        values: Tensor = functional.dequantize_4bit(weight.data, _quant_state(module))
        return values

    @override
    def lasting(self, module: nn.Module, parameter: str) -> tuple[str | None, Tensor]:
        """In units of the largest of each block: where a forward in eval mode has packed the weight anew, that has rounded
        the scales, and their float type is that of the model."""
        weight: Any = module._parameters[parameter]
        if _quant_state(module) is None:
            return None, self.read(module, parameter)
        from bitsandbytes import functional

        self.enable_gradients(module)
        state = copy.copy(_quant_state(module))
        state.dtype = torch.float32
        values: Tensor = functional.dequantize_4bit(weight.data, state)
        flat = values.flatten()
        blocks = nn.functional.pad(flat, (0, -len(flat) % state.blocksize)).view(-1, state.blocksize)
        codes = blocks / blocks.abs().amax(1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
        return f"{state.quant_type}-codes", codes.flatten()[: len(flat)].view_as(values)

    @override
    def write(self, module: nn.Module, parameter: str, values: Tensor) -> None:
        weight: Any = module._parameters[parameter]
        state = _quant_state(module)
        made = type(weight)(
            values.to("cpu", state.dtype),
            requires_grad=False,
            blocksize=state.blocksize,
            compress_statistics=state.nested,
            quant_type=state.quant_type,
            quant_storage=weight.dtype,
            module=module,
        )
        module._parameters[parameter] = made.to(weight.device)

    @override
    def restore(self, module: nn.Module, parameter: str, kept: Any) -> None:
        layer: Any = module
        super().restore(module, parameter, kept)
        layer.quant_state = layer.weight.quant_state


class Bitsandbytes8bit(PackedCodec):
    """int8 rows. A layer with fp16 weights, which it quantizes in each forward, has a plain weight.
    On a CPU it rounds its inputs too in eval mode, though not in training, and so is not what its weight says by 0.6%."""

    passes_gradient = True
    layers = ("bitsandbytes.Linear8bitLt",)

    @override
    def matches(self, module: nn.Module, parameter: str) -> bool:
        layer: Any = module
        return super().matches(module, parameter) and not layer.state.has_fp16_weights

    @override
    def storage(self, module: nn.Module) -> str | None:
        weight: Any = module._parameters["weight"]
        return "int8" if weight.dtype == torch.int8 else None

    @override
    def read(self, module: nn.Module, parameter: str) -> Tensor:
        layer: Any = module
        codes: Tensor = layer.weight.data
        if codes.dtype != torch.int8:
            return codes
        scales: Tensor = (
            layer.state.SCB if layer.weight.SCB is None else layer.weight.SCB
        )  # the first forward moves them
        return codes.float() * scales.float()[:, None] / 127

    @override
    def write(self, module: nn.Module, parameter: str, values: Tensor) -> None:
        layer: Any = module
        made = type(layer.weight)(values.to("cpu", torch.float16), requires_grad=False, has_fp16_weights=False)
        self.restore(module, parameter, (made.to(layer.weight.device), None, None))

    @override
    def keep(self, module: nn.Module, parameter: str, device: torch.device | str) -> Any:
        layer: Any = module
        return layer.weight, layer.state.CB, layer.state.SCB

    @override
    def restore(self, module: nn.Module, parameter: str, kept: Any) -> None:
        layer: Any = module
        module._parameters[parameter], layer.state.CB, layer.state.SCB = kept


def _quant_state(module: Any) -> Any:
    """How a weight was quantized; FSDP's flattening leaves it on the layer alone. None where it is not quantized yet."""
    state = getattr(module.weight, "quant_state", None)
    return getattr(module, "quant_state", None) if state is None else state


register_codec(Bitsandbytes4bit())
register_codec(Bitsandbytes8bit())
