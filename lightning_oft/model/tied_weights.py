"""What a transformers model says of tied weights, while some of them are merged and so tied no longer."""

from __future__ import annotations

import logging
from collections import Counter
from typing import Any

from lightning_oft.layers.state import make_record
from lightning_oft.model.traversal import Modules, class_names, own_parameters, records, some

log = logging.getLogger(__name__)


def shared_parameters(modules: Modules) -> set[int]:
    """ids of parameters that more than one module holds."""
    return {key for key, holders in Counter(map(id, own_parameters(modules))).items() if holders > 1}


def untie_configs(modules: Modules, untied: list[str]) -> None:
    """A merged weight is tied no longer, and a transformers model must say so or its reload would tie it again."""
    if not untied:
        return
    log.warning("merge: %s shared a weight with another module; it has a copy of its own now", some(untied))
    for module in modules.values():
        config: Any = getattr(module, "config", None)
        if "PreTrainedModel" in class_names(module) and getattr(config, "tie_word_embeddings", False):
            config.tie_word_embeddings = False
            make_record(module).tied = True


def retie_configs(modules: Modules) -> None:
    """Undo `untie_configs`."""
    for _, module, record in records(modules):
        if record.tied:
            record.tied = False
            module.config.tie_word_embeddings = True  # type: ignore[union-attr]
