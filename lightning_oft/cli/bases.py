"""The base of a merge or a patch, loaded as the library that it is of loads it, and adapters put into it."""

import json
import sys
import warnings
from pathlib import Path
from typing import Any, cast

from torch import nn

from lightning_oft.cli.errors import UserError, one_line
from lightning_oft.formats.pretrained import stored_dtype
from lightning_oft.model import AdapterError, AdapterState, put


def pipeline_folder(base: str) -> Path | None:
    """The folder of a diffusers pipeline, of a hub id that in the hub's cache; None where `base` is no pipeline."""
    place = Path(base)
    if place.exists():
        return place if (place / "model_index.json").is_file() else None
    try:
        from diffusers import DiffusionPipeline
        from huggingface_hub import hf_hub_download

        hf_hub_download(base, "model_index.json")
        return Path(DiffusionPipeline.download(base))
    except Exception:  # what else is wrong with it is said when it is loaded as a model
        return None


def load_base(base: str, **options: Any) -> nn.Module:
    """The model at `base` in the class and the dtype it was saved in; `options` go to its from_pretrained."""
    local = Path(base) / "config.json"
    try:
        config: dict[str, Any] = json.loads(local.read_text(encoding="utf-8")) if local.is_file() else {}
        if "_class_name" in config:  # how diffusers signs its models
            import diffusers

            kind: Any = getattr(diffusers, config["_class_name"])
            return cast("nn.Module", kind.from_pretrained(base, dtype=stored_dtype(Path(base))))
        import transformers

        transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
        # False rather than its default, which asks at the terminal whether to run the Python files beside the weights.
        found = transformers.AutoConfig.from_pretrained(base, trust_remote_code=False)
        if not found.architectures:
            raise ValueError("its config.json names no architecture")
        model = getattr(transformers, found.architectures[0]).from_pretrained(base, dtype="auto", **options)
        return cast("nn.Module", model)
    except Exception as error:  # a damaged file raises whatever its reader does not expect
        remedy = "a module of your own is merged in Python, by load_adapter and merge"
        raise UserError(f"the base {base!r} cannot be loaded: {one_line(error)}; {remedy}") from error


def load_parts(base: str) -> nn.Module:
    """The model at `base`; of a diffusers pipeline a module of all its models, by name."""
    folder = pipeline_folder(base)
    if folder is None:
        return load_base(base)
    return nn.ModuleDict({f.parent.name: load_base(str(f.parent)) for f in sorted(folder.glob("*/config.json"))})


def put_adapter(model: nn.Module, state: AdapterState, path: str, any_base: bool) -> None:
    """Put an adapter in; what that warns of is said on a line each. Raises UserError where it does not fit."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            put(model, state, ignore_mismatched_base=any_base)
        except AdapterError as error:
            said = str(error).replace("set ignore_mismatched_base=True", "give --any-base")
            raise UserError(f"{path}: {said}") from None
    for warning in caught:
        print(f"{path}: {warning.message}", file=sys.stderr)
