"""Merged models on disk, made without touching the model that is in memory: also of a quantized base, dequantized."""

import copy
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_oft.codecs import is_sharded, packed_codec
from lightning_oft.formats.pretrained import Companions, companions_of, roots_of, write_model
from lightning_oft.layers.base import layer_type_of, restore_class
from lightning_oft.layers.linear import TransposedLinear
from lightning_oft.model.folding import folded_weights
from lightning_oft.model.packed import packed_names
from lightning_oft.model.traversal import (
    Modules,
    adapted,
    class_names,
    joined,
    own_tensors,
    require_enabled,
    some,
    tensor_of,
    walk,
)

Dtype = torch.dtype | str | None


def save_merged(
    model: nn.Module, directory: str | Path, dtype: Dtype = None, max_shard_size: int | str | None = None
) -> Path:
    """Write what the model computes with its active rotations as a plain pretrained directory; the model stays as it is.

    Quantized weights are written dequantized, all of them and not only the rotated ones, and the configuration says
    nothing of quantization, so that plain transformers or diffusers load the directory. What the active adapters train
    whole is in it, and so are the generation configuration, and the tokenizer and processors of a LightningModule or
    of the folder or hub id that the model was loaded from. Several library models in one module, such as those of a
    pipeline, get a directory each, by name. A tied weight that was rotated in one of its places is tied
    no longer. Takes the memory of the merged model beside the model.

    Args:
        model: a model with adapters, merged or not, quantized or not.
        directory: where to write; appears complete or not at all. A model that is there is replaced.
        dtype: of all floating-point tensors, such as "bfloat16"; by default each keeps its own, and dequantized ones
            get that of the others. float32 spares a rounding.
        max_shard_size: of the files, such as "2GB"; the library's own default otherwise.

    Returns:
        The directory.

    Raises:
        ValueError: no adapter, no such dtype, or the weights are sharded over processes.
        FileExistsError: something is there that is no model.
        OSError: the directory cannot be written; what was there is untouched.
    """
    if not any(True for _ in adapted(walk(model))):
        raise ValueError("nothing to merge: the model has no adapter; call inject or load_adapter first")
    for name, root in roots_of(model).items():
        config: Any = getattr(root, "config", None)
        base = config.get("_name_or_path") if isinstance(config, dict) else getattr(config, "_name_or_path", None)
        companions = [*companions_of(model), *([Companions(base)] if base else [])]
        write_merged(root, Path(directory, name), dtype, max_shard_size, companions)
    return Path(directory)


def write_merged(
    root: nn.Module,
    directory: str | Path,
    dtype: Dtype = None,
    max_shard_size: int | str | None = None,
    companions: Iterable[Any] = (),
) -> Path:
    """`save_merged` of one of the models that are written, with what stands beside it."""
    wanted, modules = as_dtype(dtype), walk(root)
    require_enabled(modules, "save a merged model")
    sharded = [name for name, parameter in root.named_parameters() if is_sharded(parameter)]
    if sharded:
        what = f"{some(sharded)} are sharded over processes"
        raise ValueError(f"{what}: write the merged model with OFTFinetuning(export_dir=...), or in one process")
    options = {} if max_shard_size is None else {"max_shard_size": max_shard_size}
    state, is_untied = merged_state(modules, wanted)
    if "PreTrainedModel" in class_names(root):
        plain = _plain_transformer(root, state, wanted, is_untied)
    elif "ModelMixin" in class_names(root):
        plain = _plain_diffuser(root, state)
    else:
        from huggingface_hub import save_torch_state_dict

        return write_model(directory, lambda place: save_torch_state_dict(state, place, **options), companions)  # type: ignore[arg-type]
    return write_model(directory, lambda place: plain.save_pretrained(place, **options), companions)


def as_dtype(dtype: Dtype) -> torch.dtype | None:
    """A floating-point dtype by its name. Raises ValueError where it is none."""
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if dtype is not None and not (isinstance(found, torch.dtype) and found.is_floating_point):
        raise ValueError(f"dtype={dtype!r}: must be a floating-point dtype, such as 'float32' or 'bfloat16'")
    return found


@torch.no_grad()
def merged_state(modules: Modules, dtype: torch.dtype | None) -> tuple[dict[str, Tensor], bool]:
    """The tensors of a walked model as its active adapters have them, plain, by name; and whether rotating has given a
    weight that several places share two values."""
    folds = {
        joined(name, weight.part.parameter): weight
        for name, layer, one in adapted(modules)
        if one.merged is None
        for weight in folded_weights(layer, one)
    }
    plain = [
        (joined(name, key), m, key) for name, m in modules.items() if packed_codec(m) is None for key in own_tensors(m)
    ]
    floats = (parameter.dtype for _, m, key in plain if (parameter := m._parameters.get(key)) is not None)
    usual = next((own for own in floats if own.is_floating_point), None)
    state: dict[str, Tensor] = {}
    values: dict[int, Tensor] = {}  # what is shared stays so
    for name, module, key in plain:
        tensor = tensor_of(module, key)
        own = dtype or tensor.dtype if tensor.is_floating_point() else tensor.dtype
        shared = values.setdefault(id(tensor), tensor.detach().to(own))
        state[name] = folds[name].folded(dtype=own) if name in folds else shared
    for name, module, codec in ((name, m, packed_codec(m)) for name, m in modules.items()):
        if codec is not None:
            weight, bias = joined(name, "weight"), getattr(module, "bias", None)
            fold = folds.get(weight)
            dequantized = codec.read(module, "weight") if fold is None else fold.folded(dtype=dtype or usual)
            state[weight] = dequantized.to(dtype or usual or dequantized.dtype)
            if isinstance(bias, Tensor):
                state[joined(name, "bias")] = bias.detach().to(state[weight].dtype)
    turned = {id(tensor_of(module, key)) for name, module, key in plain if name in folds}
    is_untied = any(id(tensor_of(module, key)) in turned for name, module, key in plain if name not in folds)
    for alias, first in modules.aliases.items():
        state |= {alias + name.removeprefix(first): t for name, t in state.items() if name.startswith(f"{first}.")}
    return state, is_untied


def _plain_transformer(root: Any, state: dict[str, Tensor], dtype: torch.dtype | None, is_untied: bool) -> Any:
    """A transformers model of the same class that has these tensors and was never quantized."""
    config = copy.deepcopy(root.config)
    parts = (config, *(getattr(config, name, None) for name in getattr(config, "sub_configs", ())))
    for part in (part for part in parts if part is not None):
        for key in ("quantization_config", "_pre_quantization_dtype", "_is_quantized"):
            vars(part).pop(key, None)
        if is_untied and getattr(part, "tie_word_embeddings", False):
            part.tie_word_embeddings = False
        if dtype is not None:
            part.dtype = dtype
    plain = _on_meta(root, lambda: type(root)(config), state)
    if not is_untied:
        plain.tie_weights()
    if getattr(root, "generation_config", None) is not None:
        plain.generation_config = root.generation_config
    return plain


def _plain_diffuser(root: Any, state: dict[str, Tensor]) -> Any:
    config = {key: value for key, value in root.config.items() if key != "quantization_config"}
    return _on_meta(root, lambda: type(root).from_config(config), state)


def _on_meta(root: Any, make: Any, state: dict[str, Tensor]) -> Any:
    with torch.device("meta"):
        plain = make()
    restore_class(plain)  # that of an adapted model speaks up when it is saved
    for part, module in list(plain.named_children()):  # one that its maker asked to be left out, such as BERT's pooler
        if module.state_dict() and not any(name.startswith(f"{part}.") for name in state):
            setattr(plain, part, None)
    modules = dict(plain.named_modules(remove_duplicate=False))
    for name in packed_names(root):  # packed as (o, i), whatever the class that is quantized
        if isinstance(layer_type_of(modules[name]), TransposedLinear):
            state[f"{name}.weight"] = state[f"{name}.weight"].mT.contiguous()
    # What a plain model has no place for is left out, such as scales of weights that are plain again by now.
    lacking = plain.load_state_dict(state, strict=False, assign=True).missing_keys
    if lacking:
        raise ValueError(
            f"a plain {type(plain).__name__} has {some(lacking)}, which this one lacks: nothing is written"
        )
    return plain
