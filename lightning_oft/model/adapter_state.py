"""AdapterState: an adapter off its model. Every file format, checkpoint and export is a function over it."""

import logging
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from itertools import accumulate
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_oft import functional
from lightning_oft.codecs import whole
from lightning_oft.config import OFTConfig
from lightning_oft.layers.state import rotations_of, state_of
from lightning_oft.model import saved_modules, traversal
from lightning_oft.model.fingerprint import base_fingerprint, changed_bases, each_read_once, trained_beside
from lightning_oft.model.mergeable import OFFLOADED, report_untrained
from lightning_oft.model.targets import matches, saved_names
from lightning_oft.model.traversal import Modules, adapted, is_inside, joined, own_tensors, some

log = logging.getLogger(__name__)


class LayerRotations(NamedTuple):
    """The rotations of one layer; the part's name is empty where a layer has one rotation.
    Generators are (n, b(b-1)/2) float32 in this library's convention, (1, b(b-1)/2) of a shared block."""

    layer_type: str  # the name of the layer's LayerType; empty where a file does not say it
    is_known_to_peft: bool  # whether PEFT computes the same with them
    block_sizes: dict[str, int]  # size b of the blocks by part
    generators: dict[str, Tensor]  # by part
    exact_parts: tuple[str, ...] = ()  # those that have left the series of the configuration for the exact map
    magnitudes: Mapping[str, Tensor] = MappingProxyType({})  # logarithms of the scales of neurons by part, (o,) float32


class Base(NamedTuple):
    """What a file says of the model that an adapter belongs to."""

    class_name: str
    library: str
    name_or_path: str | None


@dataclass(frozen=True)
class AdapterState:
    """An adapter off its model. Names are relative to the module that they are rooted at.

    `root` is that module's name in the model it was taken from; None where a file of another library does not say it.
    `saved` are the tensors trained whole (modules_to_save and biases), in the dtype they have in the model.
    `modules_to_save` names the outermost modules trained whole; of another library's file, what their names end with.
    """

    name: str
    config: OFTConfig
    layers: dict[str, LayerRotations]
    root: str | None = None
    saved: dict[str, Tensor] = field(default_factory=dict)
    modules_to_save: list[str] = field(default_factory=list)
    carried: dict[str, Tensor] = field(default_factory=dict)  # base values that PEFT expects in a file beside `saved`
    fingerprints: dict[str, str] = field(default_factory=dict)  # of the base weights, by layer
    base: Base | None = None  # the model at the root
    has_flat_names: bool = False  # whether underscores stand where the model's names have dots
    inverse_types: tuple[str, ...] = ()  # layer types whose generators are those of the inverse rotation here
    has_unique_names: bool = True  # whether no other module has a name that ends like that of a layer PEFT knows
    source: str = ""  # the path it was read from, for messages
    extra: dict[str, Any] = field(default_factory=dict)  # what a file says besides, such as `peft_version`

    def generators(self) -> dict[str, Tensor]:
        """All generators by layer; those of a layer with parts by `<layer>.<part>`."""
        layers = self.layers.items()
        return {joined(name, part): values for name, one in layers for part, values in one.generators.items()}

    def known_to_peft(self) -> list[str]:
        """Names of the layers with which PEFT computes the same."""
        return [name for name, rotations in self.layers.items() if rotations.is_known_to_peft]

    def in_one_map(self) -> "AdapterState":
        """The same rotations by the exact map alone, where some have left the series: a file has one map for all. The
        others get the generators by which the exact map turns as their series does."""
        return self.in_exact_map() if any(one.exact_parts for one in self.layers.values()) else self

    def in_exact_map(self) -> "AdapterState":
        """The same rotations by the exact map alone, whatever they were computed by."""
        if not self.config.use_cayley_neumann:
            return self
        terms, halved = self.config.num_cayley_neumann_terms, self.config.neumann_series == "halved"

        def exact(part: str, generator: Tensor, one: LayerRotations) -> Tensor:
            is_exact = part in one.exact_parts
            return (
                generator if is_exact else functional.exact_generator(generator, one.block_sizes[part], terms, halved)
            )

        layers = {
            name: one._replace(generators={p: exact(p, g, one) for p, g in one.generators.items()}, exact_parts=())
            for name, one in self.layers.items()
        }
        return replace(
            self, layers=layers, config=replace(self.config, use_cayley_neumann=False, neumann_series="halved")
        )

    def is_beyond_reach(self) -> bool:
        """Whether the adapter's own series is off orthogonality by more than float32 is."""
        if not self.config.use_cayley_neumann:
            return False
        terms, halved = self.config.num_cayley_neumann_terms, self.config.neumann_series == "halved"
        errors = (
            functional.error_bound(generator.float(), one.block_sizes[part], terms, halved)
            for one in self.layers.values()
            for part, generator in one.generators.items()
            if part not in one.exact_parts
        )
        return any(error > functional.SERIES_TOLERANCE for error in errors)

    def rooted(self, root: str) -> "AdapterState":
        """The same adapter with names that start at another module; at '' they are those of the whole model. Raises
        ValueError where a layer or tensor is not below that module."""

        def moved(name: str) -> str:
            full = joined(self.root or "", name)
            if not is_inside(full, root):
                raise ValueError(f"{full} is not below {root}")
            return full.removeprefix(root).removeprefix(".")

        tables = ("layers", "saved", "carried", "fingerprints")
        named: Any = {table: {moved(name): v for name, v in getattr(self, table).items()} for table in tables}
        return replace(self, root=root, modules_to_save=[moved(name) for name in self.modules_to_save], **named)


def take(model: nn.Module, adapter_name: str = "default") -> AdapterState:
    """An adapter of a model, merged or not, as copies on the CPU. Every process must call it where tensors are sharded.

    Raises:
        ValueError: there is no such adapter, or a generator is not finite or not at hand; names it.
    """
    modules = traversal.walk(model)
    traversal.require_adapter(modules, adapter_name)
    absent = [name for (name, _), one in traversal.rotations(modules, adapter_name).items() if one.weight.is_meta]
    if absent:
        what = f"the rotations of {some(absent)} are on the meta device, not loaded or offloaded"
        raise ValueError(f"{what}; {OFFLOADED}")
    with each_read_once():
        _report_left_out(modules, adapter_name)
        state = describe(modules, adapter_name, copied)
    generators = state.generators()
    scales = {joined(name, part): one for name, own in state.layers.items() for part, one in own.magnitudes.items()}
    found = {name: [one, *([scales[name]] if name in scales else [])] for name, one in generators.items()}
    report_untrained({name: any(bool(one.any()) for one in own) for name, own in found.items()}, "adapter")
    broken = [name for name, own in found.items() if not all(bool(one.isfinite().all()) for one in own)]
    if broken:
        what = f"generators of {some(broken)} are NaN or infinite; nothing was written"
        raise ValueError(f"{what}: load an earlier state of the adapter")
    return state


def _report_left_out(modules: Modules, adapter_name: str) -> None:
    """Warn of what a file of an adapter will lack, though the model has learned it."""
    layers = {name: layer for name, layer, state in adapted(modules) if adapter_name in state.configs}
    if changed := changed_bases(layers):
        warnings.warn(
            f"the weights of {some(changed)} have changed since the injection: adapter {adapter_name!r} belongs to them as "
            "they are now, and is refused by the base as it was; keep them too, or write all by save_merged",
            stacklevel=4,
        )
    if left := [name for name in trained_beside(modules) if name.rpartition(".")[0] not in changed]:
        warnings.warn(
            f"{some(left)}: trained or changed beside adapter {adapter_name!r} and no part of it, so its file lacks them: "
            "name their modules in modules_to_save (for biases: bias='all') at the injection, or keep them too",
            stacklevel=4,
        )


@torch.no_grad()
def copied(tensor: Tensor) -> Tensor:
    """A copy on the CPU with memory of its own; a sharded tensor is gathered."""
    return whole(tensor).detach().to("cpu", copy=True).contiguous()


def describe(modules: Modules, adapter_name: str, value_of: Any = torch.Tensor.detach) -> AdapterState:
    """An adapter as it stands in a walked model; its tensors as `value_of` makes them, by default the model's own."""
    layers = {name: (layer, state) for name, layer, state in adapted(modules) if adapter_name in state.configs}
    saved = _saved(modules, adapter_name)
    root_name = traversal.library_root(modules, [*layers, *saved])
    root, config = modules[root_name], next(iter(layers.values()))[1].configs[adapter_name]
    log.info("adapter %r: names start at %s (%s)", adapter_name, root_name or "the model", type(root).__name__)
    found = {}
    for name, (layer, state) in layers.items():
        parts, is_known = rotations_of(layer, adapter_name), state.layer_type.is_known_to_peft(layer)
        sizes = {part: rotation.block_size for part, rotation in parts.items()}
        generators = {part: value_of(rotation.weight) for part, rotation in parts.items()}
        exact = tuple(part for part, one in parts.items() if one.terms is None and config.use_cayley_neumann)
        scales = {part: value_of(one.magnitude) for part, one in parts.items() if one.magnitude is not None}
        is_known = is_known and not scales
        found[name] = LayerRotations(state.layer_type.name, is_known, sizes, generators, exact, scales)
    own = getattr(root, "config", None)
    path = own.get("_name_or_path") if isinstance(own, Mapping) else getattr(own, "_name_or_path", None)
    described = AdapterState(
        name=adapter_name,
        config=config,
        layers=found,
        root="",
        saved=saved,
        modules_to_save=modules_trained_whole(saved, config),  # by full names, as the configuration has them
        fingerprints={name: one for name, layer in layers.items() if (one := base_fingerprint(*layer)) is not None},
        base=Base(type(root).__name__, type(root).__module__, path if isinstance(path, str) and path else None),
    ).rooted(root_name)
    inside = {
        name.removeprefix(root_name).removeprefix("."): module
        for name, module in modules.items()
        if is_inside(name, root_name)
    }
    names = set(described.known_to_peft())
    endings = {name.rpartition(".")[2] for name in names}  # PEFT compares the ends of names; this leaves few to compare
    others = [name for name in inside if name not in names and name.rpartition(".")[2] in endings]
    return replace(
        described,
        saved={name: value_of(tensor) for name, tensor in described.saved.items()},
        carried={name: value_of(tensor) for name, tensor in _carried(inside, described).items()},
        has_unique_names=not any(other.endswith(f".{name}") for other in others for name in names),
    )


def _saved(modules: Modules, adapter_name: str) -> dict[str, Tensor]:
    """What the adapter trained whole, by every name it has: a head that shares the embedding's weight trained both."""
    owned = [one for one in saved_modules.saved_tensors(modules) if adapter_name in one.slot.owners]
    saved = {one.name: one.value(adapter_name) for one in owned}
    names = {id(one.tensor): one.name for one in owned}
    for owner, module in modules.items() if names else ():
        for key, parameter in module._parameters.items():
            if id(parameter) in names and joined(owner, key) not in saved and state_of(module) is None:
                saved[joined(owner, key)] = saved[names[id(parameter)]]
    return saved


def modules_trained_whole(saved: Iterable[str], config: OFTConfig) -> list[str]:
    """The modules that tensors belong to: the outermost that modules_to_save names, else the owner of a tensor that is
    no bias, such as an embedding tied to a head."""
    items = saved_names(config)
    found: dict[str, None] = {}
    for name in saved:
        owner, _, key = name.rpartition(".")
        above = accumulate(owner.split("."), joined)
        found[next((module for module in above if matches(module, items)), "" if "bias" in key else owner)] = None
    found.pop("", None)
    return [name for name in found if not any(is_inside(name, other) for other in found if other != name)]


def _carried(inside: Mapping[str, nn.Module], state: AdapterState) -> dict[str, Tensor]:
    """Base values of what PEFT will take for a module to save: it asks for names *ending* in `classifier`, so that
    `pre_classifier` is one too, and refuses a file without its tensors."""
    endings = (*state.modules_to_save, *(name for name, must in saved_names(state.config).items() if not must))
    swept = [name for name in inside if endings and name.endswith(endings)]
    tops = [name for name in swept if not any(is_inside(layer, name) for layer in state.layers)]
    return {
        joined(name, key): saved_modules.base_value(module, key)
        for name, module in inside.items()
        if any(is_inside(name, top) for top in tops)
        for key in own_tensors(module)
        if joined(name, key) not in state.saved
    }
