"""Orthogonal Finetuning (OFT) for PyTorch Lightning.

The names below are resolved on first use (PEP 562): `import torch` takes two seconds and `import lightning` seven,
and neither `lightning-oft --version` nor a reader of `OFTConfig` should pay for both.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lightning_oft.adapters import load_adapter, save_adapter
    from lightning_oft.callback import OFTFinetuning, load_from_checkpoint
    from lightning_oft.config import OFTConfig
    from lightning_oft.surgery import disable_adapters, oft_layers, project, set_adapter

    # From where they are written: `lightning_oft.surgery.inject` names a module as well as a function.
    from lightning_oft.surgery.inject import inject, unload
    from lightning_oft.surgery.merge import merge, unmerge

__version__ = "0.1.0"

__all__ = [
    "OFTConfig",
    "OFTFinetuning",
    "__version__",
    "disable_adapters",
    "inject",
    "load_adapter",
    "load_from_checkpoint",
    "merge",
    "oft_layers",
    "project",
    "save_adapter",
    "set_adapter",
    "unload",
    "unmerge",
]

_HOME = {
    "OFTConfig": "config",
    "OFTFinetuning": "callback",
    "disable_adapters": "surgery",
    "inject": "surgery",
    "load_adapter": "adapters",
    "load_from_checkpoint": "callback",
    "merge": "surgery",
    "oft_layers": "surgery",
    "project": "surgery",
    "save_adapter": "adapters",
    "set_adapter": "surgery",
    "unload": "surgery",
    "unmerge": "surgery",
}


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'lightning_oft' has no attribute {name!r}")
    value: object = getattr(import_module(f"lightning_oft.{_HOME[name]}"), name)
    globals()[name] = value  # so that the next access is an ordinary one
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
