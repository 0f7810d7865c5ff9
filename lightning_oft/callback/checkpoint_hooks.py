"""Methods put on one LightningModule instance, where Lightning offers callbacks no hook of that time.

Lightning asks an instance for its hooks, so an instance attribute answers before the class. `functools.wraps` must not
be used: Lightning would unwrap it and take the hook for the user's own.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import nn

from lightning_oft.callback.strategies import strategy_adapter
from lightning_oft.formats import checkpoint as adapter_checkpoint

_LOADED = "_oft_loaded"


@dataclass
class Loaded:
    """What a fit must still do about the checkpoint that was loaded into a LightningModule.

    Attributes:
        replaced_base: whether it was a plain or merged model, which is the base now.
        unfrozen: names of the base's parameters that another callback had unfrozen.
    """

    replaced_base: bool = False
    unfrozen: list[str] = field(default_factory=list)


def after_configure_model(pl_module: nn.Module, then: Callable[[nn.Module], None]) -> None:
    """Call `then` after the module's next configure_model, whether it has one or not; once.

    The method removes itself before it calls the user's, so that Lightning's own question whether the user has
    overridden the hook gets the true answer afterwards. Several callbacks chain.
    """
    before = pl_module.__dict__.get("configure_model")

    def configure_model(module: Any) -> None:
        if before is None:
            module.__dict__.pop("configure_model", None)
        else:
            module.__dict__["configure_model"] = types.MethodType(before.__func__, module)
        module.configure_model()
        then(module)

    pl_module.__dict__["configure_model"] = types.MethodType(configure_model, pl_module)


def drop_configure_model(pl_module: nn.Module) -> None:
    """Take back a configure_model that was never called."""
    pl_module.__dict__.pop("configure_model", None)


def add_checkpoint_hooks(pl_module: nn.Module) -> None:
    """Have checkpoints of this module written and read as an adapter's, with or without a callback at hand.

    The module's own hooks are the ones that Lightning calls last when it saves (after weight averaging, and also with
    save_weights_only), and first when it loads, before a tensor is touched.
    """
    pl_module.__dict__.pop(_LOADED, None)  # of an earlier run, which nobody resumed
    for hook in (on_save_checkpoint, on_load_checkpoint):
        pl_module.__dict__[hook.__name__] = types.MethodType(hook, pl_module)


def drop_checkpoint_hooks(pl_module: nn.Module) -> None:
    """Give the module its own checkpoint hooks back."""
    for hook in (on_save_checkpoint, on_load_checkpoint):
        pl_module.__dict__.pop(hook.__name__, None)


def _own(module: Any, name: str) -> Callable[..., Any]:
    """The module's class's own method, past the instance attribute."""
    method: Callable[..., Any] = getattr(type(module), name).__get__(module)
    return method


def _trainer_of(module: Any) -> Any:
    return module.__dict__.get("_trainer")


def on_save_checkpoint(self: Any, checkpoint: dict[str, Any]) -> None:
    """Leave the frozen base out, and add what a resume needs."""
    _own(self, "on_save_checkpoint")(checkpoint)
    optimizers = getattr(_trainer_of(self), "optimizers", None) or []
    held = [tensor for optimizer in optimizers for group in optimizer.param_groups for tensor in group["params"]]
    trained = [tensor for tensor in held if tensor.requires_grad or _has_state(optimizers, tensor)]
    adapter_checkpoint.write_entry(self, checkpoint, writes_adapter_only(self), trained)


def writes_adapter_only(pl_module: Any) -> bool:
    """Whether all callbacks that adapt the module agree to leave its base out of checkpoints."""
    trainer = _trainer_of(pl_module)
    callbacks = [c for c in getattr(trainer, "callbacks", ()) if hasattr(c, "save_adapter_only")]
    wanted = all(callback.save_adapter_only for callback in callbacks if callback.enabled)
    return wanted if trainer is None else strategy_adapter(trainer).adapter_only(wanted)


def _has_state(optimizers: list[Any], tensor: torch.Tensor) -> bool:
    return any(tensor in optimizer.state for optimizer in optimizers)


def on_load_checkpoint(self: Any, checkpoint: dict[str, Any]) -> None:
    """Check what the file is and complete it before anything is loaded."""
    if "state_dict" not in checkpoint:  # FSDP2 loads tensors before it calls any hook
        adapter_checkpoint.check_loaded(self, checkpoint)
        content: adapter_checkpoint.Content = "adapter"
    else:
        content = adapter_checkpoint.complete(self, checkpoint)
    replaced_base = content in ("plain", "merged")
    if replaced_base:
        _forget_run(checkpoint)
        kind = "a plain model" if content == "plain" else "a merged model, whose weights hold its rotations"
        kept = "the adapter is kept" if content == "plain" else "the adapter starts again from the identity"
        rank_zero_info(
            f"OFT: the checkpoint is {kind}: it becomes the base, {kept}, and the optimizer state and epoch count of "
            "that run are left behind"
        )
    unfrozen = checkpoint.get(adapter_checkpoint.ENTRY, {}).get("unfrozen")
    self.__dict__[_LOADED] = Loaded(replaced_base, unfrozen if isinstance(unfrozen, list) else [])
    _own(self, "on_load_checkpoint")(checkpoint)


def _forget_run(checkpoint: dict[str, Any]) -> None:
    """A run without OFT trained other parameters: neither its optimizer nor its progress is ours."""
    checkpoint.pop("loops", None)
    for key in ("optimizer_states", "lr_schedulers"):
        if key in checkpoint:
            checkpoint[key] = []


def _loaded(pl_module: nn.Module) -> Loaded:
    found: Loaded = pl_module.__dict__.get(_LOADED, Loaded())
    return found


def base_was_replaced(pl_module: nn.Module) -> bool:
    """Whether the last checkpoint loaded replaced the base."""
    return _loaded(pl_module).replaced_base


def retrain_unfrozen(pl_module: nn.Module) -> None:
    """Let what trained when the loaded checkpoint was written train again.

    Lightning's BackboneFinetuning freezes in every setup and unfreezes at one epoch only, so that after a resume behind
    that epoch its backbone would rest (https://github.com/Lightning-AI/pytorch-lightning/issues/21901).
    """
    names = _loaded(pl_module).unfrozen
    parameters = dict(pl_module.named_parameters(remove_duplicate=False)) if names else {}
    for name in names:
        if name in parameters:
            parameters[name].requires_grad_(True)
    pl_module.__dict__.pop(_LOADED, None)
