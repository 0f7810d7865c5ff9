"""Floor 3: an AdapterState to and from files, and merged models on disk."""

from lightning_oft.formats.adapters import (
    Format,
    load_adapter,
    read_adapter,
    read_adapters,
    register_format,
    save_adapter,
)
from lightning_oft.formats.comfyui import save_patch
from lightning_oft.formats.errors import AdapterFileError
from lightning_oft.formats.hub import push_adapter
from lightning_oft.formats.merged import save_merged

__all__ = ["AdapterFileError", "Format", "load_adapter", "push_adapter", "read_adapter", "read_adapters",
           "register_format", "save_adapter", "save_merged", "save_patch"]  # fmt: skip
