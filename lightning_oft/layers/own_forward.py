"""Types made of another type. Layers that run a forward of their own on rotated weights: whatever it does with a weight,
merged is as trained. Layers whose output is rotated."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_oft.functional import is_traced
from lightning_oft.layers.base import LayerType, RotatedWeight, SwappedClass, register_layer_type
from lightning_oft.layers.state import record_of, rotated_weight, state_of


class RotatedParameters(SwappedClass):
    """Mixed into modules that read their weights in ways of their own."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        """Run the forward of the module's own class on a view of the module that has rotated weights in place of its
        own. A view rather than a swap: two threads may call one module, and a forward of any subclass keeps working."""
        base, state = class_below(self), state_of(self)
        parts = state.layer_type.rotated_weights(self) if state is not None else {}
        weights = {part.parameter: weight_in_use(self, name, part) for name, part in parts.items()}
        return base.forward(view_of(self, base, weights), *args, **kwargs)


def class_below(module: nn.Module) -> Any:
    """The module's own class. It has it back after a merge, and what wrapped its forward before still calls ours."""
    return getattr(type(module), "_oft_base", type(module))


def weight_in_use(layer: nn.Module, name: str, part: RotatedWeight) -> Tensor:
    """The weight, rotated. Where no gradient is recorded it is as trainable as before the base was frozen: torch folds
    a batched product or not by `requires_grad` of its operands, and the identity would be exact to 1e-7 only."""
    above, _, key = part.parameter.rpartition(".")
    owner = layer.get_submodule(above)
    weight, record = rotated_weight(layer, name, getattr(owner, key), part.side), record_of(owner)
    if torch.is_grad_enabled() or is_traced() or weight.requires_grad or key not in getattr(record, "frozen", ()):
        return weight
    return weight.detach().requires_grad_()


def view_of(module: nn.Module, cls: type[nn.Module], weights: Mapping[str, Tensor]) -> nn.Module:
    """The module under a class, with other weights by their dotted names; it shares everything else."""
    view, own = object.__new__(cls), {key: weight for key, weight in weights.items() if "." not in key}
    # FSDP1 lays the gathered weights of a forward over the parameters, as plain attributes.
    view.__dict__.update((key, value) for key, value in module.__dict__.items() if key not in own)
    view.__dict__["_parameters"] = {**module._parameters, **own}
    view.__dict__["_modules"] = dict(module._modules)
    for child in {name.partition(".")[0] for name in weights if "." in name}:
        below = {name.removeprefix(f"{child}."): weights[name] for name in weights if name.startswith(f"{child}.")}
        inner: Any = module._modules[child]
        view._modules[child] = view_of(inner, type(inner), below)
    return view


@torch.no_grad()
def merges_as_called(layer: nn.Module, layer_type: LayerType, scaled: bool = False) -> bool | None:
    """Whether a forward that somebody put on a layer gives the same for a turned input as with a turned weight, in eval;
    where `scaled`, with other scales of the neurons too. None where it cannot be tried. On the layer itself, whose weight
    is another one meanwhile: the function is bound to it."""
    ((_, part), *more) = layer_type.rotated_weights(layer).items()
    weight = layer._parameters.get(part.parameter)
    if weight is None or more or layer_type.mixin is not None:
        return None
    devices = [weight.device] if weight.is_cuda else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(0)
        if (example := layer_type.example(layer)) is None:
            return None
        axis = nn.functional.normalize(torch.randn(part.fan, device=weight.device), dim=0).to(weight.dtype)
        turned = _mirrored(layer_type.to_matrix(layer, weight.detach()), axis)
        growth = torch.linspace(-0.5, 0.5, len(turned), device=weight.device).to(weight.dtype) if scaled else None
        turned = turned if growth is None else turned * (1 + growth[:, None])
        matrix = layer_type.from_matrix(layer, turned, weight)
        x = example[0].to(weight.device, weight.dtype if example[0].is_floating_point() else None)
        training, layer.training = layer.training, False
        try:
            rotated = layer.forward(_mirrored(x, axis) if part.side == "input" else x)
            bias: Any = getattr(layer, "bias", None)
            if part.side == "output":
                rotated = _mirrored(rotated, axis) + (0 if bias is None else bias - _mirrored(bias, axis))
            if growth is not None:
                rotated = rotated + growth * (rotated if bias is None else rotated - bias)
            layer._parameters[part.parameter] = nn.Parameter(matrix, requires_grad=False)
            merged = layer.forward(x)
            return bool((rotated - merged).norm() <= 0.02 * merged.norm())
        except Exception:  # it cannot run here and now
            return None
        finally:
            layer._parameters[part.parameter], layer.training = weight, training


def _mirrored(x: Tensor, axis: Tensor) -> Tensor:
    """The reflection x (I - 2 v v^T), which is orthogonal and needs no matrix. x: (..., fan), v: (fan,)."""
    return x - 2 * (x @ axis)[..., None] * axis


def keep_off_fast_path(layer: nn.Module, args: Any, kwargs: Any) -> None:
    """Does nothing by being there: nn.TransformerEncoderLayer reads raw weights in eval unless a hook is below it."""


class Derived(LayerType):
    """A type of the layers of another one, which are rotated in another way."""

    def __init__(self, like: LayerType) -> None:
        self.like = like
        self.name, self.row_dim, self.peft_key = like.name, like.row_dim, like.peft_key
        self.in_all_linear = like.in_all_linear

    @override
    def rotated_weights(self, layer: nn.Module) -> dict[str, RotatedWeight]:
        return self.like.rotated_weights(layer)

    @override
    def refusal(self, layer: nn.Module) -> str | None:
        return self.like.refusal(layer)

    @override
    def example(self, layer: nn.Module) -> tuple[Tensor, ...] | None:
        return self.like.example(layer)

    @override
    def to_matrix(self, layer: nn.Module, weight: Tensor) -> Tensor:
        return self.like.to_matrix(layer, weight)

    @override
    def from_matrix(self, layer: nn.Module, matrix: Tensor, weight: Tensor) -> Tensor:
        return self.like.from_matrix(layer, matrix, weight)

    @override
    def scale_of(self, layer: nn.Module, scale_o: Tensor, weight: Tensor) -> Tensor:
        return self.like.scale_of(layer, scale_o, weight)


class OwnForward(Derived):
    """A layer with the weight of a known type and a forward of its own, such as one that masks or standardises the
    weight: the weight is rotated, and the forward runs on it as it will run on the merged one."""

    mixin = RotatedParameters
    input_hook = staticmethod(keep_off_fast_path)


class TurnedOutput(Derived):
    """Layers whose output is rotated in the place of their input, and not their bias (`side="output"`):
    W' = blockdiag(R)^T . W. A subclass says how the forward rotates."""

    def __init__(self, like: LayerType) -> None:
        super().__init__(like)
        self.row_dim = 1 - like.row_dim

    @override
    def rotated_weights(self, layer: Any) -> dict[str, RotatedWeight]:
        size = getattr(layer, "out_features", None)  # a quantized weight has a shape of its own
        return {"": RotatedWeight("weight", size or layer.weight.shape[self.like.row_dim], "output")}

    @override
    def to_matrix(self, layer: nn.Module, weight: Tensor) -> Tensor:
        return self.like.to_matrix(layer, weight).mT

    @override
    def from_matrix(self, layer: nn.Module, matrix: Tensor, weight: Tensor) -> Tensor:
        return self.like.from_matrix(layer, matrix.mT.contiguous(), weight)


class Attention(LayerType):
    """nn.MultiheadAttention, packed or with projections of its own for keys and values. It reads the weights of its projections
    and never calls them, so the weights rotate."""

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
