"""What would otherwise go wrong in silence: each check is one error that names the layers and the remedy."""

import dataclasses
import difflib
import functools
import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_oft.config import OFTConfig
from lightning_oft.layers.rotation import Rotation
from lightning_oft.layers.state import rotations_of
from lightning_oft.model.freezing import is_frozen_norm
from lightning_oft.model.traversal import Modules, adapted, class_names, joined, some, walk

_AVERAGES = {"WeightAveraging", "StochasticWeightAveraging"}
"""Names of the callbacks that copy the model."""
_CHOICES = {"keep_base": ("auto", "always", "never"), "export_from": ("last", "best")}
_SWITCHES = ("enabled", "merge_on_fit_end", "save_adapter_only")
_PATHS = ("pretrained_adapter", "export_dir")


def check_arguments(config: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """Raise TypeError for a keyword that OFTConfig lacks or a value of a wrong type, ValueError for no such choice."""
    fields = [field.name for field in dataclasses.fields(OFTConfig)]
    for name in config.keys() - fields:
        near = difflib.get_close_matches(name, fields, 1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are: {', '.join(fields)}"
        raise TypeError(f"OFTFinetuning has no option {name!r}; {hint}")
    for name, value in given.items():
        wanted: Any = bool if name in _SWITCHES else str | os.PathLike if name in _PATHS else str
        if value is not None and not isinstance(value, wanted):
            what = "true or false" if wanted is bool else "a string"
            raise TypeError(f"{name}={value!r}: must be {what}, got {type(value).__name__}")
        if value not in _CHOICES.get(name, (value,)):
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
    """Raise ValueError where a callback that copies the model stands before this one, where two callbacks would write
    into one directory, or where the launcher would lose the adapter."""
    for other in trainer.callbacks[: trainer.callbacks.index(callback) if callback in trainer.callbacks else None]:
        if class_names(other) & _AVERAGES:
            raise ValueError(
                f"{type(other).__name__} stands before OFTFinetuning in Trainer(callbacks=...) and would average a "
                "model without rotations: put OFTFinetuning first"
            )
    if stage != "fit":
        return
    others = [other for other in trainer.callbacks if isinstance(other, type(callback)) and other.enabled]
    places = [os.path.realpath(other.export_dir) for other in others if other.export_dir is not None]
    if callback.export_dir is not None and places.count(os.path.realpath(callback.export_dir)) > 1:
        raise ValueError(
            f"two OFTFinetuning callbacks have export_dir={callback.export_dir!r}, and the second would replace what "
            "the first writes: give each a directory of its own"
        )
    # Lightning loads the first process's state dict into the main process's model, and passes over what that one lacks.
    if "_MultiProcessingLauncher" in class_names(trainer.strategy.launcher) and not callback.merge_on_fit_end:
        raise ValueError(
            "OFTFinetuning(merge_on_fit_end=False): processes that are spawned or forked (ddp_spawn, ddp_notebook) "
            "bring home weights and not the adapter, which would be lost: leave merge_on_fit_end=True, or use "
            "strategy='ddp'"
        )


def check_layers(injected: list[str], present: list[str]) -> None:
    """Raise RuntimeError where layers were replaced after the injection."""
    lost = sorted(set(injected) - set(present))
    if lost:
        raise RuntimeError(
            f"{some(lost)}: the rotations put there at setup are gone, so the layers were replaced since (a precision "
            "plugin, configure_model or another callback?): replace them before OFTFinetuning's setup"
        )
    if not present:
        raise RuntimeError("OFTFinetuning: no layer is adapted when the fit starts: look at module and target_modules")


def trainable_rotations(modules: Modules, adapter_name: str) -> dict[str, Rotation]:
    """The rotations of one adapter that train, by the name of their layer (and part)."""
    return {
        joined(name, part): rotation
        for name, layer, state in adapted(modules)
        if adapter_name in state.configs and state.merged is None
        for part, rotation in rotations_of(layer, adapter_name).items()
        if rotation.weight.requires_grad
    }


def check_optimizers(optimized: Iterable[Tensor], rotations: Mapping[str, Rotation]) -> None:
    """Raise RuntimeError where a rotation is not among what optimizers hold: a list of parameters was taken before
    injection, and the rotation would never train."""
    ids = {id(tensor) for tensor in optimized}
    idle = [name for name, rotation in rotations.items() if id(rotation.weight) not in ids]
    if idle:
        raise RuntimeError(
            f"the rotations of {some(idle)} are in no optimizer and would never train: build the optimizer in "
            "configure_optimizers from self.parameters(), not from a list made before the Trainer ran"
        )


def check_gradients(idle: list[str]) -> None:
    """Raise RuntimeError where rotations got no gradient from the backward that preceded the first step."""
    if idle:
        raise RuntimeError(
            f"the rotations of {some(idle)} got no gradient: their layers are not called through their forward, or "
            "their output does not reach the loss; add them to exclude_modules"
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
    steps, other than after a resume, which starts from the base itself (measured)."""
    return torch.where(mine == theirs, theirs, average(mine, theirs, count))
