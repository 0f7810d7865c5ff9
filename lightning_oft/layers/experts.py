"""Experts of a mixture: the linear layers of all of them stacked in the 3-D parameters of one module.

Shapes: t tokens, e experts, h hidden size, m inner size. `gate_up_proj` (e, 2m, h), or `up_proj` (e, m, h) where there is
no gate, and `down_proj` (e, h, m); stored transposed, (e, h, 2m) and (e, m, h).
"""

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from typing_extensions import override

from lightning_oft.layers.base import LayerType, RotatedWeight, has_forward_of_its_own, register_layer_type
from lightning_oft.layers.own_forward import RotatedParameters, class_below, view_of, weight_in_use
from lightning_oft.layers.state import applied_rotations, rotations_of, state_of

_ENTRIES = ("gate_up_proj", "up_proj")
_EXIT = "down_proj"
_GATED = ("grouped_mm", "batched_mm")
"""Implementations of transformers that call `_apply_gate`, or `act_fn` without a gate, once for all that down_proj reads."""


class _RotatedExperts(RotatedParameters):
    def forward(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Run the module's own forward on a rotated input, (t, h), with what reaches down_proj rotated too: that costs
        two products, where rotated weights would be a copy of all experts. Of a forward that may do more with its
        input, or an implementation that shows nothing of its inside, weights are rotated."""
        base = class_below(self)
        if not _is_dispatched(base):
            return super().forward(hidden_states, *args, **kwargs)
        for rotation in applied_rotations(self, _entry(self)):
            hidden_states = rotation(hidden_states)
        rotations, gate = applied_rotations(self, _EXIT), "_apply_gate" if _entry(self) == "gate_up_proj" else "act_fn"
        if not rotations:
            return base.forward(self, hidden_states, *args, **kwargs)
        if getattr(self.config, "_experts_implementation", None) not in _GATED or not hasattr(self, gate):
            weight = weight_in_use(self, _EXIT, RotatedWeight(_EXIT, rotations[0].fan_in))
            return base.forward(view_of(self, base, {_EXIT: weight}), hidden_states, *args, **kwargs)

        def gated(*given: Any) -> Tensor:
            inner: Tensor = getattr(self, gate)(*given)
            for rotation in rotations:
                inner = rotation(inner)
            return inner

        view = view_of(self, base, {})
        view.__dict__[gate] = gated
        return base.forward(view, hidden_states, *args, **kwargs)


def _is_dispatched(cls: Any) -> bool:
    """Whether a class leaves its forward to transformers' choice of implementations. These compute the same thing in
    several ways, so that nothing but the first projection can be reading the input."""
    return getattr(cls.forward, "__globals__", {}).get("__name__") == "transformers.integrations.moe"


def _entry(layer: nn.Module) -> str:
    """The name of the weight that reads the common input."""
    return next((name for name in _ENTRIES if name in layer._parameters), _ENTRIES[0])


class Experts(LayerType):
    """The experts of one layer of a mixture: one rotation of their common input, one of what their down_proj reads.

    `is_transposed` says how the weights of a class are stored; by default the module itself does, as those of
    transformers do.
    """

    name = "experts"
    in_all_linear = True
    mixin = _RotatedExperts

    def __init__(self, is_transposed: bool | None = None) -> None:
        self.is_transposed = is_transposed

    @override
    def matches(self, module: nn.Module, is_registered: bool) -> bool:
        """By what the module itself holds; packed weights have names that begin alike."""
        own = [
            (key, tensor)
            for key, tensor in (*module._parameters.items(), *module._buffers.items())
            if tensor is not None
        ]
        is_flat = any(key == _EXIT and tensor.dim() == 2 and tensor.is_floating_point() for key, tensor in own)
        return not is_flat and all(any(key.startswith(names) for key, _ in own) for names in (_ENTRIES, _EXIT))

    @override
    def refusal(self, layer: nn.Module) -> str | None:
        names = (_entry(layer), _EXIT)
        weights: list[Any] = [getattr(layer, name, None) for name in names]
        if not all(isinstance(weight, Tensor) and _is_plain(weight) for weight in weights):
            return "its experts are quantized or packed: load the base without quantization"
        if not self._fits(layer, *weights):
            cls, flag = type(layer).__name__, self._is_transposed(layer)
            shapes = ", ".join(f"{name} {tuple(one.shape)}" for name, one in zip(names, weights, strict=True))
            if flag is None:
                what = f"nothing says how a {cls} stores its experts ({shapes})"
                return f"{what}: say it with register_layer_type({cls}, like=Experts(is_transposed=...))"
            what = f"the layout of its experts is not known ({shapes}, is_transposed={flag})"
            return f"{what}: add it to exclude_modules, or register a LayerType for {cls}"
        if _is_cut(layer, weights):
            what = "its experts are cut by tensor or expert parallelism"
            return f"{what}, where each process would train another rotation: load the model without it"
        if state_of(layer) is None and has_forward_of_its_own(layer):
            what = "its forward was replaced on the instance (by a device_map?), which hides that of a class"
            return f"{what}: adapt the model before that"
        return None

    @override
    def rotated_weights(self, layer: nn.Module) -> dict[str, RotatedWeight]:
        if self.refusal(layer) is not None:
            return {}
        dim = 1 if self._is_transposed(layer) else 2
        return {name: RotatedWeight(name, _fan(layer, name, dim)) for name in (_entry(layer), _EXIT)}

    @override
    def to_matrix(self, layer: nn.Module, weight: Tensor) -> Tensor:
        return (weight.mT if self._is_transposed(layer) else weight).flatten(0, 1)

    @override
    def from_matrix(self, layer: nn.Module, matrix: Tensor, weight: Tensor) -> Tensor:
        if self._is_transposed(layer):
            return matrix.view(weight.mT.shape).mT.contiguous()
        return matrix.view(weight.shape)

    def _is_transposed(self, layer: nn.Module) -> bool | None:
        return self.is_transposed if self.is_transposed is not None else getattr(layer, "is_transposed", None)

    def _fits(self, layer: nn.Module, entry: Tensor, leave: Tensor) -> bool:
        """Whether the shapes are those of the layout: e, h and m agree, and the first projection makes m or 2m."""
        is_transposed = self._is_transposed(layer)
        if hasattr(entry, "_fsdp_flattened"):
            return True
        if is_transposed is None or entry.dim() != 3 or leave.dim() != 3 or "gate_proj" in layer._parameters:
            return False
        (e, made, h), (also_e, also_h, m) = ((w.mT if is_transposed else w).shape for w in (entry, leave))
        return (e, h) == (also_e, also_h) and made == (2 * m if _entry(layer) == "gate_up_proj" else m)


def _fan(layer: nn.Module, name: str, dim: int) -> int:
    """The size of the dimension that is rotated. Of a layer that FSDP1 has wrapped, which shows flat parts of its weights,
    the rotations know it."""
    weight: Any = getattr(layer, name)
    if weight.dim() == 3:
        return int(weight.shape[dim])
    state = state_of(layer)
    found = (rotations_of(layer, adapter) for adapter in (state.configs if state is not None else ()))
    return next((rotations[name].fan_in for rotations in found if name in rotations), 0)


def _is_plain(weight: Tensor) -> bool:
    is_known = type(weight.data) is Tensor or hasattr(weight, "to_local")
    return is_known and weight.is_floating_point() and weight.element_size() > 1


def _is_cut(layer: nn.Module, weights: Iterable[Any]) -> bool:
    """Whether a process has some of the experts or a part of each; FSDP2, which cuts along dim 0 too, gathers them."""
    places = [place for weight in weights for place in getattr(weight, "placements", ())]
    return getattr(layer, "_is_expert_parallel", False) or any(getattr(place, "dim", 0) != 0 for place in places)


register_layer_type(None, Experts())
