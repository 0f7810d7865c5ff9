"""What would otherwise go wrong in silence: each check is one error that names the layers and the remedy."""

from __future__ import annotations

import dataclasses
import difflib
import os
import warnings
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from lightning_oft.config import OFTConfig
from lightning_oft.layers import Rotation, rotations_of, state_of
from lightning_oft.surgery import oft_layers
from lightning_oft.surgery.frozen import is_quiet
from lightning_oft.surgery.walk import class_names, some, walk


def check_options(config: dict[str, Any], **choices: str) -> None:
    """Raise TypeError for a keyword that OFTConfig lacks, ValueError for a choice that does not exist."""
    fields = [field.name for field in dataclasses.fields(OFTConfig)]
    for name in config:
        if name not in fields:
            near = difflib.get_close_matches(name, fields, 1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; there are: {', '.join(fields)}"
            raise TypeError(f"OFTFinetuning has no option {name!r}{hint}")
    takes = {"keep_base": ("auto", "always", "never"), "export_from": ("last", "best")}
    for name, value in choices.items():
        if value not in takes[name]:
            raise ValueError(f"{name}={value!r}: must be one of {', '.join(takes[name])}")


def check_types(kinds: Any, **values: Any) -> None:
    """Raise TypeError for an argument that is neither None nor of one of these types."""
    for name, value in values.items():
        if value is not None and not isinstance(value, kinds):
            wanted = "true or false" if kinds is bool else "a string"
            raise TypeError(f"{name}={value!r}: must be {wanted}, got {type(value).__name__}")


def check_config(root: nn.Module, adapter_name: str, config: OFTConfig, targets: Iterable[str]) -> None:
    """Raise ValueError where a target has the adapter already, configured otherwise: it would go on as it was."""
    layers = oft_layers(root)
    states = [state for name in targets if name in layers and (state := state_of(layers[name])) is not None]
    known = next((state.configs[adapter_name] for state in states if adapter_name in state.configs), config)
    mine, theirs = dataclasses.asdict(config), dataclasses.asdict(known)
    changed = [f"{name}={theirs[name]!r}, now {mine[name]!r}" for name in mine if mine[name] != theirs[name]]
    if changed:
        raise ValueError(
            f"adapter {adapter_name!r} is there already with another configuration ({'; '.join(changed)}): unload(model) "
            "to start anew, keep its configuration to train it further, or choose another adapter_name"
        )


def submodule(pl_module: nn.Module, path: str | None, required: bool) -> nn.Module | None:
    """The module under a dotted path; None where it is not built yet. Raises ValueError where it is `required`."""
    if not path:
        return pl_module
    modules = dict(walk(pl_module))
    if path in modules:
        return modules[path]
    if required:
        near = difflib.get_close_matches(path, [name for name in modules if name], 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        children = some([name for name, _ in pl_module.named_children()])
        raise ValueError(f"oft.module={path!r}: the LightningModule has no such part{hint} (it has {children})")
    return None


def check_company(trainer: Any, callback: Any) -> None:
    """Raise ValueError where a callback that copies the model stands before the one that changes it."""
    for other in trainer.callbacks:
        if other is callback:
            return
        names = {cls.__name__ for cls in type(other).__mro__}
        if names & {"WeightAveraging", "StochasticWeightAveraging"}:
            raise ValueError(
                f"{type(other).__name__} stands before OFTFinetuning in Trainer(callbacks=...) and would average a model "
                "without rotations: put OFTFinetuning first"
            )


def check_directories(trainer: Any, callback: Any) -> None:
    """Raise ValueError where two callbacks would write into one directory."""
    others = [other for other in trainer.callbacks if isinstance(other, type(callback)) and other.enabled]
    places = [os.path.realpath(other.export_dir) for other in others if other.export_dir is not None]
    if callback.export_dir is not None and places.count(os.path.realpath(callback.export_dir)) > 1:
        raise ValueError(
            f"two OFTFinetuning callbacks have export_dir={callback.export_dir!r}, and the second would replace what the "
            "first writes: give each a directory of its own"
        )


def check_launcher(trainer: Any, callback: Any) -> None:
    """Raise ValueError where the adapter would be lost: a launcher that spawns or forks brings home weights alone.

    Lightning loads the state dict of the first process into the main process's model, which has no rotations, and
    passes over all that the model lacks.
    """
    if "_MultiProcessingLauncher" in class_names(trainer.strategy.launcher) and not callback.merge_on_fit_end:
        raise ValueError(
            "OFTFinetuning(merge_on_fit_end=False): processes that are spawned or forked (ddp_spawn, ddp_notebook) bring "
            "home weights and not the adapter, which would be lost: leave merge_on_fit_end=True, or use strategy='ddp'"
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


def trainable_rotations(root: nn.Module, adapter_name: str) -> dict[str, Rotation]:
    """The rotations of one adapter that train, by the name of their layer (and part)."""
    found = {}
    for name, layer in oft_layers(root).items():
        state = state_of(layer)
        if state is None or adapter_name not in state.configs or state.merged is not None:
            continue
        for part, rotation in rotations_of(layer, adapter_name).items():
            if rotation.weight.requires_grad:
                found[f"{name}.{part}" if part else name] = rotation
    return found


def check_optimizers(held: Iterable[Tensor], root: nn.Module, adapter_name: str) -> None:
    """Raise RuntimeError where a rotation is not among what optimizers hold: a list of parameters was taken before
    injection, and the rotation would never train."""
    ids = {id(tensor) for tensor in held}
    rotations = trainable_rotations(root, adapter_name)
    idle = [name for name, rotation in rotations.items() if id(rotation.weight) not in ids]
    if idle:
        raise RuntimeError(
            f"the rotations of {some(idle)} are in no optimizer and would never train: build the optimizer in "
            "configure_optimizers from self.parameters(), not from a list made before the Trainer ran"
        )


def check_gradients(rotations: dict[str, Rotation]) -> None:
    """Raise RuntimeError where a rotation got no gradient from the backward that preceded the first step."""
    weights = {name: rotation.weight for name, rotation in rotations.items()}
    # An FSDP1 process that holds nothing of a rotation gets no gradient for it.
    refuse_idle(
        [name for name, weight in weights.items() if weight.requires_grad and weight.grad is None and weight.numel()]
    )


def refuse_idle(idle: list[str]) -> None:
    """Raise RuntimeError for rotations without gradient, if there are any."""
    if idle:
        raise RuntimeError(
            f"the rotations of {some(idle)} got no gradient: their layers are not called through their forward, or "
            "their output does not reach the loss; add them to exclude_modules"
        )


def quiet_eval_warning(pl_module: nn.Module) -> None:
    """Lightning warns of modules in eval at the start of training; where those are our frozen norms, they should be."""
    if is_quiet(pl_module):
        warnings.filterwarnings("ignore", message=r"Found \d+ module\(s\) in eval mode at the start of training")
