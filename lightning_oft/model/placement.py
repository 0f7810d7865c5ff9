"""Where the names and shapes of an AdapterState are in a model. Everything that does not fit is refused here."""

from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lightning_oft.codecs import is_sharded
from lightning_oft.config import OFTConfig
from lightning_oft.functional import block_size_of
from lightning_oft.layers.base import layer_type_of, layer_types, refusal, rotated_weights_of
from lightning_oft.model import traversal
from lightning_oft.model.adapter_state import AdapterState, LayerRotations
from lightning_oft.model.saved_modules import base_value
from lightning_oft.model.targets import matches, owners_of
from lightning_oft.model.traversal import Modules, is_inside, joined, some


class AdapterError(ValueError):
    """An adapter that does not fit a model: where, what, remedy. Nothing changed."""


class PlacedTensor(NamedTuple):
    """A tensor trained whole: the module that has it, under which name, and the adapter's values."""

    module: nn.Module
    key: str
    value: Tensor

    def tensor(self) -> Tensor:
        """The model's own tensor."""
        return traversal.tensor_of(self.module, self.key)


class Place(NamedTuple):
    """Where a state goes in a model: its layers and generators by the model's names, `saved` by the state's names."""

    root: str
    layers: dict[str, dict[str, int]]  # block sizes by part
    generators: dict[tuple[str, str], Tensor]
    saved: dict[str, PlacedTensor]
    exact: set[tuple[str, str]]  # the rotations that have left their series
    magnitudes: dict[tuple[str, str], Tensor]


def find_place(modules: Modules, state: AdapterState) -> Place:
    """Find the module that the state's names start at, and check every name and shape against the model."""
    traversal.require_built(modules)
    state = with_dots(modules, state)
    owners = owners_of(modules)  # where another layer reads a layer's weight, the rotation is a part of that one's
    root = _find_root(modules, owners, state)
    generators, exact, magnitudes = {}, set(), {}
    for name, found in state.layers.items():
        for part, generator in found.generators.items():
            full = joined(root, name)
            key = owners.get(full, (full, "")) if not part else (full, part)
            _check_rotation(modules, key, name, found, generator, state.config)
            kind = layer_type_of(modules[key[0]])
            generators[key] = -generator if kind is not None and kind.name in state.inverse_types else generator
            if part in found.exact_parts:
                exact.add(key)
            if part in found.magnitudes:
                magnitudes[key] = found.magnitudes[part]
                _check_magnitude(modules, key, name, len(magnitudes[key]))
    sizes = {key: block_size_of(generator.shape[1]) for key, generator in generators.items()}
    names = {layer for layer, _ in sizes}
    layers = {
        name: {part: sizes[name, part] for part in rotated_weights_of(module) if (name, part) in sizes}
        for name, module in modules.items()
        if name in names
    }
    return Place(root, layers, generators, _place_tensors(modules, state, root), exact, magnitudes)


def with_dots(modules: Modules, state: AdapterState) -> AdapterState:
    """A state with the model's own names, of one whose file has underscores where these have dots. They begin at the model
    or at a transformers or diffusers model in it. Raises AdapterError where they do not fit one alone."""
    if not state.has_flat_names:
        return state
    inner = [name for name, module in modules.items() if traversal.class_names(module) & traversal.LIBRARY_MODELS]
    tables: dict[str, dict[str, list[str]]] = {}
    for root in dict.fromkeys([*inner, ""]):
        table = tables.setdefault(root, {})
        for name, module in modules.items():
            if is_inside(name, root) and layer_type_of(module, state.config.side) is not None:
                own = name.removeprefix(root).removeprefix(".")
                table.setdefault(own.replace(".", "_"), []).append(own)
    found = [root for root, table in tables.items() if all(name in table for name in state.layers)]
    if len(found) > 1:
        what = f"its names fit {some(found)} alike"
        raise AdapterError(f"{what}; load it into the one that you mean, load_adapter(model.{found[0]}, ...)")
    if not found:
        best = max(tables, key=lambda root: sum(name in tables[root] for name in state.layers))
        lost = [name for name in state.layers if name not in tables[best]]
        raise AdapterError(
            f"{best or 'the model'} has no {some(lost)} to rotate; load it into the model it was trained on"
        )
    names = {name: tables[found[0]][name] for name in state.layers}
    if unclear := [name for name, meant in names.items() if len(meant) > 1]:
        raise AdapterError(f"{some(unclear)}: may be {' or '.join(names[unclear[0]])}; rename a module of the model")
    layers = {names[name][0]: one for name, one in state.layers.items()}
    config = replace(state.config, target_modules=list(layers))
    return replace(state, layers=layers, config=config, root=found[0], has_flat_names=False)


def _tensor_place(modules: Modules, name: str) -> tuple[nn.Module, str] | None:
    above, _, key = name.rpartition(".")
    module = modules.get(above)
    if module is None:  # a second name of a shared module
        try:
            module = modules[""].get_submodule(above)
        except AttributeError:
            return None
    return (module, key) if isinstance(getattr(module, key, None), Tensor) else None


def _find_root(modules: Modules, owners: Mapping[str, tuple[str, str]], state: AdapterState) -> str:
    """The module below which every name exists: where it was, the model, a model inside it, any module."""

    def missing(root: str) -> list[str]:
        layers = {name: joined(root, name) for name in state.layers}
        lost = [name for name, full in layers.items() if owners.get(full, (full, ""))[0] not in modules]
        return lost + [name for name in state.saved if _tensor_place(modules, joined(root, name)) is None]

    inner = [name for name, module in modules.items() if traversal.class_names(module) & traversal.LIBRARY_MODELS]
    stored = [state.root] if state.root is not None and state.root in modules else []
    for candidates in (stored, [""], inner, list(modules)):
        found = [root for root in candidates if not missing(root)]
        if len(found) == 1:
            return found[0]
        if found:
            what = f"its names fit {some(found)} alike"
            raise AdapterError(f"{what}; load it into the one that you mean, load_adapter(model.{found[0]}, ...)")
    best = min([*stored, "", *inner], key=lambda root: len(missing(root)))
    lacks = f"{best or 'the model'} has no {some(missing(best))}"
    raise AdapterError(f"{lacks}; load the adapter into the model it was trained on")


def _check_rotation(
    modules: Modules, key: tuple[str, str], name: str, found: LayerRotations, generator: Tensor, config: OFTConfig
) -> None:
    """Raise AdapterError where a layer cannot take a rotation."""
    where, module, part = some([name]), modules[key[0]], key[1]
    layer_type, weights = layer_type_of(module, config.side), rotated_weights_of(module, config.side)
    if layer_type is None or part not in weights:
        raise AdapterError(f"{where} is a {type(module).__name__}, which this rotation does not fit; use its own model")
    reason = refusal(module, config.side)
    if reason is not None:
        raise AdapterError(f"{where} cannot be adapted: {reason}")
    owner = module.get_submodule(weights[part].parameter.rpartition(".")[0])
    if any(parameter is not None and parameter.is_meta for parameter in owner._parameters.values()):
        raise AdapterError(f"{where} is on the meta device: give the model its weights before loading an adapter")
    theirs = layer_types().get(found.layer_type)
    if theirs is not None and theirs.peft_key != layer_type.peft_key:
        what = f"{where} is a {type(module).__name__}, the file holds a rotation of a layer of type {theirs.name}"
        raise AdapterError(f"{what}; use its own model")
    blocks, size, fan = generator.shape[0], block_size_of(generator.shape[1]), weights[part].fan
    if fan % size or blocks != (1 if config.block_share else fan // size):
        turned = "with one shared block turn another one" if config.block_share else f"turn {blocks * size}"
        what = f"{where} has {config.fan} {fan}, the file's {blocks} blocks of {size} {turned}"
        raise AdapterError(f"{what}; load the adapter into the model it was trained on")


def _check_magnitude(modules: Modules, key: tuple[str, str], name: str, count: int) -> None:
    """Raise AdapterError where a layer has another number of neurons."""
    neurons = rotated_weights_of(modules[key[0]])[key[1]].neurons
    if neurons != count:
        what = f"{some([name])} has {neurons or 'no'} neurons to scale, the file {count} magnitudes"
        raise AdapterError(f"{what}; load the adapter into the model it was trained on")


def _place_tensors(modules: Modules, state: AdapterState, root: str) -> dict[str, PlacedTensor]:
    """The tensors that were trained whole: PEFT also writes the base's own weight of an adapted embedding."""
    expected, placed = _expected_tensors(modules, state, root), {}
    for name, value in state.saved.items():
        spot = _tensor_place(modules, joined(root, name))
        assert spot is not None  # else the root would be another
        tensor, base = traversal.tensor_of(*spot), base_value(*spot)
        if value.shape != tensor.shape:
            what = f"{name} has shape {tuple(tensor.shape)} in the model and {tuple(value.shape)} in the file"
            sizes = "the sizes it was trained with (number of classes, resized vocabulary)"
            raise AdapterError(f"{what}; build the model with {sizes}")
        if value.is_floating_point() != tensor.is_floating_point():
            raise AdapterError(f"{name} is {value.dtype}, {tensor.dtype} in the model; save it again")
        if name not in expected and not is_sharded(base) and torch.equal(value.to(base), base):
            continue
        # A buffer may hold infinities on purpose, such as a mask: then the model's own does too.
        is_finite = isinstance(tensor, nn.Parameter) or bool(base.isfinite().all())
        if is_finite and not bool(value.isfinite().all()):
            raise AdapterError(f"{name} is NaN or infinite; train the adapter again")
        placed[name] = PlacedTensor(*spot, value)
    lost = [name for name in sorted(expected) if name not in state.saved]
    if lost:
        what = f"its configuration says that {some(lost)} were trained, and the file lacks them"
        raise AdapterError(f"{what}; save it again")
    return placed


def _expected_tensors(modules: Modules, state: AdapterState, root: str) -> set[str]:
    """Names of the tensors that the configuration says were trained whole."""
    cut = len(root) + 1 if root else 0
    inside = {name[cut:]: module for name, module in modules.items() if is_inside(name, root) and name != root}
    heads = state.modules_to_save
    # Ours are whole names; PEFT also compares their ends.
    tops = [name for name in inside if (name in heads if state.root is not None else matches(name, heads))]
    below = set(map(id, modules.below(*(joined(root, top) for top in tops)).values()))
    expected = {joined(name, key) for name, m in inside.items() if id(m) in below for key in traversal.own_tensors(m)}
    if state.config.bias == "none":
        return expected
    for name in state.layers:
        layer = modules.get(joined(root, name))
        if layer is not None and layer._parameters.get("bias") is not None:
            expected.add(joined(name, "bias"))
    return expected | {name for name in state.saved if "bias" in name}
