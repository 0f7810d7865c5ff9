"""Floor 4: the life cycle of an adapter inside a Lightning run."""

from .finetuning import OFTFinetuning
from .loading import load_from_checkpoint

__all__ = ["OFTFinetuning", "load_from_checkpoint"]
