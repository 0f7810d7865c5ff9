"""Methods put on one LightningModule instance, where Lightning offers callbacks no hook of that time.

Lightning asks an instance for its hooks, so an instance attribute answers before the class. `functools.wraps` must not
be used: Lightning would unwrap it and take the hook for the user's own.
"""

from __future__ import annotations

import random
import sys
import types
from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import nn

from lightning_oft import checkpoints

from .strategies import strategy_of

_RNG = "_oft_rng"
_UNFROZEN = "_oft_unfrozen"


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


def leave(pl_module: nn.Module) -> None:
    """Take back a configure_model that was never called."""
    pl_module.__dict__.pop("configure_model", None)


def keep_checkpoint_hooks(pl_module: nn.Module) -> None:
    """Have checkpoints of this module written and read as an adapter's, with or without a callback at hand.

    The module's own hooks are the ones that Lightning calls last when it saves (after weight averaging, and also with
    save_weights_only), and first when it loads, before a tensor is touched.
    """
    for waiting in (_RNG, _UNFROZEN):  # of an earlier run, which nobody resumed
        pl_module.__dict__.pop(waiting, None)
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
    kept = [tensor for optimizer in optimizers for group in optimizer.param_groups for tensor in group["params"]]
    stepped = [tensor for tensor in kept if tensor.requires_grad or _has_state(optimizers, tensor)]
    checkpoints.write_entry(self, checkpoint, writes_adapter_only(self), stepped)
    if checkpoints.ENTRY in checkpoint and "optimizer_states" in checkpoint:
        checkpoint[checkpoints.ENTRY]["rng"] = _gather(rng_state())


def writes_adapter_only(pl_module: Any) -> bool:
    """Whether all callbacks that adapt the module agree to leave its base out of checkpoints."""
    callbacks = [c for c in getattr(_trainer_of(pl_module), "callbacks", ()) if hasattr(c, "save_adapter_only")]
    wanted = all(callback.save_adapter_only for callback in callbacks if callback.enabled)
    trainer = _trainer_of(pl_module)
    return wanted if trainer is None else strategy_of(trainer).adapter_only(wanted)


def _has_state(optimizers: list[Any], tensor: torch.Tensor) -> bool:
    return any(tensor in optimizer.state for optimizer in optimizers)


def on_load_checkpoint(self: Any, checkpoint: dict[str, Any]) -> None:
    """Check what the file is and complete it before anything is loaded."""
    if "state_dict" not in checkpoint:  # FSDP2 loads tensors before it calls any hook
        checkpoints.check_loaded(self, checkpoint)
        content: checkpoints.Content = "adapter"
    else:
        content = checkpoints.complete(self, checkpoint)
    if content in ("plain", "merged"):
        _forget_run(checkpoint)
        kind = "a plain model" if content == "plain" else "a merged model, whose weights hold its rotations"
        kept = "the adapter is kept" if content == "plain" else "the adapter starts again from the identity"
        rank_zero_info(
            f"OFT: the checkpoint is {kind}: it becomes the base, {kept}, and the optimizer state and epoch count of "
            "that run are left behind"
        )
    entry = checkpoint.get(checkpoints.ENTRY, {})
    for key, waiting in (("rng", _RNG), ("unfrozen", _UNFROZEN)):
        if isinstance(entry.get(key), list):
            self.__dict__[waiting] = entry[key]
    self.__dict__["_oft_new_base"] = content in ("plain", "merged")
    _own(self, "on_load_checkpoint")(checkpoint)


def _forget_run(checkpoint: dict[str, Any]) -> None:
    """A run without OFT trained other parameters: neither its optimizer nor its progress is ours."""
    checkpoint.pop("loops", None)
    for key in ("optimizer_states", "lr_schedulers"):
        if key in checkpoint:
            checkpoint[key] = []


def new_base(pl_module: nn.Module) -> bool:
    """Whether the last checkpoint loaded replaced the base; asked once."""
    return bool(pl_module.__dict__.pop("_oft_new_base", False))


def rng_state() -> dict[str, Any]:
    """The state of the random generators of this process, in primitives and tensors."""
    version, internal, gauss = random.getstate()
    state: dict[str, Any] = {"torch": torch.get_rng_state(), "python": [version, list(internal), gauss]}
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        name, keys, position, has_gauss, cached = numpy.random.get_state()
        state["numpy"] = [name, torch.from_numpy(keys.astype("int64")), position, has_gauss, cached]
    if torch.cuda.is_available() and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def _is_distributed() -> bool:
    return torch.distributed.is_available() and bool(torch.distributed.is_initialized())


def _gather(state: dict[str, Any]) -> list[dict[str, Any]]:
    if not _is_distributed():
        return [state]
    states: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(states, state)
    return states


def resume(pl_module: nn.Module) -> None:
    """Go on from the checkpoint that was loaded for this fit: what trained trains again, with the next random numbers.

    Lightning's BackboneFinetuning freezes in every setup and unfreezes at one epoch only, so that after a resume behind
    that epoch its backbone would rest (https://github.com/Lightning-AI/pytorch-lightning/issues/21901).
    """
    parameters = dict(pl_module.named_parameters(remove_duplicate=False))
    for name in pl_module.__dict__.pop(_UNFROZEN, []):
        if name in parameters:
            parameters[name].requires_grad_(True)
    _restore_rng(pl_module)


def _restore_rng(pl_module: nn.Module) -> None:
    """Continue the random numbers of the checkpoint that was loaded for this fit; on as many processes as wrote it."""
    states = pl_module.__dict__.pop(_RNG, None)
    if states is None:
        return
    world, rank = (torch.distributed.get_world_size(), torch.distributed.get_rank()) if _is_distributed() else (1, 0)
    if len(states) != world:
        rank_zero_info(
            f"OFT: the checkpoint has the random state of {len(states)} processes, this run has {world}: not restored"
        )
        return
    state = states[rank]
    torch.set_rng_state(state["torch"].cpu())
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    numpy = sys.modules.get("numpy")
    if numpy is not None and "numpy" in state:
        name, keys, position, has_gauss, cached = state["numpy"]
        numpy.random.set_state((name, keys.numpy().astype("uint32"), position, has_gauss, cached))
    if "cuda" in state and torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
