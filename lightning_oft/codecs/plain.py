"""The ordinary storage: one floating-point parameter, whole in this process."""

from typing import Any

from torch import Tensor, nn
from typing_extensions import override

from lightning_oft.codecs.base import Codec, parameter_of, register_codec


class PlainCodec(Codec):
    """A floating-point nn.Parameter, also as the view of an FSDP1 unit's flat parameter."""

    @override
    def matches(self, module: nn.Module, parameter: str) -> bool:
        weight = parameter_of(module, parameter)
        return weight is not None and weight.is_floating_point() and type(weight.data) is Tensor

    @override
    def read(self, module: nn.Module, parameter: str) -> Tensor:
        return module.get_parameter(parameter).data

    @override
    def write(self, module: nn.Module, parameter: str, values: Tensor) -> None:
        """By exchange of `.data`, so that a kept base needs no copy; in place where the memory is a flat parameter's."""
        weight = module.get_parameter(parameter)
        if _is_flat(weight):
            weight.data.copy_(values)
        else:
            weight.data = values

    @override
    def keep(self, module: nn.Module, parameter: str) -> Any:
        weight = module.get_parameter(parameter)
        return weight.detach().to("cpu", copy=True) if _is_flat(weight) else weight.data.cpu()


def _is_flat(weight: Tensor) -> bool:
    """Whether the tensor is a view of an FSDP1 unit's flat parameter."""
    return bool(getattr(weight, "_fsdp_flattened", False))


register_codec(PlainCodec())
