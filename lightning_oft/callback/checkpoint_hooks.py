"""Methods put on one LightningModule instance, where Lightning offers callbacks no hook of that time.

Lightning asks an instance for its hooks, so an instance attribute answers before the class. `functools.wraps` must not
be used: Lightning would unwrap it and take the hook for the user's own.
"""

import functools
import types
from collections.abc import Callable
from typing import Any

from lightning.pytorch.utilities import rank_zero_info
from torch import nn

from lightning_oft.callback.strategies.base import strategy_adapter
from lightning_oft.model.traversal import adapter_names, some, walk


def after_configure_model(pl_module: nn.Module, then: Callable[[nn.Module], None]) -> None:
    """Call `then` after the module's next configure_model, whether it has one or not. Several callbacks chain.

    The method removes itself before it calls the user's, so that Lightning's own question whether the user has
    overridden the hook gets the true answer afterwards. It comes back where the call was another callback's:
    WeightAveraging makes one in its setup, and Lightning's own may build the layers once more.
    """
    before = pl_module.__dict__.get("configure_model")

    def configure_model(module: Any) -> None:
        mine = module.__dict__.pop("configure_model", None)
        if before is not None:  # another callback's, or the user's, who may have set any callable
            is_method = isinstance(before, types.MethodType)
            module.__dict__["configure_model"] = types.MethodType(before.__func__, module) if is_method else before
        module.configure_model()
        then(module)
        if module._current_fx_name == "setup":
            module.__dict__["configure_model"] = mine

    pl_module.__dict__["configure_model"] = types.MethodType(configure_model, pl_module)


def remove_configure_model(pl_module: nn.Module) -> None:
    """Undo `after_configure_model`, where nobody has called the method."""
    if getattr(pl_module.__dict__.get("configure_model"), "__module__", None) == __name__:
        del pl_module.__dict__["configure_model"]


def add_checkpoint_hooks(pl_module: nn.Module) -> None:
    """Have checkpoints of this module written and read as an adapter's, with or without a callback at hand.

    The module's own hooks are the ones that Lightning calls last when it saves (after weight averaging, and also with
    save_weights_only), and first when it loads, before a tensor is touched.
    """
    for hook in (on_save_checkpoint, on_load_checkpoint):
        _put(pl_module, hook.__name__, hook)
    if "load_state_dict" not in pl_module.__dict__:  # one that somebody put on the instance is asked as it is
        _put(pl_module, "load_state_dict", load_state_dict)


def remove_checkpoint_hooks(pl_module: nn.Module) -> None:
    """Give the module its class's own hooks back."""
    for name in ("on_save_checkpoint", "on_load_checkpoint"):
        pl_module.__dict__.pop(name, None)
    if getattr(pl_module.__dict__.get("load_state_dict"), "func", None) is load_state_dict:
        del pl_module.__dict__["load_state_dict"]


def refuse_adapters(pl_module: nn.Module) -> None:
    """Have checkpoints of an adapter refused by a module without one, in place of Lightning's list of names."""
    if not adapter_names(walk(pl_module)):
        _put(pl_module, "on_load_checkpoint", refuse_on_load)


def allow_adapters(pl_module: nn.Module) -> None:
    """Undo `refuse_adapters`."""
    if getattr(pl_module.__dict__.get("on_load_checkpoint"), "func", None) is refuse_on_load:
        remove_checkpoint_hooks(pl_module)


def _put(pl_module: nn.Module, name: str, hook: Callable[..., Any]) -> None:
    # A bound method would be pickled by its name, and be the class's own when it is read again.
    pl_module.__dict__[name] = functools.partial(hook, pl_module)


def on_save_checkpoint(self: Any, checkpoint: dict[str, Any]) -> None:
    """Leave the frozen base out, and add what a resume needs."""
    from lightning_oft.formats.checkpoint import write_entry

    type(self).on_save_checkpoint(self, checkpoint)
    optimizers = [(one, tensor) for one in self.trainer.optimizers for g in one.param_groups for tensor in g["params"]]
    trained = [tensor for optimizer, tensor in optimizers if tensor.requires_grad or tensor in optimizer.state]
    write_entry(self, checkpoint, writes_adapter_only(self.trainer), trained)


def writes_adapter_only(trainer: Any) -> bool:
    """Whether the strategy can leave the base out of checkpoints, and all callbacks that adapt the module agree to."""
    wanted = all(getattr(one, "save_adapter_only", True) or not one.enabled for one in trainer.callbacks)
    return wanted and strategy_adapter(trainer).adapter_only


def on_load_checkpoint(self: Any, checkpoint: dict[str, Any]) -> None:
    """Check what the file is and complete it before anything is loaded."""
    from lightning_oft.formats.checkpoint import check_loaded, complete

    averages = (
        [getattr(callback, "_average_model", None) for callback in self.trainer.callbacks] if self._trainer else []
    )
    for average in averages:
        if average is not None:
            _put(average, "load_state_dict", load_state_dict)
    if "state_dict" not in checkpoint:  # FSDP2 loads tensors before it calls any hook
        check_loaded(self, checkpoint)
    elif (content := complete(self, checkpoint)) in ("plain", "merged"):
        # A run without OFT trained other parameters: neither its optimizer nor its progress is ours.
        checkpoint.pop("loops", None)
        checkpoint.update({key: [] for key in ("optimizer_states", "lr_schedulers") if key in checkpoint})
        kept = "the adapter is kept" if content == "plain" else "the adapter starts again from the identity"
        rank_zero_info(
            f"OFT: the checkpoint is a {content} model: it becomes the base, {kept}, and the optimizer state and epoch "
            "count of that run are left behind"
        )
    type(self).on_load_checkpoint(self, checkpoint)


def refuse_on_load(self: Any, checkpoint: dict[str, Any]) -> None:
    """Raise CheckpointError for a checkpoint of an adapter, where OFTFinetuning is switched off."""
    from lightning_oft.formats.checkpoint import ENTRY, CheckpointError, content_of

    if content_of(checkpoint) in ("adapter", "full"):
        names = some(checkpoint.get(ENTRY, {}).get("adapters", ("of no name",)))
        raise CheckpointError(
            f"the checkpoint holds an adapter ({names}), for which OFTFinetuning(enabled=False) makes no place: set "
            "enabled=True, or give a checkpoint without one"
        )
    type(self).on_load_checkpoint(self, checkpoint)


def load_state_dict(self: Any, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
    """Leave out packed layers of which a checkpoint holds nothing."""
    from lightning_oft.model.packed import without_packed

    with without_packed(self, state_dict):
        return type(self).load_state_dict(self, state_dict, strict=strict, assign=assign)


def retrain(pl_module: nn.Module, names: set[str]) -> None:
    """Let what another callback had unfrozen when the loaded checkpoint was written train again.

    Lightning's BackboneFinetuning freezes in every setup and unfreezes at one epoch only: after a resume behind that
    epoch its backbone would stay frozen (https://github.com/Lightning-AI/pytorch-lightning/issues/21901).
    """
    for name, parameter in pl_module.named_parameters(remove_duplicate=False):
        if name in names:
            parameter.requires_grad_(True)
