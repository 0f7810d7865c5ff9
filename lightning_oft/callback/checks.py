"""What would otherwise go wrong in silence: each check is one error that names the layers and the remedy."""

import contextlib
import dataclasses
import difflib
import functools
import os
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from lightning_oft.codecs import is_scattered, is_sharded, packed_codec, parameter_of
from lightning_oft.config import OFTConfig
from lightning_oft.layers.rotation import Rotation
from lightning_oft.layers.state import rotations_of, state_of
from lightning_oft.model.first_forward import FirstForward, describe, is_compiled
from lightning_oft.model.folding import packed_layers
from lightning_oft.model.freezing import is_frozen_norm
from lightning_oft.model.mergeable import check_forward, check_stored, sparse_layers
from lightning_oft.model.traversal import Modules, adapted, class_names, joined, some, walk

_AVERAGES = {"WeightAveraging", "StochasticWeightAveraging"}
"""Names of the callbacks that copy the model."""
_CHOICES = {
    "keep_base": ("auto", "always", "never"),
    "export_from": ("last", "best"),
    "merged_dtype": ("float32", "bfloat16", "float16"),
}
_SWITCHES = ("enabled", "ignore_mismatched_base", "merge_on_fit_end", "save_adapter_only")
_PATHS = ("pretrained_adapter", "export_dir")


_UNSEEN = (
    "OFT: %s, so nobody sees whether a weight is used past its layer, where a merge would change the model: fit one batch "
    "without that to be told"
)


def check_arguments(config: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """Raise TypeError for a keyword that OFTConfig lacks or a value of a wrong type, ValueError for no such choice."""
    fields = [field.name for field in dataclasses.fields(OFTConfig)]
    if any(isinstance(value, OFTConfig) for value in (*given.values(), *config.values())):
        raise TypeError("OFTFinetuning takes the fields of an OFTConfig: OFTFinetuning(**dataclasses.asdict(config))")
    for name in config.keys() - fields:
        near = difflib.get_close_matches(name, fields, 1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are: {', '.join(fields)}"
        if name in ("lr", "learning_rate"):
            hint = "the rate is the optimizer's, in configure_optimizers"
        raise TypeError(f"OFTFinetuning has no option {name!r}; {hint}")
    for name, value in given.items():
        wanted: Any = bool if name in _SWITCHES else str | os.PathLike if name in _PATHS else str
        if value is not None and not isinstance(value, wanted):
            what = "true or false" if wanted is bool else "a string"
            raise TypeError(f"{name}={value!r}: must be {what}, got {type(value).__name__}")
        if value is not None and value not in _CHOICES.get(name, (value,)):
            raise ValueError(f"{name}={value!r}: must be one of {', '.join(_CHOICES[name])}")


def submodule(modules: Modules, path: str | None) -> nn.Module:
    """The module under a dotted path of a walked LightningModule. Raises ValueError where there is none."""
    if (path or "") in modules:
        return modules[path or ""]
    near = difflib.get_close_matches(path or "", [name for name in modules if name], 1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    children = some(name for name in modules if name and "." not in name)
    raise ValueError(f"oft.module={path!r}: the LightningModule has no such part{hint} (it has {children})")


def check_callbacks(trainer: Any, callback: Any, stage: str) -> None:
    """Raise ValueError where a callback that copies the model stands before this one, where two callbacks are alike or
    would write into one directory, or where the launcher would lose the adapter."""
    for other in trainer.callbacks[: trainer.callbacks.index(callback) if callback in trainer.callbacks else None]:
        if class_names(other) & _AVERAGES:
            raise ValueError(
                f"{type(other).__name__} stands before OFTFinetuning in Trainer(callbacks=...) and would average a "
                "model without rotations: put OFTFinetuning first"
            )
    twins = [other for other in trainer.callbacks if isinstance(other, type(callback)) and other.enabled]
    if sum(other.state_key == callback.state_key for other in twins) > 1:
        raise ValueError(
            f"two OFTFinetuning callbacks have module={callback.module!r} and adapter_name={callback.adapter_name!r}: "
            "leave one out, or give each layers of its own by module"
        )
    if stage != "fit":
        return
    places = [os.path.realpath(other.export_dir) for other in twins if other.export_dir is not None]
    if callback.export_dir is not None and places.count(os.path.realpath(callback.export_dir)) > 1:
        raise ValueError(
            f"two OFTFinetuning callbacks have export_dir={callback.export_dir!r}, and the second would replace what "
            "the first writes: give each a directory of its own"
        )
    if not callback.merge_on_fit_end:
        _check_launcher(trainer, "OFTFinetuning(merge_on_fit_end=False)", "leave merge_on_fit_end=True, or ")


def _check_launcher(trainer: Any, what: str, remedy: str = "") -> None:
    # Lightning loads the first process's state dict into the main process's model, and passes over what that one lacks.
    if "_MultiProcessingLauncher" in class_names(trainer.strategy.launcher):
        raise ValueError(
            f"{what}: processes that are spawned or forked (ddp_spawn, ddp_notebook) bring home weights and not the "
            f"adapter, which would be lost: {remedy}use strategy='ddp'"
        )


def can_merge(trainer: Any, callback: Any, modules: Modules) -> bool:
    """Whether the fit ends with a merge: of quantized or packed weights it does not. Warns where they are pruned. Raises
    ValueError where layers have become, since the injection, what takes no merge."""
    is_folded = callback.merge_on_fit_end or callback.export_dir is not None
    if is_folded:
        _check_unchanged(modules)
    if packed := packed_layers(modules):
        _check_launcher(trainer, f"the weights of {some(packed)} are quantized or packed and cannot be merged")
    elif is_folded and (sparse := sparse_layers(modules)):
        warnings.warn(
            f"the weights of {some(sparse)} are sparse, and the merge will fill their zeros: set merge_on_fit_end=False, "
            "which keeps the rotations beside them, or prune the merged model again"
        )
    return bool(callback.merge_on_fit_end) and not packed


def _check_unchanged(modules: Modules) -> None:
    for name, layer, state in adapted(modules):
        check_stored(name, layer)
        weights = (parameter_of(layer, part.parameter) for part in state.layer_type.rotated_weights(layer).values())
        if not any(weight is None or weight.is_meta or is_scattered(weight) for weight in weights):
            check_forward(name, layer)


def check_given(given: set[str], mine: OFTConfig, theirs: OFTConfig) -> None:
    """Raise ValueError for fields that were given beside a pretrained_adapter, whose file decides, and are not its. How
    magnitudes are fitted may be."""
    ours, files, default = (dataclasses.asdict(config) for config in (mine, theirs, OFTConfig()))
    is_whole = given >= files.keys()  # a command line gives every field: what is not the default was meant
    other = {
        name: f"{name}={ours[name]!r} (the file has {files[name]!r})"
        for name in sorted(given)
        if _in_order(ours[name]) != _in_order(files[name])
        and not (is_whole and ours[name] == default[name])
        and not (name == "magnitude" and ours[name] is not None)
    }
    if other:
        raise ValueError(
            f"{', '.join(other.values())}: the file of pretrained_adapter decides how layers are adapted: leave "
            f"{' and '.join(other)} out"
        )


def _in_order(value: Any) -> Any:
    return sorted(value) if isinstance(value, list) else value


def check_precision(trainer: Any, modules: Modules) -> None:
    """Raise ValueError where the Trainer's precision would cast the codes of quantized weights, and destroy them."""
    plugin = trainer.precision_plugin
    names = class_names(plugin)
    dtype = torch.float64 if "DoublePrecision" in names else getattr(plugin, "_desired_input_dtype", None)
    if not names & {"DoublePrecision", "HalfPrecision"} or dtype is None:
        return
    packed = {name: codec for name, module in modules.items() if (codec := packed_codec(module)) is not None}
    lost = [name for name, codec in packed.items() if not codec.survives_cast(modules[name], dtype)]
    if lost:
        raise ValueError(
            f"precision={plugin.precision!r} casts the quantized weights of {some(lost)}, which destroys them: use "
            "'bf16-mixed' or '32-true', or for '16-true' and 'bf16-true' load the base with bnb_4bit_quant_storage=uint8"
        )


def check_layers(injected: list[str], present: list[str], saved: list[str], still_saved: list[str]) -> None:
    """Raise RuntimeError where layers, or modules that the adapter trains whole, were replaced after the injection."""
    lost = sorted(set(injected) - set(present))
    if lost:
        raise RuntimeError(
            f"{some(lost)}: the rotations put there at setup are gone, so the layers were replaced since (a precision "
            "plugin, configure_model or another callback?): replace them before OFTFinetuning's setup"
        )
    if gone := [name for name in saved if name not in still_saved]:
        raise RuntimeError(
            f"{some(gone)}: modules_to_save trains what was there at setup, and it was replaced since: replace it in the "
            "module's __init__ or configure_model, or the adapter's files would lack what trains there"
        )
    if not present:
        raise RuntimeError("OFTFinetuning: no layer is adapted when the fit starts: look at module and target_modules")


def trainable_rotations(modules: Modules, adapter_name: str) -> dict[str, Rotation]:
    """The rotations of one adapter that train, by the name of their layer (and part)."""
    return {name: one for name, one in _rotations(modules, adapter_name).items() if one.trained()}


def _rotations(modules: Mapping[str, nn.Module], adapter_name: str) -> dict[str, Rotation]:
    return {
        joined(name, part): rotation
        for name, layer, state in adapted(modules)
        if adapter_name in state.configs and state.merged is None
        for part, rotation in rotations_of(layer, adapter_name).items()
    }


def report_frozen(trainer: Any, modules: Modules, adapter_name: str) -> None:
    """Warn where no active rotation of an adapter trains, and log those that do not: a target network's may well be
    frozen. Not where a callback is there that will unfreeze them."""
    active = {name: layer for name, layer, state in adapted(modules) if adapter_name in state.active}
    rotations = _rotations(active, adapter_name)
    frozen = [name for name, one in rotations.items() if not one.trained()]
    if not frozen or any("BaseFinetuning" in class_names(callback) for callback in trainer.callbacks):
        return
    what = f"the rotations of {some(frozen)} do not train: something froze them after the injection"
    if len(frozen) < len(rotations):
        rank_zero_info(f"OFT: {what}")
    else:
        warnings.warn(f"{what}: freeze nothing in configure_optimizers or a callback, the base is frozen already")


def watch_first_forward(pl_module: nn.Module, batch: Any, undo: contextlib.ExitStack) -> FirstForward | None:
    """See what the forward of the first batch does with adapted weights; not of compiled code, which must stay as is,
    nor with shards. Logs what nobody looks at."""
    modules = walk(pl_module)
    if is_compiled(modules):
        rank_zero_info(_UNSEEN, "the model is compiled")
        return None
    first = FirstForward(modules)
    if first.scattered:
        rank_zero_info(_UNSEEN, f"the weights of {some(first.scattered)} are sharded")
    undo.callback(first.close)
    first.open([batch])
    return first


def check_reads(first: FirstForward) -> None:
    """Raise RuntimeError where a weight was used past its layer, or written."""
    first.close()
    if said := describe(first):
        raise RuntimeError(said)


def check_gradients(idle: list[str]) -> None:
    """Raise RuntimeError where rotations got no gradient from the backward that preceded the first step."""
    if idle:
        raise RuntimeError(
            f"the rotations of {some(idle)} got no gradient: where a target network or an average runs without one, "
            "call requires_grad_(False) on it in configure_optimizers; where a layer is not called or does not reach "
            "the loss, add it to exclude_modules"
        )


def check_averages(trainer: Any, pl_module: nn.Module) -> None:
    """Check callbacks that average weights, and let an average of equal numbers be that number. Raises ValueError where
    one copied a part of the model only, or would reset the statistics of frozen norms, which no batch fills again."""
    parameters = len(list(pl_module.parameters()))
    for callback in trainer.callbacks:
        names = class_names(callback)
        average = getattr(callback, "_average_model", None)
        if not names & _AVERAGES or average is None:
            continue
        if len(list(average.parameters())) != parameters:
            raise ValueError(
                f"{type(callback).__name__} has copied the model before all of it was built: build it in __init__ or "
                "configure_model"
            )
        resting = [name for name, module in walk(pl_module).items() if is_frozen_norm(module)]
        if resting and "StochasticWeightAveraging" in names:
            raise ValueError(
                f"StochasticWeightAveraging resets the statistics of {some(resting)}, which OFT keeps frozen: use "
                "EMAWeightAveraging or WeightAveraging, or train these norms by modules_to_save"
            )
        if getattr(average, "avg_fn", None) is not None:
            average.avg_fn = functools.partial(_exact_average, average.avg_fn)


def _exact_average(average: Callable[..., Tensor], mine: Tensor, theirs: Tensor, count: Any) -> Tensor:
    """torch's exponential average of two equal numbers, d x + (1 - d) x, rounds: the frozen base drifted by 3e-8 in 32
    steps, other than after a resume, which starts from the base itself (measured). Quantized tensors are frozen, and not
    all of them know how to be compared."""
    if type(mine) is not Tensor and not is_sharded(mine):
        return theirs
    return torch.where(mine == theirs, theirs, average(mine, theirs, count))


def check_pruning(trainer: Any, pl_module: nn.Module) -> None:
    """Raise ValueError where Lightning's ModelPruning would prune rotations, all zero at first, or the weights that
    they turn, whose zeros a merge fills."""
    names = {id(module): name for name, module in pl_module.named_modules()}
    for callback in trainer.callbacks:
        if "ModelPruning" not in class_names(callback):
            continue
        listed = [module for module, _ in callback._parameters_to_prune or ()]
        turned = [one for one in listed if isinstance(one, Rotation) or state_of(one) is not None]
        if turned:
            what = some(dict.fromkeys(names[id(one)] for one in turned))
            raise ValueError(
                f"ModelPruning would prune rotations and the weights they turn ({what}), whose zeros a merge "
                "fills: give it other parameters_to_prune, or prune the merged model in a fit of its own"
            )
