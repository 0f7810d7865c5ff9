"""Floor 4: the life cycle of an adapter inside a Lightning run."""

from lightning_oft.callback.loading import load_from_checkpoint
from lightning_oft.callback.oft import OFTFinetuning

__all__ = ["OFTFinetuning", "load_from_checkpoint"]
