"""Walking a model under the names its author gave it, whatever has been wrapped around its parts since."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from lightning_oft.layers import is_adapted, state_of

_WRAPPERS = {
    "OptimizedModule": {"_orig_mod"},
    "FullyShardedDataParallel": {"_fsdp_wrapped_module"},
    "DistributedDataParallel": {"module"},
    "DataParallel": {"module"},
    "CheckpointWrapper": {"_checkpoint_wrapped_module"},
    "_FabricModule": {"_forward_module", "_original_module"},
}
"""Classes that wrap a module, and the attributes under which they keep it: no part of anybody's names."""


def class_names(module: nn.Module) -> set[str]:
    """Names of the module's class and of all it derives from; asking them needs no import of their package."""
    return {cls.__name__ for cls in type(module).__mro__}


def walk(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every module of the model once, under its first name, without wrappers' names and without adapters.

    `named_modules` would do but for the wrappers: `net._orig_mod.head` is `net.head` here.
    """
    yield from _walk(model, "", set())


def _walk(module: nn.Module, name: str, seen: set[int]) -> Iterator[tuple[str, nn.Module]]:
    if id(module) in seen:
        return
    seen.add(id(module))
    hidden = set().union(*(_WRAPPERS.get(cls, set()) for cls in class_names(module)))
    if not hidden:
        yield name, module
    for child_name, child in module._modules.items():
        if child is None or (child_name == "oft_R" and is_adapted(module)):
            continue
        inner = name if child_name in hidden else f"{name}.{child_name}" if name else child_name
        yield from _walk(child, inner, seen)


def oft_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The adapted layers by name, merged ones too. Each carries `.oft_R[adapter_name]`: a Rotation, or for
    nn.MultiheadAttention a ModuleDict of them."""
    return {name: module for name, module in walk(model) if is_adapted(module)}


def adapter_names(model: nn.Module) -> list[str]:
    """Names of the adapters that any layer of the model has, in order of injection."""
    names: dict[str, None] = {}
    for layer in oft_layers(model).values():
        state = state_of(layer)
        names.update(dict.fromkeys(state.configs if state else ()))
    return list(names)


def merged_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The adapted layers whose weights hold their rotations."""
    return {name: layer for name, layer in oft_layers(model).items() if (s := state_of(layer)) and s.merged is not None}


def require_unmerged(model: nn.Module, action: str) -> None:
    """Raise RuntimeError where a layer is merged: its rotations cannot be changed under its weights."""
    merged = merged_layers(model)
    if merged:
        raise RuntimeError(f"cannot {action}: {some(merged)} are merged; call unmerge(model) first")


def require_enabled(model: nn.Module, action: str) -> None:
    """Raise RuntimeError inside `disable_adapters`, which puts back at its end what it found at its beginning."""
    if any(not state.enabled for layer in oft_layers(model).values() if (state := state_of(layer))):
        raise RuntimeError(f"cannot {action} inside disable_adapters: leave its context first")


LIBRARY_MODELS = {"PreTrainedModel", "ModelMixin"}
"""Base classes of transformers' and diffusers' models."""


def library_root(model: nn.Module, names: Iterable[str]) -> tuple[str, nn.Module]:
    """(name, module) of the topmost transformers or diffusers model that holds all these layers and tensors, else the
    model itself. Files written from there have the keys that those libraries know."""
    names = list(names)
    top = next(walk(model))[1]
    for name, module in walk(model):
        inside = all(other == name or other.startswith(f"{name}.") for other in names) if name else True
        if inside and class_names(module) & LIBRARY_MODELS:
            return name, module
    return "", top


def some(names: Iterable[str], limit: int = 4) -> str:
    """The first few names in a readable line: `a, b, c, d and 12 more`."""
    listed = [name or "the model itself" for name in names]
    more = f" and {len(listed) - limit} more" if len(listed) > limit else ""
    return ", ".join(listed[:limit]) + more


def fingerprint(weight: Tensor) -> str | None:
    """A short digest of a weight, `float32:9f2c...`: of its shape and 1,024 entries rounded to bfloat16, so that a
    base loaded in bfloat16 is recognised. None where the entries cannot be read (meta, packed or sharded)."""
    if weight.is_meta or not weight.is_floating_point() or type(weight.data) is not Tensor or weight.numel() == 0:
        return None
    flat = weight.detach().reshape(-1)
    entries = flat[:: max(1, flat.numel() // 1024)][:1024].to(torch.bfloat16).view(torch.int16).cpu()
    digest = hashlib.sha256(repr(tuple(weight.shape)).encode() + entries.numpy().tobytes()).hexdigest()
    return f"{str(weight.dtype).removeprefix('torch.')}:{digest[:16]}"


def same_base(mine: str | None, theirs: str | None) -> bool:
    """Whether two fingerprints can be of one weight. float16 rounds otherwise than bfloat16, so it only equals itself,
    and what cannot be told is not held against anybody."""
    if mine is None or theirs is None:
        return True
    (my_dtype, mine), (their_dtype, theirs) = mine.split(":", 1), theirs.split(":", 1)
    if my_dtype != their_dtype and "float16" in (my_dtype, their_dtype):
        return True
    return mine == theirs


def forget_compiled() -> None:
    """torch.compile does not see hooks come and go: compiled code of before would go on answering."""
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()
