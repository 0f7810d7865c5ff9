"""What a transformers model says of tied weights, while some of them are merged and so tied no longer."""

from __future__ import annotations

import logging
from typing import Any

from torch import nn

from lightning_oft.layers.state import make_record, record_of
from lightning_oft.model.traversal import Modules, class_names, own_parameters, some

log = logging.getLogger(__name__)


def shared_parameters(modules: Modules) -> set[int]:
    """ids of parameters that more than one module holds."""
    seen: set[int] = set()
    return {key for key in map(id, own_parameters(modules)) if key in seen or seen.add(key)}  # type: ignore[func-returns-value]


def _tied_config(module: nn.Module) -> Any:
    config = getattr(module, "config", None)
    return config if "PreTrainedModel" in class_names(module) and hasattr(config, "tie_word_embeddings") else None


def untie_configs(modules: Modules, untied: list[str]) -> None:
    """A merged weight is tied no longer, and a transformers model must say so or its reload would tie it again."""
    if not untied:
        return
    log.warning("merge: %s shared a weight with another module; it has a copy of its own now", some(untied))
    for module in modules.values():
        config = _tied_config(module)
        if config is not None and config.tie_word_embeddings:
            config.tie_word_embeddings = False
            make_record(module).tied = True


def retie_configs(modules: Modules) -> None:
    """Undo `untie_configs`."""
    for module in modules.values():
        record = record_of(module)
        if record is not None and record.tied:
            record.tied = False
            _tied_config(module).tie_word_embeddings = True
