"""Walking a model under the names its author gave it, whatever has been wrapped around its parts since."""

import sys
from collections.abc import Iterable, Iterator, Mapping
from graphlib import TopologicalSorter
from itertools import accumulate

import torch
from torch import Tensor, nn

from lightning_oft.layers.rotation import Rotation
from lightning_oft.layers.state import LayerState, Record, record_of, rotations_of, state_of

_WRAPPERS = {
    "OptimizedModule": {"_orig_mod"},
    "FullyShardedDataParallel": {"_fsdp_wrapped_module"},
    "DistributedDataParallel": {"module"},
    "DataParallel": {"module"},
    "CheckpointWrapper": {"_checkpoint_wrapped_module"},
    "_FabricModule": {"_forward_module", "_original_module"},
}
"""Classes that wrap a module, and the attributes under which they keep it: no part of anybody's names."""

LIBRARY_MODELS = {"PreTrainedModel", "ModelMixin"}
"""Base classes of transformers' and diffusers' models."""


class Modules(dict[str, nn.Module]):
    """A model that has been walked: every module once, by its first name; the model itself is ''."""

    def __init__(self) -> None:
        super().__init__()
        self.aliases: dict[str, str] = {}  # further names of modules that have several, with the first one
        self.compiled: set[int] = set()  # ids of the modules that torch.compile wraps themselves

    def below(self, *tops: str) -> dict[str, nn.Module]:
        """Modules and everything inside them, by first names, wherever those are."""
        chosen = set(tops)

        def is_below(name: str) -> bool:
            return any(above in chosen for above in ("", *accumulate(name.split("."), joined)))

        while more := {first for alias, first in self.aliases.items() if is_below(alias)} - chosen:
            chosen |= more
        return {name: module for name, module in self.items() if is_below(name)}


def walk(model: nn.Module) -> Modules:
    """Every module of the model once, by its first name, without adapters and without wrappers' names:
    `net._orig_mod.head` is `net.head` here. A public call walks once and hands the result on."""
    found, seen = Modules(), dict[int, str]()

    def visit(module: nn.Module, name: str) -> None:
        if id(module) in seen:
            found.aliases[name] = seen[id(module)]
            return
        seen[id(module)] = name
        inside = set().union(*(_WRAPPERS.get(cls, set()) for cls in class_names(module)))
        if "_orig_mod" in inside:
            found.compiled.add(id(module._modules["_orig_mod"]))
        if not inside:
            found[name] = module
        for key, child in module._modules.items():
            if child is not None and (key != "oft_R" or state_of(module) is None):
                visit(child, name if key in inside else joined(name, key))

    visit(model, "")
    return found


def class_names(module: object) -> set[str]:
    """Names of an object's class and of all it derives from; asking them needs no import of their package."""
    return {cls.__name__ for cls in type(module).__mro__}


def joined(above: str, name: str) -> str:
    """The name of something below a module."""
    return f"{above}.{name}" if above and name else above or name


def is_inside(name: str, top: str) -> bool:
    """Whether a name is that of a module or of something below it."""
    return not top or name == top or name.startswith(f"{top}.")


def records(modules: Modules) -> list[tuple[str, nn.Module, Record]]:
    """(name, module, record) of the modules that have one."""
    return [(name, module, record) for name, module in modules.items() if (record := record_of(module)) is not None]


TIED_AGAIN = "a model that ties them when it is made loads one of the merged weights for both: leave one out with exclude_modules"
"""What is wrong with rotating a weight that several modules share, and the remedy."""


def adapted(modules: Mapping[str, nn.Module]) -> Iterator[tuple[str, nn.Module, LayerState]]:
    """(name, layer, state) of the adapted layers, merged ones too."""
    for name, module in modules.items():
        state = state_of(module)
        if state is not None:
            yield name, module, state


def oft_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The adapted layers by name, merged ones too. Each carries `.oft_R[adapter_name]`: a Rotation, or for
    nn.MultiheadAttention and experts a ModuleDict of them."""
    return {name: layer for name, layer, _ in adapted(walk(model))}


def adapter_names(modules: Modules) -> list[str]:
    """Names of the adapters that any layer has, in order of injection."""
    return list(dict.fromkeys(name for _, _, state in adapted(modules) for name in state.configs))


def active_names(modules: Modules) -> list[str]:
    """Names of the active adapters, in an order that agrees with that of every layer."""
    order: TopologicalSorter[str] = TopologicalSorter()
    for _, _, state in adapted(modules):
        for index, name in enumerate(state.active):
            order.add(name, *state.active[:index])
    return list(order.static_order())


def rotations(modules: Modules, adapter_name: str) -> dict[tuple[str, str], Rotation]:
    """The rotations of an adapter by layer and part."""
    return {
        (name, part): rotation
        for name, layer, state in adapted(modules)
        if adapter_name in state.configs
        for part, rotation in rotations_of(layer, adapter_name).items()
    }


def merged_layers(modules: Modules) -> dict[str, nn.Module]:
    """The adapted layers whose weights hold their rotations."""
    return {name: layer for name, layer, state in adapted(modules) if state.merged is not None}


def require_built(modules: Modules) -> None:
    """Raise ValueError where a module, adapted or not, cannot be frozen: it is lazy still, or TorchScript."""
    lazy = {name: one for name, one in modules.items() if isinstance(one, nn.modules.lazy.LazyModuleMixin)}
    if waiting := [name for name, module in lazy.items() if module.has_uninitialized_params()]:
        what = f"{some(waiting)}: its shape is not known yet"
        raise ValueError(f"{what}: run one batch through the model first to materialise it")
    if scripts := [name for name, module in modules.items() if isinstance(module, torch.jit.ScriptModule)]:
        what = f"{some(scripts)}: TorchScript, which takes no rotations and cannot be frozen part by part"
        raise ValueError(f"{what}: inject into the module that it was made of, and script it after a merge")


def require_adapter(modules: Modules, *names: str) -> None:
    """Raise ValueError where there is no adapter of one of these names."""
    known = adapter_names(modules)
    for name in names:
        if name not in known:
            raise ValueError(f"no adapter {name!r} here; there are: {', '.join(known) or 'none, call inject first'}")


def require_unmerged(modules: Modules, action: str) -> None:
    """Raise RuntimeError where a layer is merged: its rotations cannot be changed under its weights."""
    merged = merged_layers(modules)
    if merged:
        raise RuntimeError(f"cannot {action}: {some(merged)} are merged; call unmerge(model) first")


def require_enabled(modules: Modules, action: str) -> None:
    """Raise RuntimeError inside `disable_adapters`, which puts back at its end what it found at its beginning."""
    if any(not state.enabled for _, _, state in adapted(modules)):
        raise RuntimeError(f"cannot {action} inside disable_adapters: leave its context first")


def library_root(modules: Modules, names: Iterable[str]) -> str:
    """The name of the topmost transformers or diffusers model that holds all these layers and tensors, else of the
    model itself. Files written from there have the keys that those libraries know."""
    names = list(names)
    roots = (name for name, module in modules.items() if class_names(module) & LIBRARY_MODELS)
    return next((root for root in roots if all(is_inside(name, root) for name in names)), "")


def own_tensors(module: nn.Module) -> list[str]:
    """Names of a module's own parameters and of those buffers that are saved."""
    skipped = module._non_persistent_buffers_set
    tensors = [*module._parameters.items(), *((k, b) for k, b in module._buffers.items() if k not in skipped)]
    return [key for key, tensor in tensors if tensor is not None]


def tensor_of(module: nn.Module, key: str) -> Tensor:
    """A module's own parameter or buffer. Raises AttributeError where it has none of this name."""
    return module.get_parameter(key) if key in module._parameters else module.get_buffer(key)


def some(names: Iterable[str], limit: int = 4) -> str:
    """The first few names in a readable line: `a, b, c, d and 12 more`."""
    listed = [name or "the model itself" for name in names]
    more = f" and {len(listed) - limit} more" if len(listed) > limit else ""
    return ", ".join(listed[:limit]) + more


def has_compiled_code() -> bool:
    """Whether torch.compile has compiled anything in this process. Lightning imports it in any case."""
    dynamo = sys.modules.get("torch._dynamo")
    return dynamo is not None and bool(dynamo.convert_frame.input_codes.seen_ids)


def counted(number: int, noun: str) -> str:
    """`1 layer`, `2 layers`."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def reset_compiled_code() -> None:
    """Drop what torch.compile has compiled: it does not see hooks change, and old code would go on answering."""
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()
