"""Full-weight patches, as ComfyUI adds them to a model: what an adapter has changed, `<name>.diff` of a weight and
`<name>.diff_b` of a bias. They hold no rotation, so any layer that merges can be in one.

Names and sums: https://github.com/comfyanonymous/ComfyUI/blob/master/comfy/lora.py
"""

from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import torch
from torch import Tensor, nn

from lightning_oft.codecs import is_sharded
from lightning_oft.formats.errors import AdapterFileError
from lightning_oft.formats.prefixes import DIFFUSERS, checked, placed, prefix_of_class
from lightning_oft.formats.pretrained import roots_of
from lightning_oft.formats.tensor_file import keys_of, write_tensors
from lightning_oft.model.adapter_state import copied
from lightning_oft.model.folding import folded_weights
from lightning_oft.model.saved_modules import BASE, saved_tensors
from lightning_oft.model.traversal import Modules, adapted, joined, require_enabled, require_unmerged, some, walk

_OWN = (
    "diffusion_model."  # names of ComfyUI's own model, the only ones under which it knows more than `weight` and `bias`
)


@torch.no_grad()
def save_patch(model: nn.Module, file: str | Path, prefix: str | None = None) -> Path:
    """Write what the active adapters change of a model as a full-weight patch; the model stays as it is.

    Each change is merged weight less base weight, computed in float32 and stored in the dtype of the base. What the
    adapters train whole, such as biases, is in it too.

    Args:
        model: a model with adapters, unmerged, quantized or not.
        file: where to write, a `.safetensors` file; appears complete or not at all.
        prefix: what the names of ComfyUI's weights begin with; where it ends with an underscore, the dots of a path become
            underscores too. None for that of a diffusers model that is known.

    Returns:
        The file.

    Raises:
        AdapterFileError: nothing says the names, a tensor has none, nothing is changed, or the file cannot be written.
        ValueError: no adapter, or the weights are sharded over processes.
        RuntimeError: the model is merged, or inside disable_adapters.
    """
    modules = walk(model)
    require_unmerged(modules, "write a patch")
    require_enabled(modules, "write a patch")
    if not any(True for _ in adapted(modules)):
        raise ValueError("nothing to write: the model has no adapter; call inject or load_adapter first")
    if sharded := [name for name, parameter in model.named_parameters() if is_sharded(parameter)]:
        raise ValueError(f"{some(sharded)} are sharded over processes: write the patch in one process")
    roots = roots_of(model)
    if prefix is not None and len(roots) > 1:
        raise AdapterFileError(f"prefix={prefix!r} is of one model, not of {some(roots)}: give one of them")
    starts = {root: checked(prefix) if prefix else prefix_of_class(type(root).__name__) for root in roots.values()}
    tensors = {
        _key(start, name): copied(change) for root, start in starts.items() for name, change in _changes(walk(root))
    }
    return write_tensors(file, tensors)


def _changes(modules: Modules) -> Iterator[tuple[str, Tensor]]:
    """What the active adapters change of a walked model, by the names of its tensors."""
    for name, layer, state in adapted(modules):
        for weight in folded_weights(layer, state):
            before = weight.read()
            exact = torch.promote_types(before.dtype, torch.float32)
            change = weight.folded(dtype=exact) - before.to(exact)
            yield joined(name, weight.part.parameter), change.to(before.dtype)
    for name, tensor, slot in saved_tensors(modules):
        if slot.live != BASE and tensor.is_floating_point():  # counters of batches are none
            yield name, tensor.detach() - slot.waiting[BASE].to(tensor)


def _key(prefix: str, name: str) -> str:
    """The key of a tensor's change."""
    owner, _, kind = name.rpartition(".")
    if kind == "weight":
        return f"{placed(prefix, owner)}.diff"
    if kind == "bias" and prefix != DIFFUSERS:
        return f"{placed(prefix, owner)}.diff_b"
    if kind != "bias" and prefix == _OWN:
        return f"{prefix}{name}.diff"
    raise AdapterFileError(
        f"{name}: ComfyUI has no name for it under {prefix!r}; give its own, 'diffusion_model.', or leave it out"
    )


def is_patch(path: Path) -> bool:
    """Whether a path is a full-weight patch."""
    return any(key.endswith((".diff", ".diff_b")) for key in keys_of(path))


def refuse_patch(path: Path, name: str | None) -> NoReturn:
    """Raises AdapterFileError: there is nothing in a patch that could be an adapter again."""
    what = "is a full-weight patch: its rotations are in the changes of the weights, and cannot be told apart"
    raise AdapterFileError(f"{path}: {what}; give the adapter that it was written from")
