"""Floor 2: putting adapters into a model, switching them, and taking them out again, merged or not."""

from . import trained
from .inject import freeze, inject, unload
from .merge import merge, unmerge
from .switch import disable_adapters, project, set_adapter
from .targets import Target, find_targets
from .walk import adapter_names, oft_layers, walk

__all__ = [
    "Target",
    "adapter_names",
    "disable_adapters",
    "find_targets",
    "freeze",
    "inject",
    "merge",
    "oft_layers",
    "project",
    "set_adapter",
    "trained",
    "unload",
    "unmerge",
    "walk",
]
