"""Floor 2: a whole model: adapters put in, chosen, merged, taken off it and put back."""

from lightning_oft.model.activation import disable_adapters, project, set_adapter
from lightning_oft.model.adapter_state import AdapterState, Base, LayerRotations, take
from lightning_oft.model.injection import delete_adapter, inject, unload
from lightning_oft.model.loading import put
from lightning_oft.model.merging import merge, merged, unmerge
from lightning_oft.model.placement import AdapterError
from lightning_oft.model.traversal import oft_layers

__all__ = ["AdapterError", "AdapterState", "Base", "LayerRotations", "delete_adapter", "disable_adapters", "inject",
           "merge", "merged", "oft_layers", "project", "put", "set_adapter", "take", "unload", "unmerge"]  # fmt: skip
