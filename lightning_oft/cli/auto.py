"""Which transformers (or diffusers) class loads a directory, read from its config.json."""

import json
import re
from pathlib import Path


def loader_of(directory: Path) -> str:
    """The name of the class whose `from_pretrained` loads `directory`; an empty string where config.json names none.

    For transformers it is the Auto class that covers the architecture, since that is what people type.
    """
    path = directory / "config.json"
    if not path.is_file():
        return "DiffusionPipeline" if (directory / "model_index.json").is_file() else ""
    config = json.loads(path.read_text(encoding="utf-8"))
    architecture = next(iter(config.get("architectures") or []), "")
    return auto_class(architecture) if architecture else str(config.get("_class_name", ""))


def auto_class(architecture: str) -> str:
    """`AutoModelForImageClassification` for `ViTForImageClassification`; the architecture itself where no Auto has it."""
    from transformers.models.auto import modeling_auto  # 3 s, and only those who export pay it

    for auto in (name for name in dir(modeling_auto) if re.fullmatch(r"AutoModel(For(?!PreTraining)\w+)?", name)):
        mapping = getattr(getattr(modeling_auto, auto), "_model_mapping", None)
        names = getattr(mapping, "_model_mapping", {}).values()
        if any(architecture == n or (isinstance(n, tuple | list) and architecture in n) for n in names):
            return auto
    return architecture
