"""OFTTrainerCallback: the life cycle of an adapter in transformers' Trainer, and in those of TRL derived from it."""

import contextlib
import json
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState
from typing_extensions import override

from lightning_oft.formats import save_adapter
from lightning_oft.layers.rotation import Rotation
from lightning_oft.model import activation, traversal
from lightning_oft.model.traversal import joined, some, walk


class OFTTrainerCallback(TrainerCallback, ExportableState):
    """Train the rotations that `inject` put into a model with transformers' Trainer or one of TRL's.

    It projects constrained rotations into their ball after every optimizer step (COFT), lets a layer that outgrows its
    truncated series go on with the exact map, keeps the generators in float32, and writes the adapter to `adapter/` in
    every checkpoint and, when training ends, in `output_dir`. A resume from one of the Trainer's checkpoints goes on with
    its rotations.

    Args:
        adapter_name: the adapter that is trained and written.
    """

    def __init__(self, adapter_name: str = "default") -> None:
        self.adapter_name = adapter_name
        self._exact: list[str] = []  # names of the rotations that have left their series
        self._quiet = contextlib.ExitStack()

    @override
    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps in trainer_state.json: its weights do not say which rotations have left their series."""
        return {"args": {"adapter_name": self.adapter_name}, "attributes": {"_exact": self._exact}}

    @override
    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Called when the Trainer is made: takes back the cast of TRL, which rounds what trains of a 4- or 8-bit model."""
        rounded = [name for name, one in self._rotations(kwargs["model"]).items() if _to_float32(one)]
        if rounded:
            what = f"the trainer has rounded the generators of {some(rounded)} to half precision"
            warnings.warn(
                f"{what}; they are float32 again: call load_adapter(model, directory) once more, now", stacklevel=2
            )

    @override
    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Called when training begins, after a checkpoint was loaded: checks that every rotation will train.

        Raises:
            ValueError: no rotation of the adapter trains, one is in no group of the optimizer, or no checkpoint of the
                quantized model can be written.
        """
        rotations = self._rotations(kwargs["model"])
        if not rotations:
            what = f"no rotation of adapter {self.adapter_name!r} trains in the Trainer's model"
            raise ValueError(f"{what}: call inject(model, config) before the Trainer is made; unmerge what is merged")
        _check_optimizer(kwargs.get("optimizer"), rotations)
        quantizer = getattr(kwargs["model"], "hf_quantizer", None)
        if quantizer is not None and args.save_strategy != "no" and not quantizer.is_serializable():
            kind = getattr(quantizer.quantization_config.quant_method, "value", "quantized")
            raise ValueError(f"transformers cannot write a checkpoint of a {kind} model: give save_strategy='no'")
        if state.global_step:
            self._use_maps_of(state.stateful_callbacks, rotations)
        self._quiet.close()
        self._quiet.enter_context(warnings.catch_warnings())
        # The Trainer's checkpoints are not all that is written here: the adapter stands beside them.
        warnings.filterwarnings("ignore", message=".*save_pretrained: the rotations are not merged")

    @override
    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Called after each step of the optimizer."""
        activation.project(kwargs["model"])
        rotations = self._rotations(kwargs["model"])
        self._exact = [name for name, one in rotations.items() if one.terms is None and one.series_terms is not None]

    @override
    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Called when a checkpoint has been written."""
        checkpoint = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
        if state.is_world_process_zero and checkpoint.is_dir():  # a search for hyperparameters has others
            save_adapter(kwargs["model"], checkpoint / "adapter", self.adapter_name)

    @override
    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Called when training has ended, and the best checkpoint is loaded where that was asked for."""
        self._quiet.close()
        model = kwargs["model"]
        best = Path(state.best_model_checkpoint or "") / "trainer_state.json"
        if args.load_best_model_at_end and best.is_file():
            stored = json.loads(best.read_text(encoding="utf-8"))
            self._use_maps_of(stored.get("stateful_callbacks", {}), self._rotations(model))
        if state.is_world_process_zero:
            save_adapter(model, Path(str(args.output_dir)) / "adapter", self.adapter_name)

    def _rotations(self, model: nn.Module) -> dict[str, Rotation]:
        """The rotations of the adapter that train, by the name of their layer (and part)."""
        modules = walk(model)
        if self.adapter_name not in traversal.adapter_names(modules) or traversal.merged_layers(modules):
            return {}
        found = traversal.rotations(modules, self.adapter_name)
        return {joined(*name): one for name, one in found.items() if one.trained()}

    def _use_maps_of(self, callbacks: Any, rotations: dict[str, Rotation]) -> None:
        """Compute every rotation by the map that it had when a checkpoint was written."""
        stored = callbacks.get(type(self).__name__, {})
        own = [
            one for one in (stored if isinstance(stored, list) else [stored]) if one.get("args") == self.state()["args"]
        ]
        self._exact = list(own[0]["attributes"]["_exact"]) if own else self._exact
        for name, rotation in rotations.items():
            rotation.use_map(exact=name in self._exact)


def _to_float32(rotation: Rotation) -> bool:
    """Keep a generator in float32 that was cast past the module. Returns whether the cast may have changed it."""
    cast = [parameter for parameter in rotation.parameters() if parameter.dtype is not torch.float32]
    for parameter in cast:
        parameter.data = parameter.data.float()
    return any(bool(parameter.any()) for parameter in cast)


def _check_optimizer(optimizer: Any, rotations: dict[str, Rotation]) -> None:
    """Raise ValueError where a rotation is in no group, and say so where one decays."""
    groups = getattr(optimizer, "param_groups", None)
    if groups is None:  # DeepSpeed's
        return
    decays = {id(tensor): group.get("weight_decay", 0.0) for group in groups for tensor in group["params"]}
    if idle := [name for name, one in rotations.items() if not all(id(own) in decays for own in one.trained())]:
        what = f"the rotations of {some(idle)} are in no group of the optimizer and would never train"
        raise ValueError(f"{what}: call inject(model, config) before the optimizer is made")
    if decayed := [name for name, one in rotations.items() if any(decays[id(own)] for own in one.trained())]:
        what = f"weight decay pulls the rotations of {some(decayed)} back to the identity"
        warnings.warn(f"{what}: give TrainingArguments weight_decay=0.0, its default", stacklevel=3)
