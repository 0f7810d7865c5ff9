"""Adapter directories in PEFT's format; what PEFT cannot say stands beside it under our own key."""

import hashlib
import re
import warnings
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor

from lightning_oft import functional
from lightning_oft.formats.atomic import write_directory
from lightning_oft.formats.errors import AdapterFileError, printable, refusing
from lightning_oft.formats.peft_config import CONFIG_FILE, OWN_KEY, PEFT_DEFAULTS, read_config, to_json
from lightning_oft.formats.peft_tensors import TENSOR_FILE, Key, read_tensors, to_tensors
from lightning_oft.model.adapter_state import AdapterState, Base, LayerRotations
from lightning_oft.model.traversal import some


def write_peft(state: AdapterState, directory: str | Path) -> Path:
    """Write an adapter as `save_adapter` does. Raises AdapterFileError where the directory cannot be written."""
    tensors = save(to_tensors(state), metadata={"format": "pt"})
    text = to_json(state, hashlib.sha256(tensors).hexdigest())

    def write(place: Path) -> None:
        (place / TENSOR_FILE).write_bytes(tensors)
        (place / CONFIG_FILE).write_text(text, encoding="utf-8")

    try:
        write_directory(Path(directory), write, order=(TENSOR_FILE, CONFIG_FILE))
    except OSError as error:
        raise AdapterFileError(
            f"{directory}: the adapter cannot be written ({error.strerror or error}); what was there is unchanged: "
            "free space there or give another directory"
        ) from None
    known = set(state.known_to_peft())
    if unknown := [name for name in state.layers if name not in known]:
        warnings.warn(
            f"PEFT cannot represent the rotations of {some(unknown, 20)}: they are in the file for this library, and PEFT "
            "will load the adapter without them",
            stacklevel=3,
        )
    if state.config.neumann_series == "unhalved":
        warnings.warn(
            "this adapter uses the series of PEFT before 0.18, kept under our own key; PEFT 0.18 and later halve its last "
            "term and compute a slightly different rotation",
            stacklevel=3,
        )
    return Path(directory)


def read_peft(directory: str | Path, adapter_name: str | None = None) -> AdapterState:
    """Read a directory of this library's or of PEFT's, or one below it of the adapter's name, as PEFT writes it.

    No model is needed, and nothing but torch is imported.

    Raises:
        AdapterFileError: not an adapter, damaged, or of a format that cannot be read; names the file and the remedy.
    """
    place = _locate(Path(directory), adapter_name)
    file, (config, raw) = place / TENSOR_FILE, read_config(place / CONFIG_FILE)
    own = raw.get(OWN_KEY, {})
    with refusing("cannot be read", file):
        if not file.is_file():
            pickled = "adapter_model.bin is a pickle, which may run code: convert it to safetensors with PEFT"
            there = (place / "adapter_model.bin").is_file()
            raise AdapterFileError(f"no such file; {pickled if there else 'copy it from where the adapter was saved'}")
        digest = hashlib.sha256()
        with file.open("rb") as stream:
            while chunk := stream.read(2**20):
                digest.update(chunk)
        if digest.hexdigest() != own.get("sha256", digest.hexdigest()):
            raise AdapterFileError(
                f"is not the file that {CONFIG_FILE} was written with: an interrupted write, or damaged since; save or "
                "copy the adapter again"
            )
    tensors = read_tensors(file, own.get("layer_types", {}), config)
    base, path = raw.get("auto_mapping"), raw.get("base_model_name_or_path")
    base = base if isinstance(base, dict) else {}
    class_name, library = str(base.get("base_model_class", "")), str(base.get("parent_library", ""))
    return AdapterState(
        name=adapter_name or "default",
        config=config,
        layers=_layers(file, raw, {key: value for key, value in tensors.items() if key.layer_type is not None}),
        root=own.get("root"),
        saved={key.name: value for key, value in tensors.items() if key.layer_type is None},
        modules_to_save=raw.get("modules_to_save") or [],
        fingerprints=own.get("fingerprint", {}),
        base=Base(class_name, library, path if isinstance(path, str) else None),
        has_unique_names=not isinstance(raw.get("target_modules") or [], str),
        source=printable(str(place)),
        extra={key: value for key, value in raw.items() if key not in PEFT_DEFAULTS and key != OWN_KEY},
    )


def _layers(file: Path, raw: dict[str, Any], generators: dict[Key, Tensor]) -> dict[str, LayerRotations]:
    """The rotations by layer. PEFT rotates all layers of a file of its own; of ours, the target_modules written for it."""
    own, targets = raw.get(OWN_KEY, {}), raw.get("target_modules") or []
    known = set(re.split(r"(?<!\\)\|", targets) if isinstance(targets, str) else map(re.escape, targets))
    layers: dict[str, LayerRotations] = {}
    for (name, part, implied), generator in generators.items():
        if generator.shape[1]:
            layer_type, is_known = (
                own.get("layer_types", {}).get(name) or str(implied),
                not own or re.escape(name) in known,
            )
            one = layers.setdefault(name, LayerRotations(layer_type, is_known, {}, {}))
            one.block_sizes[part] = functional.block_size_of(generator.shape[1])
            one.generators[part] = generator
    if not layers:
        what = "all its blocks are of size 1, which rotate nothing; train with a larger block size"
        raise AdapterFileError(f"{file}: {what}")
    if dead := [key.name for key in generators if key.name not in layers]:
        warnings.warn(printable(f"{file}: {some(dead)} have blocks of size 1, which rotate nothing; left out"))
    return layers


def _locate(directory: Path, adapter_name: str | None) -> Path:
    """The directory itself, or the one below it that PEFT makes for an adapter of another name than `default`."""
    if (directory / CONFIG_FILE).is_file():
        return directory
    below = sorted(path.parent.name for path in directory.glob(f"*/{CONFIG_FILE}"))
    if adapter_name in below:
        return directory / str(adapter_name)
    there = f"there are adapters in {some(below)}: give one of these directories"
    hint = there if below else "give the one that holds it"
    raise AdapterFileError(f"{directory / CONFIG_FILE}: no such file, so this is no adapter directory; {hint}")
