"""What a transformers model says of tied weights, while some of them are merged and so tied no longer."""

from __future__ import annotations

import logging
from typing import Any

from torch import nn

from .walk import class_names, some, walk

log = logging.getLogger(__name__)

_TIED = "_oft_tied"


def _tied_config(module: nn.Module) -> Any:
    config = getattr(module, "config", None)
    return config if "PreTrainedModel" in class_names(module) and hasattr(config, "tie_word_embeddings") else None


def untie_configs(model: nn.Module, untied: list[str]) -> None:
    """A merged weight is tied no longer, and a transformers model must say so or its reload would tie it again."""
    if not untied:
        return
    log.warning("merge: %s shared a weight with another module; it has a copy of its own now", some(untied))
    for _, module in walk(model):
        config = _tied_config(module)
        if config is not None and config.tie_word_embeddings:
            config.tie_word_embeddings = False
            module.__dict__[_TIED] = True


def retie_configs(model: nn.Module) -> None:
    """Undo `untie_configs`."""
    for _, module in walk(model):
        if module.__dict__.pop(_TIED, False):
            _tied_config(module).tie_word_embeddings = True
