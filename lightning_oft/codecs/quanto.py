"""optimum-quanto's linear layers. Copying into the data of their weight does nothing, and says nothing."""

from typing import Any

from torch import Tensor, nn
from typing_extensions import override

from lightning_oft.codecs.base import register_codec
from lightning_oft.codecs.packed import PackedCodec


class Quanto(PackedCodec):
    """Frozen weights of any quanto dtype; before `freeze` they are plain."""

    layers = ("optimum.QLinear",)

    @override
    def matches(self, module: nn.Module, parameter: str) -> bool:
        weight: Any = module._parameters.get("weight")
        return super().matches(module, parameter) and hasattr(weight, "qtype")

    @override
    def storage(self, module: nn.Module) -> str | None:
        layer: Any = module
        return str(layer.weight_qtype.name)

    @override
    def write(self, module: nn.Module, parameter: str, values: Tensor) -> None:
        layer: Any = module
        layer._parameters[parameter] = nn.Parameter(values, requires_grad=False)
        layer.freeze()
        layer._parameters[parameter].requires_grad_(False)


register_codec(Quanto())
