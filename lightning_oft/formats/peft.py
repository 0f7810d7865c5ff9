"""Adapter directories in PEFT's format; what PEFT cannot say stands beside it under our own key."""

import hashlib
import re
import warnings
from pathlib import Path

from safetensors.torch import save
from torch import Tensor

from lightning_oft import functional
from lightning_oft.formats.atomic import write_directory
from lightning_oft.formats.errors import AdapterFileError, printable, refusing
from lightning_oft.formats.peft_config import CONFIG_FILE, PeftConfig, read_config, to_json
from lightning_oft.formats.peft_tensors import TENSOR_FILE, Key, read_tensors, to_tensors
from lightning_oft.model.adapter_state import AdapterState, Base, LayerRotations
from lightning_oft.model.traversal import some


def write_peft(state: AdapterState, directory: str | Path) -> Path:
    """Write `adapter_config.json` and `adapter_model.safetensors`, which PEFT reads too.

    What PEFT cannot represent is written with a warning that names the layers. An interrupted or failing write leaves
    what was there before, or a directory that every reader refuses.

    Raises:
        AdapterFileError: the directory cannot be written.
    """
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
    known, notes = set(state.known_to_peft()), []
    if unknown := [name for name in state.layers if name not in known]:
        notes.append(
            f"PEFT cannot represent the rotations of {some(unknown, 20)}: they are in the file for this library, and PEFT "
            "will load the adapter without them"
        )
    if state.config.neumann_series == "unhalved":
        notes.append(
            "this adapter uses the series of PEFT before 0.18, kept under our own key; PEFT 0.18 and later halve its last "
            "term and compute a slightly different rotation"
        )
    for note in notes:
        warnings.warn(note, stacklevel=3)
    return Path(directory)


def read_peft(directory: str | Path, adapter_name: str | None = None) -> AdapterState:
    """Read a directory of this library's or of PEFT's, or one below it of the adapter's name, as PEFT writes it.

    No model is needed, and nothing but torch is imported.

    Raises:
        AdapterFileError: not an adapter, damaged, or of a format that cannot be read; names the file and the remedy.
    """
    place = _locate(Path(directory), adapter_name)
    file, found = place / TENSOR_FILE, read_config(place / CONFIG_FILE)
    with refusing(file, "cannot be read"):
        if not file.is_file():
            pickled = "adapter_model.bin is a pickle, which may run code: convert it to safetensors with PEFT"
            there = (place / "adapter_model.bin").is_file()
            raise AdapterFileError(f"no such file; {pickled if there else 'copy it from where the adapter was saved'}")
        if "sha256" in found.own and _digest(file) != found.own["sha256"]:
            raise AdapterFileError(
                f"is not the file that {CONFIG_FILE} was written with: an interrupted write, or damaged since; save or "
                "copy the adapter again"
            )
    tensors = read_tensors(file, found.own.get("layer_types", {}), found.config)
    mapping, path = found.extra.get("auto_mapping"), found.extra.get("base_model_name_or_path")
    mapping = mapping if isinstance(mapping, dict) else {}
    class_name, library = (str(mapping.get(key, "")) for key in ("base_model_class", "parent_library"))
    return AdapterState(
        name=adapter_name or "default",
        config=found.config,
        layers=_layers(file, found, {key: value for key, value in tensors.items() if key.layer_type is not None}),
        root=found.own.get("root"),
        saved={key.name: value for key, value in tensors.items() if key.layer_type is None},
        modules_to_save=found.modules_to_save,
        fingerprints=found.own.get("fingerprint", {}),
        base=Base(class_name, library, path if isinstance(path, str) else None),
        has_unique_names=not isinstance(found.target_modules, str),
        source=printable(str(place)),
        extra=found.extra,
    )


def _layers(file: Path, found: PeftConfig, generators: dict[Key, Tensor]) -> dict[str, LayerRotations]:
    """The rotations by layer. PEFT rotates all layers of a file of its own; of ours, the target_modules written for it."""
    targets, types = found.target_modules, found.own.get("layer_types", {})
    known = set(re.split(r"(?<!\\)\|", targets) if isinstance(targets, str) else map(re.escape, targets))
    layers: dict[str, LayerRotations] = {}
    for (name, part, implied), generator in generators.items():
        if generator.shape[1]:
            is_known = not found.own or re.escape(name) in known
            one = layers.setdefault(name, LayerRotations(types.get(name) or str(implied), is_known, {}, {}))
            one.block_sizes[part] = functional.block_size_of(generator.shape[1])
            one.generators[part] = generator
    dead = [key.name for key in generators if key.name not in layers]
    if not layers:
        raise AdapterFileError(
            f"{file}: all its blocks are of size 1, which rotate nothing; train with a larger block size"
        )
    if dead:
        warnings.warn(printable(f"{file}: {some(dead)} have blocks of size 1, which rotate nothing; left out"))
    return layers


def _digest(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while chunk := stream.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()


def _locate(directory: Path, adapter_name: str | None) -> Path:
    """The directory itself, or the one below it that PEFT makes for an adapter of another name than `default`."""
    if (directory / CONFIG_FILE).is_file():
        return directory
    below = sorted(path.parent.name for path in directory.glob(f"*/{CONFIG_FILE}"))
    if adapter_name in below:
        return directory / str(adapter_name)
    hint = "give the one that holds it"
    if below:
        hint = f"there are adapters in {some(below)}: give one of these directories"
    raise AdapterFileError(f"{directory / CONFIG_FILE}: no such file, so this is no adapter directory; {hint}")
