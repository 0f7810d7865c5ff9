"""Layers whose input or output is rotated by a hook: linear layers, transformers' Conv1D, embeddings."""

import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.nn.modules.module import _has_any_global_hook
from typing_extensions import override

from lightning_oft import functional
from lightning_oft.layers.base import LayerType, RotatedWeight, register_layer_type
from lightning_oft.layers.own_forward import TurnedOutput
from lightning_oft.layers.rotation import Rotation, Turn
from lightning_oft.layers.state import ATTRIBUTE, applied_rotations, remember, state_of

_INPUT_NAMES = ("input", "x", "hidden_states")
_KNOWN_TO_PEFT = ("bitsandbytes", "hqq", "torchao", "aqlm", "awq", "gptqmodel", "auto_gptq", "eetq",
                  "neural_compressor")  # fmt: skip
"""Packages whose linear layers PEFT adapts without their being an nn.Linear."""


def _rotate_input(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> Any:
    if args and kwargs is not None and not is_compiling():
        record: Any = layer.__dict__.get(ATTRIBUTE)  # state_of would be two calls more for each token
        state = record.layer if record is not None else None
        quick = state.quick if state is not None else None
        if quick is not None and (vector := quick.vector(layer, args[0])) is not None:
            return (vector, *args[1:]), kwargs
    rotations = applied_rotations(layer, "")
    if not rotations or kwargs is None:
        return _require_state(layer)
    name = "" if args else next((key for key in _INPUT_NAMES if key in kwargs), None)
    if name is None:
        raise TypeError(f"{type(layer).__name__} called with {sorted(kwargs)}: pass its input as the first argument")
    x = args[0] if args else kwargs[name]
    if len(rotations) > 1:
        for rotation in rotations:
            x = rotation(x)
    else:
        x = _rotated(layer, rotations[0], x)
    return ((x, *args[1:]), kwargs) if args else (args, {**kwargs, name: x})


def _rotated(layer: nn.Module, rotation: Rotation, x: Tensor) -> Tensor:
    if (by := _turn_for_linear(layer, rotation, x)) is not None:
        return rotation(x, by=by)  # type: ignore[no-any-return]
    rotated: Tensor = rotation(x)
    if type(rotation) is Rotation and not (rotation.training or functional.is_traced(x) or functional.is_recorded()):
        remember(layer, rotation, x)
    return rotated


def _turn_for_linear(layer: nn.Module, rotation: Rotation, x: Tensor) -> Turn | None:
    """What costs less than `functional.rotate` where F.linear alone reads the result: its weight rotated instead, or x by
    columns; None where nothing does, or the layer is more than F.linear of a whole, plain and frozen weight."""
    weight, bias = layer._parameters.get("weight"), layer._parameters.get("bias")
    is_plain = type(layer).forward is nn.Linear.forward and type(rotation) is Rotation
    if not is_plain or weight is None or weight.requires_grad or functional.is_traced(x, weight):
        return None
    if x.numel() > weight.numel() and functional.weight_is_cheaper(x, weight, rotation.block_size):
        by: Turn = functional.RotatedInput.of
    elif len(rotation.weight) > 1 and functional.columns_are_cheaper(x, weight, bias, rotation.block_size):
        by = functional.rotate_by_columns
    else:
        return None
    return by if x.dtype == weight.dtype and not functional.is_autocast(x) and _is_alone(layer, rotation) else None


def _is_alone(layer: nn.Module, rotation: Rotation) -> bool:
    """Whether nobody but the layer's own forward sees its rotated input."""
    hooks = [hook for hook in layer._forward_hooks.values() if hook is not _scale_output]
    is_alone = len(layer._forward_pre_hooks) == 1 and not (
        hooks or layer._backward_hooks or layer._backward_pre_hooks or "forward" in layer.__dict__
    )
    return is_alone and not rotation._forward_hooks and not _has_any_global_hook()  # type: ignore[no-untyped-call]


def _scale_output(layer: nn.Module, args: Any, output: Tensor) -> Tensor:
    for rotation in applied_rotations(layer, ""):
        if rotation.magnitude is not None:
            output = rotation(output, output_of=layer)
    return output


def _require_state(layer: nn.Module) -> None:
    """Raise RuntimeError where a layer has our hook and not its rotations: torch.ao.quantization copies hooks to layers
    that it makes, and without their keyword arguments."""
    if state_of(layer) is None:
        what = f"this {type(layer).__name__} was made of an adapted layer without its rotations (by quantize_dynamic?)"
        raise RuntimeError(f"{what}: call merge(model) before the layers of a model are replaced")


def _rotate_output(layer: nn.Module, args: Any, output: Tensor) -> Tensor:
    rotations = applied_rotations(layer, "")
    if not rotations:
        _require_state(layer)
    for rotation in rotations:
        output = rotation(output, output_of=layer)
    return output


class _LinearOutput(TurnedOutput):
    """The output is rotated, and the layer called as it is."""

    output_hook = staticmethod(_rotate_output)

    @override
    def refusal(self, layer: nn.Module) -> str | None:
        if not isinstance(getattr(layer, "bias", 0), Tensor | None):
            return "nothing says what its bias is, which side='output' leaves as it is: rotate the input"
        return super().refusal(layer)


class LinearLike(LayerType):
    """nn.Linear and whatever computes like it: the input is rotated, and the layer called as it is."""

    name = "linear"
    in_all_linear = True
    input_hook = staticmethod(_rotate_input)
    scale_hook = staticmethod(_scale_output)

    @functools.cached_property
    @override
    def turned(self) -> LayerType:
        return _LinearOutput(self)

    @override
    def rotated_weights(self, layer: Any) -> dict[str, RotatedWeight]:
        return {"": RotatedWeight("weight", int(layer.in_features), neurons=getattr(layer, "out_features", None))}

    @override
    def matches(self, module: nn.Module, is_registered: bool) -> bool:
        """Quantized layers of many packages are no nn.Linear and have its sizes. A block may have them too without
        being one: then it has layers of its own."""
        sizes = (getattr(module, size, None) for size in ("in_features", "out_features"))
        if not is_registered and not all(isinstance(size, int) for size in sizes):
            return False
        own = ("oft_R", "parametrizations")
        children = [child for name, child in module._modules.items() if child is not None and name not in own]
        return all(next(child.parameters(), None) is None for child in children)

    @override
    def example(self, layer: nn.Module) -> tuple[Tensor, ...]:
        return (torch.randn(2, self.rotated_weights(layer)[""].fan),)

    @override
    def is_known_to_peft(self, layer: nn.Module) -> bool:
        return isinstance(layer, nn.Linear) or type(layer).__module__.split(".")[0] in _KNOWN_TO_PEFT


class TransposedLinear(LinearLike):
    """transformers' Conv1D, a linear layer that stores its weight as (i, o)."""

    name = "Conv1D"
    row_dim = 1

    @override
    def matches(self, module: nn.Module, is_registered: bool) -> bool:
        """Known by name, so that nobody who has no transformers model pays for its import."""
        return is_registered or ("Conv1D" in {cls.__name__ for cls in type(module).__mro__} and hasattr(module, "nf"))

    @override
    def is_known_to_peft(self, layer: nn.Module) -> bool:
        return False

    @override
    def rotated_weights(self, layer: Any) -> dict[str, RotatedWeight]:
        return {"": RotatedWeight("weight", layer.weight.shape[0], neurons=getattr(layer, "nf", None))}

    @override
    def to_matrix(self, layer: nn.Module, weight: Tensor) -> Tensor:
        return weight.t()

    @override
    def from_matrix(self, layer: nn.Module, matrix: Tensor, weight: Tensor) -> Tensor:
        return matrix.t().contiguous()


class Embedding(LayerType):
    """nn.Embedding: the vectors looked up are rotated, E' = E . blockdiag(R)."""

    name = "embedding"
    peft_key = "oft_embedding_R"
    output_hook = staticmethod(_rotate_output)

    @functools.cached_property
    @override
    def turned(self) -> LayerType:
        return self  # it has no other side

    @override
    def rotated_weights(self, layer: Any) -> dict[str, RotatedWeight]:
        return {"": RotatedWeight("weight", int(layer.embedding_dim), "output")}

    @override
    def example(self, layer: Any) -> tuple[Tensor, ...]:
        return (torch.arange(min(4, layer.num_embeddings)),)

    @override
    def is_known_to_peft(self, layer: nn.Module) -> bool:
        return True


LINEAR, CONV1D, EMBEDDING = LinearLike(), TransposedLinear(), Embedding()
register_layer_type(nn.Linear, LINEAR)
register_layer_type(nn.Embedding, EMBEDDING)
register_layer_type(None, CONV1D)
