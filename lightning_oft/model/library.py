"""Methods of transformers' and diffusers' models that rotations would not survive, and what is said when one is called."""

import warnings
from typing import Any, NoReturn

from torch import nn

from lightning_oft.layers.base import SwappedClass, restore_class, swap_class
from lightning_oft.layers.state import state_of
from lightning_oft.model.traversal import LIBRARY_MODELS, Modules, class_names


class _Unmerged(SwappedClass):
    """A library's model with rotations that are not in its weights."""

    def save_pretrained(self, *args: Any, **kwargs: Any) -> Any:
        """Warn, unless the tensors to write are given and plain: from_pretrained passes over what it does not know."""
        state = kwargs.get("state_dict")
        if state is None or any("oft_R" in name for name in state):
            what = (
                f"{type(self).__name__}.save_pretrained: the rotations are not merged, and from_pretrained drops them"
            )
            remedy = "save_adapter(model, directory) keeps them, save_merged(model, directory) writes a merged model"
            warnings.warn(f"{what}: {remedy}", stacklevel=2)
        return super().save_pretrained(*args, **kwargs)  # type: ignore[misc]

    def dequantize(self, *args: Any, **kwargs: Any) -> Any:
        """Raise RuntimeError: it would replace the layers that carry rotations."""
        raise RuntimeError(
            f"{type(self).__name__}: dequantize() would replace the layers that carry rotations and lose these: "
            "save_merged(model, directory) writes a dequantized merged model; or take the adapter off with "
            "unload(model), dequantize, and load_adapter"
        )


class _UnmergedAndQuantized(_Unmerged):
    """A quantized model of transformers with rotations that train."""

    # What transformers' Trainer asks a quantized model before it trains one: whether adapters are attached.
    _hf_peft_config_loaded = True

    def save_pretrained(self, *args: Any, **kwargs: Any) -> Any:
        """As an adapted model does; the adapters are none that PEFT could be asked to write."""
        self._hf_peft_config_loaded = False
        try:
            return super().save_pretrained(*args, **kwargs)
        finally:
            del self._hf_peft_config_loaded


class _UnmergedAndFusable(_Unmerged):
    """One of diffusers' that can put the weights of several projections into one."""

    def fuse_qkv_projections(self, *args: Any, **kwargs: Any) -> Any:
        """Raise RuntimeError: the fused layer is made of base weights."""
        _refuse(self, "fuse_qkv_projections")


class _FusableAttention(SwappedClass):
    """One of the attention modules whose projections that method fuses; this one can be called by itself."""

    def fuse_projections(self, *args: Any, **kwargs: Any) -> Any:
        """Raise RuntimeError: the fused layer is made of base weights."""
        _refuse(self, "fuse_projections")


def _refuse(module: object, method: str) -> NoReturn:
    what = f"{method}() would make one layer of the base weights, without their rotations"
    raise RuntimeError(f"{type(module).__name__}: {what}; call merge(model) first")


def sync_library_models(modules: Modules) -> None:
    """Library models speak up as long as an adapted layer below them is not merged."""
    for module in modules.values():
        mixin = _mixin_for(module)
        if mixin is None:
            continue
        states = map(state_of, module.modules())  # not through `modules.below`, which reads every name of the model
        if any(state is not None and state.merged is None for state in states):
            swap_class(module, mixin)
        elif isinstance(module, mixin):
            restore_class(module)


def _mixin_for(module: nn.Module) -> type | None:
    if class_names(module) & (LIBRARY_MODELS | {"ModelHubMixin"}):  # huggingface_hub's, for any module
        if hasattr(module, "fuse_qkv_projections"):
            return _UnmergedAndFusable
        return _Unmerged if getattr(module, "hf_quantizer", None) is None else _UnmergedAndQuantized
    return _FusableAttention if hasattr(module, "fuse_projections") else None
