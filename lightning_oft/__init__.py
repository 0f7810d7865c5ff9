"""Orthogonal Finetuning (OFT) for PyTorch Lightning.

The names below are resolved on first use (PEP 562): `import torch` takes two seconds and `import lightning` seven,
and neither `lightning-oft --version` nor a reader of `OFTConfig` should pay for both.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lightning_oft.callback.hf_trainer import OFTTrainerCallback
    from lightning_oft.callback.loading import load_from_checkpoint
    from lightning_oft.callback.oft import OFTFinetuning
    from lightning_oft.config import OFTConfig
    from lightning_oft.formats import load_adapter, push_adapter, save_adapter, save_merged
    from lightning_oft.layers.base import register_layer_type
    from lightning_oft.model.activation import disable_adapters, project, set_adapter
    from lightning_oft.model.adapter_state import AdapterState
    from lightning_oft.model.injection import delete_adapter, inject, unload
    from lightning_oft.model.merging import merge, merged, unmerge
    from lightning_oft.model.traversal import oft_layers

__version__ = "0.1.0"

__all__ = ["AdapterState", "OFTConfig", "OFTFinetuning", "OFTTrainerCallback", "__version__", "delete_adapter", "disable_adapters", "inject",
           "load_adapter", "load_from_checkpoint", "merge", "merged", "oft_layers", "project", "push_adapter",
           "register_layer_type", "save_adapter", "save_merged", "set_adapter", "unload", "unmerge"]  # fmt: skip

_HOME = {name: "model" for name in __all__ if name != "__version__"} | {
    "OFTConfig": "config",
    "OFTFinetuning": "callback.oft",
    "OFTTrainerCallback": "callback.hf_trainer",
    "load_adapter": "formats",
    "load_from_checkpoint": "callback.loading",
    "push_adapter": "formats",
    "register_layer_type": "layers",
    "save_adapter": "formats",
    "save_merged": "formats",
}


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'lightning_oft' has no attribute {name!r}")
    value: object = getattr(import_module(f"lightning_oft.{_HOME[name]}"), name)
    globals()[name] = value  # so that the next access is an ordinary one
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
