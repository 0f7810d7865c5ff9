"""Plan: the resolved answer to what inject will do to a model. Everything that can be refused is refused here."""

import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_oft.codecs import local_part, parameter_of
from lightning_oft.config import OFTConfig
from lightning_oft.layers.base import LayerType
from lightning_oft.layers.state import state_of
from lightning_oft.model.targets import Target, find_targets, matches, saved_names
from lightning_oft.model.traversal import Modules, own_tensors, require_enabled, require_unmerged, some, tensor_of


class PlannedLayer(NamedTuple):
    """A layer to adapt, and the block size of each of its parts that gets a rotation."""

    layer: nn.Module
    layer_type: LayerType
    block_sizes: dict[str, int]


@dataclass(frozen=True)
class Plan:
    """What inject will do: the layers to adapt by name (those that have the adapter already stay as they are), and the
    tensors to train whole, (module, name of its own parameter or buffer)."""

    adapter_name: str
    config: OFTConfig
    layers: dict[str, PlannedLayer]
    saved: list[tuple[nn.Module, str]] = field(default_factory=list)


def plan_injection(modules: Modules, config: OFTConfig, adapter_name: str, strict: bool = True) -> Plan:
    """Resolve a configuration on a model, which stays untouched; `strict` makes names that match nothing an error.

    Raises:
        ValueError: nothing matches, or a target cannot be adapted; names it and the remedy.
        RuntimeError: the model is merged, or inside disable_adapters.
    """
    planned = _block_sizes(find_targets(modules, config, strict), config, adapter_name)
    saved = _saved_modules(modules, config, strict)
    plan = Plan(adapter_name, config, planned, _saved_tensors(modules, saved, planned, config))
    _check_not_trained_too(planned, plan.saved, modules)
    check(modules, plan)
    return plan


def check(modules: Modules, plan: Plan) -> None:
    """Raise where a plan cannot be carried out, wherever it comes from."""
    name: Any = plan.adapter_name
    if not isinstance(name, str) or not name or "." in name or hasattr(nn.ModuleDict(), name):
        raise ValueError(
            f"adapter_name={name!r}: must be a non-empty string without dots and no name of nn.ModuleDict's own"
        )
    require_unmerged(modules, "inject an adapter")
    require_enabled(modules, "inject an adapter")
    _check_same_config(plan)
    _check_gradient_path(plan.layers)


def nearest_divisor(number: int, wanted: int) -> int:
    """The divisor of `number` nearest to `wanted`, the lower one of two at the same distance; as in PEFT."""
    if wanted >= number:
        return number
    divisors = [d for d in range(1, number + 1) if number % d == 0]
    return min(divisors, key=lambda d: (abs(d - wanted), d))


def _block_sizes(targets: Mapping[str, Target], config: OFTConfig, adapter_name: str) -> dict[str, PlannedLayer]:
    """Layers with their block sizes; one warning names the layers whose size had to be adjusted."""
    planned: dict[str, PlannedLayer] = {}
    adjusted: dict[str, list[str]] = {}
    for name, (layer, layer_type, parts) in targets.items():
        fans = {part: weight.fan for part, weight in layer_type.rotated_weights(layer).items() if part in parts}
        sizes = {part: _block_size(name, fan, config) for part, fan in fans.items()}
        state = state_of(layer)
        for part, fan in fans.items() if state is None or adapter_name not in state.configs else ():
            if config.r and fan // sizes[part] != config.r:
                note = f"r={fan // sizes[part]} instead of {config.r} for fan-in {fan}"
            elif not config.r and sizes[part] != config.oft_block_size:
                note = f"block size {sizes[part]} instead of {config.oft_block_size} for fan-in {fan}"
            else:
                continue
            adjusted.setdefault(note, []).append(name)
        planned[name] = PlannedLayer(layer, layer_type, sizes)
    if adjusted:
        lines = "; ".join(f"{note}: {some(dict.fromkeys(names))}" for note, names in adjusted.items())
        warnings.warn(f"block sizes adjusted to divide the fan-in: {lines}", stacklevel=4)
    return planned


def _block_size(name: str, fan: int, config: OFTConfig) -> int:
    size = fan // nearest_divisor(fan, config.r) if config.r else nearest_divisor(fan, config.oft_block_size or 0)
    if size < 2:
        asked = f"r={config.r}" if config.r else f"oft_block_size={config.oft_block_size}"
        raise ValueError(
            f"{name or 'the model itself'}: fan-in {fan} with {asked} leaves blocks of size 1, that is no parameter at "
            f"all; add it to exclude_modules, or use a block size near a divisor of {fan}"
        )
    return size


def _saved_modules(modules: Modules, config: OFTConfig, strict: bool) -> list[str]:
    """Names of the modules that modules_to_save means. Raises ValueError for a name that matches nothing."""
    required, implied = saved_names(config)
    missing = [item for item in required if not any(name and matches(name, [item]) for name in modules)]
    if missing and strict:
        children = some(dict.fromkeys(name.partition(".")[0] for name in modules if name))
        raise ValueError(f"modules_to_save: {some(missing)} matches no module; the model's own are {children}")
    return [name for name in modules if name and matches(name, [*required, *implied])]


def _saved_tensors(
    modules: Modules, saved: list[str], planned: Mapping[str, PlannedLayer], config: OFTConfig
) -> list[tuple[nn.Module, str]]:
    """What modules_to_save and `bias` train whole."""
    below = set(map(id, modules.below(*saved).values()))
    found = [(module, key) for module in modules.values() if id(module) in below for key in own_tensors(module)]
    owners = {id(module) for layer, _, _ in planned.values() for module in layer.modules()}
    for module in modules.values() if config.bias != "none" else ():
        if id(module) not in below and (config.bias == "all" or id(module) in owners):
            biases = (key for key, parameter in module._parameters.items() if parameter is not None and "bias" in key)
            found += [(module, key) for key in biases]
    return found


def _check_same_config(plan: Plan) -> None:
    mine = asdict(plan.config)
    for name, planned in plan.layers.items():
        state = state_of(planned.layer)
        theirs = asdict(state.configs.get(plan.adapter_name, plan.config)) if state is not None else mine
        changed = [f"{key}={theirs[key]!r}, now {mine[key]!r}" for key in mine if mine[key] != theirs[key]]
        if changed:
            raise ValueError(
                f"{name or 'the model itself'}: adapter {plan.adapter_name!r} is already there with another configuration "
                f"({'; '.join(changed)}): unload(model) to start anew, keep its configuration to train it further, or "
                "choose another adapter_name"
            )


def _check_not_trained_too(
    planned: Mapping[str, PlannedLayer], saved: list[tuple[nn.Module, str]], modules: Modules
) -> None:
    """A rotated weight that is tied to a trained one would train too, and no adapter file could say so."""
    trained = {id(tensor_of(module, key)): module for module, key in saved}
    for name, (layer, layer_type, sizes) in planned.items() if trained else ():
        for part in sizes:
            owner = trained.get(id(parameter_of(layer, layer_type.rotated_weights(layer)[part].parameter)))
            if owner is not None:
                other = next(known for known, module in modules.items() if module is owner)
                raise ValueError(
                    f"{name or 'the model itself'}: its weight is also that of {other} (they are tied), which "
                    "modules_to_save trains whole; leave one of the two out"
                )


def _check_gradient_path(planned: Mapping[str, PlannedLayer]) -> None:
    """A base that passes no gradient to its input would leave its rotation untrained without a word."""
    fresh = {name: layer for name, (layer, _, _) in planned.items() if state_of(layer) is None}
    dead = [name for name, layer in fresh.items() if hasattr(layer, "in_features") and _is_dead(layer)]
    if dead:
        raise ValueError(
            f"{some(dead)}: the output of the base layer does not require grad when its input does, so a rotation of "
            "the input could never train (activation quantization is such a case); exclude these layers or load the "
            "base with weight-only quantization"
        )


def _is_dead(layer: Any) -> bool:
    weight = getattr(layer, "weight", None)
    if type(layer) is nn.Linear and isinstance(weight, Tensor) and type(local_part(weight.data)) is Tensor:
        return False
    dtype = weight.dtype if isinstance(weight, Tensor) and weight.is_floating_point() else torch.float32
    device = next((p.device for p in layer._parameters.values() if p is not None), None)
    try:
        with torch.enable_grad():
            probe = torch.zeros(1, layer.in_features, dtype=dtype, device=device, requires_grad=True)
            output = layer(probe)
            if not isinstance(output, Tensor) or not output.requires_grad:
                return isinstance(output, Tensor)
            return torch.autograd.grad(output.sum(), probe, allow_unused=True)[0] is None
    except Exception:  # a layer that cannot run here and now; the guard after the first backward sees it
        return False
