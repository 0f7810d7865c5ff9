"""Merged models on disk, as plain transformers, diffusers or torch load them; nothing of OFT is in them."""

import json
import re
import shutil
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file, save_model
from torch import Tensor, nn

from lightning_oft.formats.atomic import write_directory
from lightning_oft.formats.errors import first_line
from lightning_oft.model.saved_modules import saved_tensors
from lightning_oft.model.traversal import LIBRARY_MODELS, adapted, class_names, library_root, walk


def roots_of(model: nn.Module) -> dict[str, nn.Module]:
    """The models that are written, by name: the transformers or diffusers models that hold what an adapter trained,
    where there are several; else the one module that holds all of it, nameless."""
    modules = walk(model)
    trained = [name for name, _, _ in adapted(modules)]
    trained += [saved.name for saved in saved_tensors(modules) if saved.slot.owners]
    tops = dict.fromkeys(library_root(modules, [name]) for name in trained)
    if len(tops) > 1 and "" not in tops:
        return {name: modules[name] for name in tops}
    return {"": modules[library_root(modules, trained)]}


def saves_itself(root: Any) -> bool:
    """Whether a library's model can write itself: one that was loaded in some formats refuses, even where nothing of it
    is quantized."""
    said = getattr(getattr(root, "hf_quantizer", None), "is_serializable", True)  # of diffusers a property
    return bool(said() if callable(said) else said)


def write_pretrained(
    root: nn.Module, directory: str | Path, companions: Iterable[Any] = (), state: dict[str, Tensor] | None = None
) -> Path:
    """Write the weights of a merged model, one of `roots_of`, into a directory.

    A transformers or diffusers model goes through its own `save_pretrained`; any other module into
    `model.safetensors` under its state-dict names. The directory appears complete or not at all; one that is there
    is replaced. `companions` are processors and tokenizers to save beside it, of which one that fails is a warning;
    `state` the whole tensors, where the model holds only parts of them.

    Raises:
        FileExistsError: something is there that is no model.
        OSError: the directory cannot be written; what was there is untouched.
    """
    return write_model(directory, lambda place: _save(root, place, state), companions)


def write_pipeline(pipeline: Any, directory: str | Path, saves: Mapping[str, Callable[[Path], Any]]) -> Path:
    """Write a diffusers pipeline whole, so that DiffusionPipeline loads the directory; `saves` writes the merged parts, by
    their names. Raises as `write_pretrained`."""

    def save(place: Path) -> None:
        for name, part in pipeline.components.items():
            if name in saves:
                saves[name](place / name)
            elif hasattr(part, "save_pretrained"):
                part.save_pretrained(place / name)
        pipeline.save_config(place)

    return write_model(directory, save)


def _save(root: nn.Module, place: Path, state: dict[str, Tensor] | None) -> None:
    if "ModelMixin" in class_names(root) and state is not None:  # whose save_pretrained takes no tensors
        root.save_config(place)  # type: ignore[operator]
        save_file(state, str(place / "diffusion_pytorch_model.safetensors"), metadata={"format": "pt"})
    elif class_names(root) & LIBRARY_MODELS:
        root.save_pretrained(place, **({} if state is None else {"state_dict": state}))  # type: ignore[operator]
    elif state is not None:
        save_file(state, str(place / "model.safetensors"), metadata={"format": "pt"})
    else:
        save_model(root, str(place / "model.safetensors"), metadata={"format": "pt"})


def write_model(directory: str | Path, save: Callable[[Path], None], companions: Iterable[Any] = ()) -> Path:
    """Have a merged model saved into a directory that appears complete or not at all. Raises as `write_pretrained`."""
    target = Path(directory)
    check_replaceable(target)

    def write(place: Path) -> None:
        save(place)
        for companion in companions:
            try:
                companion.save_pretrained(place)
            except Exception as error:  # the weights are worth more
                warnings.warn(
                    f"{directory}: without {type(companion).__name__}, which cannot be saved ({first_line(error)}): save "
                    "it there yourself"
                )

    try:
        write_directory(target, write)
    except (OSError, SafetensorError) as error:
        raise OSError(
            f"{directory}: the merged model cannot be written ({first_line(error)}); what was there is unchanged: free "
            "space there or give another directory"
        ) from None
    return target


def save_config(root: nn.Module, directory: str | Path) -> None:
    """Write what stands beside a model's weights, as `write_pretrained` will, or raise what that would raise."""
    model: Any = root
    if "PreTrainedModel" in class_names(root):
        model.config.save_pretrained(directory)
        if model.can_generate():
            model.generation_config.save_pretrained(directory)
    elif "ModelMixin" in class_names(root):
        model.save_config(directory)
    for name, module in root.named_modules():
        has_state = type(module).get_extra_state is not nn.Module.get_extra_state
        if has_state and not isinstance(module.get_extra_state(), Tensor):
            raise TypeError(f"the extra state of {name or 'the model'} is no tensor, which safetensors cannot hold")


def check_replaceable(directory: str | Path) -> None:
    """Raise FileExistsError where something is there that is no model: a merged model replaces its directory whole."""
    target, what = Path(directory), None
    of_a_model = ("config.json", "model_index.json", "model.safetensors")
    if target.is_dir() and any(target.iterdir()) and not any((target / name).is_file() for name in of_a_model):
        what = "holds something else than a model, which would be lost"
    elif target.exists() and not target.is_dir():
        what = "is a file where a directory is wanted"
    if what is not None:
        raise FileExistsError(f"{directory}: {what}: give another directory")


def companions_of(owner: Any) -> list[Any]:
    """The processors and tokenizers of a task or its data: those that it declares, else those under the usual names."""
    names = ("image_processor", "processor", "tokenizer", "feature_extractor")
    found = owner.companions() if hasattr(owner, "companions") else [getattr(owner, name, None) for name in names]
    return [item for item in found if hasattr(item, "save_pretrained")]


class Companions(NamedTuple):
    """The tokenizer and image processor files beside a base model, a folder or a hub id; copied as they are."""

    base: str

    def save_pretrained(self, directory: str | Path) -> None:
        """Copy them, from the folder or from the hub's cache; what is there already stays. A hub that does not answer
        is a warning: the model is worth more than its companions."""
        folder = Path(self.base)
        if not folder.is_dir():
            try:
                from huggingface_hub import snapshot_download

                folder = Path(snapshot_download(self.base, allow_patterns=_COMPANIONS))
            except Exception as error:
                warnings.warn(
                    f"{self.base}: its tokenizer and image processor cannot be copied beside the merged model "
                    f"({type(error).__name__}): save them there with their own save_pretrained",
                    stacklevel=2,
                )
                return
        for file in {file for pattern in _COMPANIONS for file in folder.glob(pattern) if file.is_file()}:
            if not (Path(directory) / file.name).exists():
                shutil.copyfile(file, Path(directory) / file.name)


_COMPANIONS = [
    *("*token*", "vocab*", "merges.txt", "*.model"),
    *("*processor_config.json", "chat_template*", "generation_config.json"),
]


def stored_dtype(folder: Path) -> torch.dtype:
    """That of the first tensor of a model of diffusers or transformers; by itself diffusers loads all in float32."""
    for pattern in ("diffusion_pytorch_model.", "diffusion_pytorch_model-*.", "model.", "model-*."):
        for file in sorted(folder.glob(f"{pattern}safetensors")):
            with safe_open(file, "pt") as opened:
                found: torch.dtype = opened.get_tensor(next(iter(opened.keys()))).dtype
                return found
    return torch.float32


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
    """`AutoModelForImageClassification` for `ViTForImageClassification`; the architecture where no class has it."""
    from transformers.models.auto import modeling_auto  # 3 s, and only those who export pay it

    for auto in (name for name in dir(modeling_auto) if re.fullmatch(r"AutoModel(For(?!PreTraining)\w+)?", name)):
        mapping = getattr(getattr(modeling_auto, auto), "_model_mapping", None)
        names = getattr(mapping, "_model_mapping", {}).values()
        if any(architecture == n or (isinstance(n, tuple | list) and architecture in n) for n in names):
            return auto
    return architecture
