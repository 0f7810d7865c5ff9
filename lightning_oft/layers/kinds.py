"""How each kind of module is rotated: by its input, its output, or the weights that it reads.

Base parameter names and classes never change, so a plain checkpoint still loads and a merged model is a plain one.
Shapes: o fan-out, i fan-in; every weight is folded as a matrix (rows, i) whose last dimension the rotation turns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize
from typing_extensions import override

from lightning_oft import rotation as maths

from .in_place import InPlace, put_on, take_off
from .state import FROZEN, applied_rotations

# Bound now: inside Lightning's quantization contexts `torch.nn.Linear` names another class.
_Linear, _Embedding, _Attention = nn.Linear, nn.Embedding, nn.MultiheadAttention
_ConvNd = nn.modules.conv._ConvNd
_ConvTransposeNd = nn.modules.conv._ConvTransposeNd
_LazyModule = nn.modules.lazy.LazyModuleMixin


class Part(NamedTuple):
    """One rotated weight of a layer: its parameter, and the size of the dimension that is rotated."""

    parameter: str
    fan_in: int


class Kind:
    """A kind of arithmetic. Subclasses say which weights a layer has and how a rotation reaches them."""

    name = ""
    file_key = "oft_R"
    row_dim = 0  # the dimension of the weight whose entries are rotated each by itself

    def parts(self, layer: nn.Module) -> dict[str, Part]:
        """The rotated weights by part name; one nameless part where a layer has a single rotation."""
        raise AssertionError("every kind names its parts")

    def attach(self, layer: nn.Module) -> None:
        """Make the layer's forward rotate; once, however often it is called."""
        raise AssertionError("every kind attaches")

    def detach(self, layer: nn.Module) -> None:
        """Give the layer its own forward back."""
        take_off(layer)

    def to_matrix(self, layer: nn.Module, weight: Tensor) -> Tensor:
        """The weight as (rows, fan-in)."""
        return weight.flatten(1)

    def from_matrix(self, layer: nn.Module, matrix: Tensor, weight: Tensor) -> Tensor:
        """A matrix of to_matrix in the shape and memory format of the weight."""
        return _like(matrix.view(weight.shape), weight)

    def factors(self, matrices: Sequence[Tensor]) -> list[Tensor]:
        """Rotations in the order and orientation in which `rotate_weight` applies them: y = base(x . Ra . Rb)."""
        return list(reversed(matrices))

    def fold(self, layer: nn.Module, weight: Tensor, matrices: Sequence[Tensor]) -> Tensor:
        """The weight that does alone what it did behind the rotations. Any floating dtype, computed in float32."""
        matrix = self.to_matrix(layer, weight).to(torch.promote_types(weight.dtype, torch.float32))
        for factor in self.factors(matrices):
            matrix = maths.rotate_weight(matrix, factor.to(matrix.dtype))
        return self.from_matrix(layer, matrix.to(weight.dtype), weight)

    def unfold(self, layer: nn.Module, weight: Tensor, matrices: Sequence[Tensor]) -> Tensor:
        """The inverse of fold, by solving."""
        matrix = self.to_matrix(layer, weight).to(torch.promote_types(weight.dtype, torch.float32))
        for factor in reversed(self.factors(matrices)):
            matrix = maths.unrotate_weight(matrix, factor)
        return self.from_matrix(layer, matrix.to(weight.dtype), weight)


def _like(tensor: Tensor, model: Tensor) -> Tensor:
    """The tensor in the memory format of another: a channels_last convolution must not become a slow one."""
    for dims, memory_format in ((4, torch.channels_last), (5, torch.channels_last_3d)):
        if model.dim() == dims and not model.is_contiguous() and model.is_contiguous(memory_format=memory_format):
            return tensor.contiguous(memory_format=memory_format)
    return tensor.contiguous()


def rotated_weight(layer: nn.Module, kind: Kind, part: str, weight: Tensor) -> Tensor:
    """The weight as a forward uses it now; through Rotation.__call__, so that FSDP gathers what it must."""
    rotations = applied_rotations(layer, part)
    if not rotations:
        return weight
    matrix = kind.to_matrix(layer, weight)
    for rotation in reversed(rotations):
        matrix = rotation(matrix, transpose=True)
    return kind.from_matrix(layer, matrix, weight)


def _add_hook(hooks: dict[int, Any], add: Callable[..., Any], hook: Callable[..., Any], **options: Any) -> None:
    if hook not in hooks.values():
        add(hook, **options)


def _drop_hook(layer: nn.Module, hook: Callable[..., Any]) -> None:
    for hooks in (layer._forward_pre_hooks, layer._forward_hooks):
        for key in [key for key, value in hooks.items() if value is hook]:
            del hooks[key]
            layer._forward_pre_hooks_with_kwargs.pop(key, None)


# ---- by the input ----------------------------------------------------------------------------------------------------

_INPUT_NAMES = ("input", "x", "hidden_states")


def _rotate_input(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    rotations = applied_rotations(layer, "")
    if not rotations:
        return None
    name = "" if args else next((key for key in _INPUT_NAMES if key in kwargs), None)
    if name is None:
        raise TypeError(f"{type(layer).__name__} called with {sorted(kwargs)}: pass its input as the first argument")
    x = args[0] if args else kwargs[name]
    for rotation in rotations:
        x = rotation(x)
    return ((x, *args[1:]), kwargs) if args else (args, {**kwargs, name: x})


class LinearLike(Kind):
    """nn.Linear and whatever computes like it: the input is rotated, and the layer called as it is."""

    name = "linear"

    @override
    def parts(self, layer: nn.Module) -> dict[str, Part]:
        return {"": Part("weight", int(layer.in_features))}  # type: ignore[arg-type]

    @override
    def attach(self, layer: nn.Module) -> None:
        _add_hook(layer._forward_pre_hooks, layer.register_forward_pre_hook, _rotate_input, with_kwargs=True)

    @override
    def detach(self, layer: nn.Module) -> None:
        _drop_hook(layer, _rotate_input)


class TransposedLinear(LinearLike):
    """transformers' Conv1D, a linear layer that stores its weight as (i, o)."""

    name = "Conv1D"
    row_dim = 1

    @override
    def parts(self, layer: nn.Module) -> dict[str, Part]:
        return {"": Part("weight", int(layer.weight.shape[0]))}  # type: ignore[index]

    @override
    def to_matrix(self, layer: nn.Module, weight: Tensor) -> Tensor:
        return weight.t()

    @override
    def from_matrix(self, layer: nn.Module, matrix: Tensor, weight: Tensor) -> Tensor:
        return matrix.t().contiguous()


# ---- by the output ---------------------------------------------------------------------------------------------------


def _rotate_output(layer: nn.Module, args: Any, output: Tensor) -> Tensor:
    for rotation in applied_rotations(layer, ""):
        output = rotation(output)
    return output


class Embedding(Kind):
    """nn.Embedding: the vectors looked up are rotated, E' = E . blockdiag(R)."""

    name = "embedding"
    file_key = "oft_embedding_R"

    @override
    def parts(self, layer: nn.Module) -> dict[str, Part]:
        return {"": Part("weight", int(layer.embedding_dim))}  # type: ignore[arg-type]

    @override
    def attach(self, layer: nn.Module) -> None:
        _add_hook(layer._forward_hooks, layer.register_forward_hook, _rotate_output)

    @override
    def detach(self, layer: nn.Module) -> None:
        _drop_hook(layer, _rotate_output)

    @override
    def factors(self, matrices: Sequence[Tensor]) -> list[Tensor]:
        return [matrix.mT for matrix in matrices]


# ---- by the weight ---------------------------------------------------------------------------------------------------


class _RotatedConv(InPlace):
    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        rotated = rotated_weight(self, _CONV, "", weight)  # type: ignore[arg-type]
        return super()._conv_forward(input, rotated, bias)  # type: ignore[misc, no-any-return]


class Conv(Kind):
    """nn.Conv1d, Conv2d, Conv3d: the weight is rotated over in/groups . kernel, which is exact for any kernel."""

    name = "convolution"

    @override
    def parts(self, layer: nn.Module) -> dict[str, Part]:
        weight: Any = layer.weight
        return {"": Part("weight", weight.shape[1:].numel())}

    @override
    def attach(self, layer: nn.Module) -> None:
        put_on(layer, _RotatedConv)


class _RotatedConvTranspose(InPlace):
    def forward(self: Any, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        dims = self.weight.dim() - 2
        output_padding = self._output_padding(
            input, output_size, self.stride, self.padding, self.kernel_size, dims, self.dilation
        )
        convolve = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[dims - 1]
        weight = rotated_weight(self, _CONV_TRANSPOSE, "", self.weight)
        return convolve(
            input, weight, self.bias, self.stride, self.padding, output_padding, self.groups, self.dilation
        )


class ConvTranspose(Kind):
    """nn.ConvTranspose1d/2d/3d: weight (in, o/groups, kernel); an output neuron reads in/groups . kernel entries."""

    name = "transposed convolution"
    row_dim = 1

    @override
    def parts(self, layer: nn.Module) -> dict[str, Part]:
        weight: Any = layer.weight
        return {"": Part("weight", weight.shape[0] // int(layer.groups) * weight.shape[2:].numel())}  # type: ignore[arg-type]

    @override
    def attach(self, layer: nn.Module) -> None:
        put_on(layer, _RotatedConvTranspose)

    @override
    def to_matrix(self, layer: nn.Module, weight: Tensor) -> Tensor:
        groups: Any = layer.groups
        grouped = weight.reshape(groups, -1, *weight.shape[1:]).flatten(3)
        return grouped.transpose(1, 2).flatten(2).flatten(0, 1)

    @override
    def from_matrix(self, layer: nn.Module, matrix: Tensor, weight: Tensor) -> Tensor:
        groups: Any = layer.groups
        grouped = matrix.view(groups, weight.shape[1], weight.shape[0] // groups, -1).transpose(1, 2)
        return _like(grouped.reshape(weight.shape), weight)


class _RotatedAttention(InPlace):
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        """Run the original forward on a view of this module that has the rotated weights in place of its own.

        A view rather than a swap: two threads may call one module, and a forward of any subclass keeps working.
        """
        base = self._oft_base
        rotated = {
            part.parameter: _as_trainable(self, part.parameter, rotated_weight(self, _ATTENTION, name, weight))
            for name, part in _ATTENTION.parts(self).items()
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
        _add_hook(layer._forward_pre_hooks, layer.register_forward_pre_hook, keep_off_fast_path)

    @override
    def detach(self, layer: nn.Module) -> None:
        take_off(layer)
        _drop_hook(layer, keep_off_fast_path)


_LINEAR, _CONV1D, _EMBEDDING = LinearLike(), TransposedLinear(), Embedding()
_CONV, _CONV_TRANSPOSE, _ATTENTION = Conv(), ConvTranspose(), Attention()


def kind_of(module: nn.Module) -> Kind | None:
    """How this module would be rotated; None where no way is known."""
    if isinstance(module, _ConvTransposeNd):
        return _CONV_TRANSPOSE
    if isinstance(module, _ConvNd):
        return _CONV
    if isinstance(module, _Attention):
        return _ATTENTION
    if isinstance(module, _Embedding):
        return _EMBEDDING
    if isinstance(module, _Linear):
        return _LINEAR
    if type(module).__name__ == "Conv1D" and hasattr(module, "nf"):
        return _CONV1D
    sizes = (getattr(module, "in_features", None), getattr(module, "out_features", None))
    return _LINEAR if all(isinstance(size, int) for size in sizes) else None


def refusal(module: nn.Module) -> str | None:
    """Why a module of a known kind cannot be adapted as it stands, with the remedy; None where it can."""
    if isinstance(module, _LazyModule) and module.has_uninitialized_params():
        return "its shape is not known yet: run one batch through the model first to materialise it"
    if parametrize.is_parametrized(module):
        return "its weight is parametrized: call torch.nn.utils.parametrize.remove_parametrizations first"
    if isinstance(module, _Attention) and (reason := refusal(module.out_proj)) is not None:
        return f"of its out_proj, {reason}"
    names = [*module._parameters, *module._buffers]
    for suffix, remedy in (("_g", "remove_weight_norm"), ("_orig", "remove_spectral_norm or prune.remove")):
        if any(name.endswith(f"weight{suffix}") for name in names):
            return f"its weight is recomputed at every forward: call torch.nn.utils.{remedy} first"
    return None
