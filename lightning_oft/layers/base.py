"""LayerType: a kind of arithmetic, and the registry that says which modules compute it.

Base parameter names and classes never change, so a plain checkpoint still loads and a merged model is a plain one.
Shapes: o fan-out, i fan-in; every weight is folded as a matrix (rows, fan) whose last dimension the rotation turns.
"""

import functools
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.hooks import RemovableHandle

from lightning_oft import functional


class SwappedClass:
    """Mixed into the class of a module that keeps its identity. Prints, pickles and copies as what it was."""

    _oft_base: type[nn.Module]

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced = super().__reduce_ex__(protocol)
        if type(self).__dict__.get("_oft_base") is None:  # another library has put a class of its own on top
            return reduced
        mixin, base = type(self).__mro__[1], self._oft_base
        return (_rebuild, (mixin, base), *reduced[2:])


@functools.cache
def _subclass(mixin: type, base: type) -> type[nn.Module]:
    names = {key: getattr(base, key) for key in ("__module__", "__qualname__", "__doc__")}
    return type(base.__name__, (mixin, base), {"_oft_base": base, **names})


def _rebuild(mixin: type, base: type[nn.Module]) -> nn.Module:
    cls = _subclass(mixin, base)  # type: ignore[arg-type]
    return cls.__new__(cls)


def has_forward_of_its_own(module: nn.Module) -> bool:
    """Whether a forward was put on the instance; not the one of its class, which accelerate leaves there."""
    forward = module.__dict__.get("forward")
    return forward is not None and getattr(forward, "__func__", None) is not type(module).forward


def swap_class(module: nn.Module, mixin: type) -> None:
    """Let the module's methods be looked up in `mixin` first; once, however often it is called."""
    if not isinstance(module, mixin):
        if not has_forward_of_its_own(module):
            module.__dict__.pop("forward", None)
        module.__class__ = _subclass(mixin, type(module))  # type: ignore[arg-type]


def restore_class(module: nn.Module) -> None:
    """Give the module its own class back. Where another class was put on top, ours stays below and does nothing."""
    base = type(module).__dict__.get("_oft_base")
    if base is not None:
        module.__class__ = base


Side = Literal["input", "output"]


class RotatedWeight(NamedTuple):
    """One weight that a rotation turns: by its input, W' = W . blockdiag(R)^T, or output, W' = blockdiag(R)^T . W."""

    parameter: str  # name of the parameter, `weight` or `out_proj.weight`
    fan: int  # size of the dimension that is rotated
    side: Side = "input"
    neurons: int | None = None  # rows of the matrix, which magnitudes scale; None where the type cannot do that


class LayerType(ABC):
    """A kind of arithmetic: which weights are rotated, how the forward rotates and how a weight folds.

    A subclass needs `name`, `rotated_weights` and what rotates: a mixin, a hook or its own `attach` and `detach`.
    The rest has defaults that fit weights stored as (o, ...).
    """

    name = ""
    row_dim = 0  # dimension of the weight whose entries are rotated each by itself
    in_all_linear = False  # whether `target_modules="all-linear"` selects such layers
    peft_key = "oft_R"  # under which PEFT's files have the generators of such a layer
    mixin: type | None = None  # a SwappedClass whose methods rotate
    input_hook: Callable[..., Any] | None = None  # a forward pre-hook with keyword arguments, as a staticmethod
    output_hook: Callable[..., Any] | None = None  # a forward hook, as a staticmethod
    scale_hook: Callable[..., Any] | None = None  # one for layers with magnitudes whose weight is used as it is

    @functools.cached_property
    def turned(self) -> "LayerType | None":
        """The type that rotates the output of the same layers instead, and not their bias; None where there is none."""
        return None

    @abstractmethod
    def rotated_weights(self, layer: nn.Module) -> dict[str, RotatedWeight]:
        """The rotated weights by part name; one nameless part where a layer has a single rotation."""

    def can_rotate(self) -> bool:
        """Whether there is anything for `attach` to put on a layer."""
        ways = (self.mixin, self.input_hook, self.output_hook)
        return type(self).attach is not LayerType.attach or any(way is not None for way in ways)

    def attach(self, layer: nn.Module) -> None:
        """Make the layer's forward rotate; once, however often it is called."""
        if self.mixin is not None:
            swap_class(layer, self.mixin)
        if self.input_hook is not None:
            if self.input_hook not in layer._forward_pre_hooks.values():
                layer.register_forward_pre_hook(self.input_hook, with_kwargs=True)
            # Last of all: a hook that changes the input changes that of a merged layer, which is not rotated.
            for key in [key for key, hook in layer._forward_pre_hooks.items() if hook is self.input_hook]:
                layer._forward_pre_hooks.move_to_end(key)  # type: ignore[attr-defined]
        if self.output_hook is not None and self.output_hook not in layer._forward_hooks.values():
            # First of all: a hook that was there before sees the vectors that a merged layer would give it.
            layer.register_forward_hook(self.output_hook, prepend=True)
        if self.scale_hook is not None:
            has_magnitudes = any(getattr(one, "magnitude", None) is not None for one in layer.oft_R.modules())  # type: ignore[union-attr]
            if has_magnitudes and self.scale_hook not in layer._forward_hooks.values():
                layer.register_forward_hook(self.scale_hook, prepend=True)

    def detach(self, layer: nn.Module) -> None:
        """Give the layer its own forward back."""
        restore_class(layer)
        for hooks in (layer._forward_pre_hooks, layer._forward_hooks):
            for key in [
                key for key, hook in hooks.items() if hook in (self.input_hook, self.output_hook, self.scale_hook)
            ]:
                hooks.pop(key)
                layer._forward_pre_hooks_with_kwargs.pop(key, None)

    def matches(self, module: nn.Module, is_registered: bool) -> bool:
        """Whether a module computes this arithmetic: one of a registered class, or one that only resembles it."""
        return is_registered

    def refusal(self, layer: nn.Module) -> str | None:
        """Why a layer that resembles this type cannot be adapted, with the remedy; None where it can. Named, it is an
        error; "all-linear" leaves it out and says so."""
        return None

    def is_known_to_peft(self, layer: nn.Module) -> bool:
        """Whether PEFT computes the same with the generators of this layer."""
        return False

    def example(self, layer: nn.Module) -> tuple[Tensor, ...] | None:
        """Inputs, small and float32 where they are no indices, on which a forward of the layer can be tried; None where
        nobody knows them."""
        return None

    def to_matrix(self, layer: nn.Module, weight: Tensor) -> Tensor:
        """The weight as (rows, fan)."""
        return weight.flatten(1)

    def from_matrix(self, layer: nn.Module, matrix: Tensor, weight: Tensor) -> Tensor:
        """A matrix of to_matrix in the shape and memory format of the weight."""
        return in_format_of(matrix.view(weight.shape), weight)

    def scale_of(self, layer: nn.Module, scale_o: Tensor, weight: Tensor) -> Tensor:
        """Scales of the rows of `to_matrix`, as what the weight is multiplied by: (1, .., o, .., 1), o at `row_dim`."""
        return scale_o.view([-1 if dim == self.row_dim else 1 for dim in range(weight.dim())])

    def fold(self, layer: nn.Module, part: RotatedWeight, weight: Tensor, rotations: list[Tensor], out: Tensor) -> None:
        """Write into `out` the weight that does alone what it did with the rotations, computed in their dtype. `out` may
        be the weight itself, and is written at once. With the inverses of the rotations, the last one first, it undoes
        itself."""
        matrix = self.to_matrix(layer, weight).to(rotations[0].dtype)
        # y = base(x . Ra . Rb): a weight that is turned by its input meets the last rotation first.
        factors = [rotation.mT for rotation in rotations] if part.side == "output" else rotations[::-1]
        for rotation in factors[:-1]:
            matrix = functional.rotate_weight(matrix, rotation)
        place = self.to_matrix(layer, out)
        if place.data_ptr() == out.data_ptr():  # a view of it
            functional.rotate_weight(matrix, factors[-1], out=place)
        else:
            out.copy_(self.from_matrix(layer, functional.rotate_weight(matrix, factors[-1]), weight))


_registered: OrderedDict[int, tuple[type | None, LayerType]] = OrderedDict()
"""Module classes and their types; without a class, a type that finds its modules by what they resemble."""


def register_layer_type(
    module_class: type[nn.Module] | None, like: type[nn.Module] | LayerType = nn.Linear
) -> RemovableHandle:
    """Say how modules of a class, and of its subclasses, are rotated. The handle's `remove()` undoes it.

    Args:
        module_class: the class to adapt; None for a LayerType that knows its modules by what they resemble.
        like: a class that computes the same arithmetic from its parameters (`nn.Linear` for x @ W.T + b), or a
            LayerType of one's own.

    The forward of a registered class is taken at its word: it is not tried against the arithmetic of its type, as that
    of an unknown subclass is.

    Raises:
        TypeError: `module_class` is no module class, or `like` a LayerType that is no instance or rotates nothing.
        ValueError: `like` is a class that cannot be adapted itself.
    """
    is_class = isinstance(module_class, type) and issubclass(module_class, nn.Module)
    if not is_class and not (module_class is None and isinstance(like, LayerType)):
        raise TypeError(f"register_layer_type({module_class!r}): takes a subclass of nn.Module")
    if isinstance(like, type) and issubclass(like, LayerType):
        raise TypeError(f"register_layer_type(like={like.__name__}): takes an instance, {like.__name__}()")
    if isinstance(like, LayerType) and not like.can_rotate():
        what = f"register_layer_type(like={type(like).__name__}()): nothing of it rotates"
        raise TypeError(f"{what}; give it a mixin, an input_hook, an output_hook or an attach of its own")
    layer_type = like if isinstance(like, LayerType) else _type_of_class(like)
    if layer_type is None:
        raise ValueError(f"register_layer_type({module_class!r}, like={like!r}): `like` itself cannot be adapted")
    handle = RemovableHandle(_registered)
    _registered[handle.id] = (module_class, layer_type)
    return handle


def _type_of_class(module_class: Any) -> LayerType | None:
    """The type registered for a class or for the nearest class that it derives from."""
    known = dict(_registered.values())
    return next((known[cls] for cls in getattr(module_class, "__mro__", ()) if cls in known), None)


def layer_type_of(module: nn.Module, side: Side = "input") -> LayerType | None:
    """The arithmetic of a module, rotated on a side; None where it is not known, or not on this side."""
    found = _type_of_class(type(module))
    if found is not None:
        found = found if found.matches(module, True) else None
    else:
        found = next((one for _, one in _registered.values() if one.matches(module, False)), None)
    return found.turned if found is not None and side == "output" else found


_TRUSTED = ("torch.nn.modules.", "transformers.pytorch_utils", "bitsandbytes.", "hqq.", "torchao.", "aqlm.", "awq.",
            "gptqmodel.", "auto_gptq.", "eetq.", "neural_compressor.", "optimum.quanto.")  # fmt: skip
"""Where the forwards of module classes are those of their types; quantized layers read their weight in ways of their own
and compute what it stands for."""


def has_own_forward(module: nn.Module) -> bool:
    """Whether a module of a known type runs a forward that nobody has said to be that of its type: that of a subclass,
    or one that was put on the instance."""
    if "forward" in module.__dict__ and not hasattr(module, "_hf_hook"):  # accelerate's calls the one that was there
        return True
    classes = type(module).__mro__
    registered = {cls for cls, _ in _registered.values()}
    known: Any = next((cls for cls in classes if cls in registered), object)
    definers = (next((cls for cls in classes if name in vars(cls)), object) for name in ("forward", "_conv_forward"))
    return not all(issubclass(known, cls) or f"{cls.__module__}.".startswith(_TRUSTED) for cls in definers)


def rotated_weights_of(module: nn.Module, side: Side = "input") -> dict[str, RotatedWeight]:
    """The weights of a module that can be rotated on a side, by part name; none where its arithmetic is not known."""
    layer_type = layer_type_of(module, side)
    return layer_type.rotated_weights(module) if layer_type is not None else {}


def layer_types() -> dict[str, LayerType]:
    """The registered types by name, as files have it."""
    return {layer_type.name: layer_type for _, layer_type in _registered.values()}


def refusal_of_type(module: nn.Module, side: Side = "input") -> str | None:
    """Why the type of a module refuses it, or to rotate it on a side; None where it does not."""
    plain, layer_type = layer_type_of(module), layer_type_of(module, side)
    if plain is not None and layer_type is None:
        return f"side='output' is not for layers of type {plain.name}: add it to exclude_modules, or rotate the input"
    return layer_type.refusal(module) if layer_type is not None else None


def refusal(module: nn.Module, side: Side = "input") -> str | None:
    """Why a module of a known type cannot be adapted as it stands, with the remedy; None where it can."""
    if (reason := refusal_of_type(module, side)) is not None:
        return reason
    if isinstance(module, nn.modules.lazy.LazyModuleMixin) and module.has_uninitialized_params():
        return "its shape is not known yet: run one batch through the model first to materialise it"
    if parametrize.is_parametrized(module):
        return "its weight is parametrized: call torch.nn.utils.parametrize.remove_parametrizations first"
    for part in rotated_weights_of(module).values():
        owner = part.parameter.rpartition(".")[0]
        if owner and (reason := refusal(module.get_submodule(owner))) is not None:
            return f"of its {owner}, {reason}"
    names = [*module._parameters, *module._buffers]
    for suffix, remedy in (("_g", "remove_weight_norm"), ("_orig", "remove_spectral_norm or prune.remove")):
        if any(name.endswith(f"weight{suffix}") for name in names):
            return f"its weight is recomputed at every forward: call torch.nn.utils.{remedy} first"
    return None


def in_format_of(tensor: Tensor, model: Tensor) -> Tensor:
    """The tensor in the memory format of another: a channels_last convolution must not become a slow one."""
    for dims, memory_format in ((4, torch.channels_last), (5, torch.channels_last_3d)):
        if model.dim() == dims and not model.is_contiguous() and model.is_contiguous(memory_format=memory_format):
            return tensor.contiguous(memory_format=memory_format)
    return tensor.contiguous()
