"""The table of file formats, and adapters of a model to and from files."""

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from torch import nn

from lightning_oft.formats import checkpoint_file, comfyui, oft_blocks, onetrainer
from lightning_oft.formats.errors import AdapterFileError
from lightning_oft.formats.hub import local
from lightning_oft.formats.peft import CONFIG_FILE, read_peft, write_peft
from lightning_oft.model import AdapterError, AdapterState, put, take
from lightning_oft.model.traversal import some


@dataclass(frozen=True)
class Format:
    """One way to keep adapters in files."""

    name: str
    """As it is given to `lightning-oft export --format`."""
    matches: Callable[[Path], bool]
    """Whether a path holds this format."""
    read: Callable[[Path, str | None], list[AdapterState]]
    """The adapters at a path; the second argument is the name asked for, where one is."""
    write: Callable[[AdapterState, Path], object] | None = None
    """Writes one adapter to a path; None where the format is only read."""
    write_changes: Callable[[nn.Module, Path, str | None], object] | None = None
    """Writes what a model's active adapters change of it, in a format without rotations; the last argument is what names
    in the file begin with, where the user says it."""


FORMATS: dict[str, Format] = {}
"""By name. The last one is asked first."""


def register_format(file_format: Format) -> None:
    """Add a format, or replace the one of its name. The last one added is asked first."""
    FORMATS.pop(file_format.name, None)
    FORMATS[file_format.name] = file_format


register_format(Format("peft", Path.is_dir, lambda path, name: [read_peft(path, name)], write_peft))
register_format(Format("checkpoint", Path.is_file, lambda path, name: _read_checkpoint(path)))
register_format(Format("comfyui", comfyui.is_patch, comfyui.refuse_patch, write_changes=comfyui.save_patch))
register_format(Format("oft_blocks", oft_blocks.is_blocks, oft_blocks.read_blocks, oft_blocks.write_blocks))
register_format(Format("onetrainer", onetrainer.is_onetrainer, onetrainer.read_onetrainer, onetrainer.write_onetrainer))


def _read_checkpoint(path: Path) -> list[AdapterState]:
    checkpoint = checkpoint_file.read(path)
    states = checkpoint_file.read_states(checkpoint)
    if states and (beside := checkpoint[checkpoint_file.ENTRY].get("beside")):
        what = f"{path}: {some(beside)}: trained or changed beside the adapter and no part of it, so not read"
        warnings.warn(f"{what}: load_from_checkpoint reads them", stacklevel=5)
    return states


def find_format(path: str | Path) -> Format:
    """The format of what is at a path. Raises AdapterFileError where there is none."""
    found = next((known for known in reversed(FORMATS.values()) if known.matches(Path(path))), None)
    if found is None:
        what = "is of no known format" if Path(path).exists() else "no such file or directory"
        raise AdapterFileError(
            f"{path}: {what}; give an adapter directory or a checkpoint (formats: {', '.join(FORMATS)})"
        )
    return found


def read_adapters(path: str | Path, adapter_name: str | None = None) -> list[AdapterState]:
    """All adapters at a path or of a hub id, of any known format; of a name, where one is given and the format has names."""
    place = local(path)
    return find_format(place).read(place, adapter_name)


def check_name(path: str | Path, adapter_name: str | None) -> None:
    """Raise AdapterFileError where a name is asked of a directory that is an adapter itself, and says none."""
    if adapter_name is not None and (local(path) / CONFIG_FILE).is_file():
        raise AdapterFileError(f"{path}: is an adapter, and its files say no name: leave {adapter_name!r} out")


def read_adapter(path: str | Path, adapter_name: str | None = None, or_only: bool = False) -> AdapterState:
    """The adapter at a path or of a hub id, of any known format; of this name, where one is given.
    With `or_only` a single adapter is taken whatever its name is.

    Raises:
        AdapterFileError: there is none, none of this name, several and no name was given, or it cannot be read.
    """
    states = read_adapters(path, adapter_name)
    is_any = adapter_name is None or (or_only and len(states) == 1)
    named = [state for state in states if is_any or state.name == adapter_name]
    if len(named) != 1:
        asked = f"no adapter {adapter_name!r}; " if adapter_name is not None else ""
        found = (
            f"{asked}holds {some(one.name for one in states)}: give the name of one" if states else "no adapter in it"
        )
        raise AdapterFileError(f"{path}: {found}")
    if not named[0].generators():
        raise AdapterFileError(f"{path}: a merged model; its rotations are in the weights, and cannot be told apart")
    return named[0]


def save_adapter(
    model: nn.Module,
    directory: str | Path,
    adapter_name: str = "default",
    metrics: Mapping[str, float] | None = None,
) -> Path:
    """Write one adapter as `adapter_config.json` and `adapter_model.safetensors`, which PEFT reads too, with a model card.

    Names in the files start at the transformers or diffusers model that contains the adapter, else at `model`. What
    PEFT cannot represent is written with a warning that names the layers. A `README.md` that is there already and is no
    card of this library stays. An interrupted or failing write leaves what was there before, or a directory that
    `load_adapter` refuses.

    Args:
        model: a model with adapters, merged or not.
        directory: where to write, whatever the adapter's name; made where it does not exist.
        adapter_name: the adapter to write.
        metrics: what the card says of its quality, by name.

    Returns:
        The directory.

    Raises:
        ValueError: there is no such adapter, or a generator is not finite; names it.
        AdapterFileError: the directory cannot be written.
    """
    return write_peft(take(model, adapter_name), directory, metrics)


def load_adapter(
    model: nn.Module,
    directory: str | Path,
    adapter_name: str = "default",
    ignore_mismatched_base: bool = False,
    magnitude: Literal["joint", "after"] | None = None,
) -> list[str]:
    """Put an adapter from a directory or a hub repository of this library or of PEFT into a model, in place, and freeze the rest.

    The file decides which layers are adapted and how; names in it may start at the model or at any module below. The
    adapter becomes active where no other is. An adapter of this name and structure that is there already takes over
    the file's values.

    Args:
        model: any module, unmerged.
        directory: holds `adapter_config.json` and `adapter_model.safetensors`, or a directory named like the adapter
            that does, as PEFT writes it. A checkpoint file, or any other registered format, will do too, and so will a
            hub id, `org/name` or `org/name@revision`, where nothing is here by that name.
        adapter_name: the name it gets in the model.
        ignore_mismatched_base: take an adapter that was trained on another base all the same.
        magnitude: fit magnitudes from now on, as OFTConfig.magnitude says; as in the file by default.

    Returns:
        The names of the layers adapted, relative to `model`, in the order of the model.

    Raises:
        AdapterFileError: the directory cannot be had or read, does not fit the model, or was trained on another base. The
            model is untouched.
        RuntimeError: the model is merged.
    """
    state = read_adapter(directory, adapter_name, or_only=True)
    if magnitude is not None:
        state = replace(state, config=replace(state.config, magnitude=magnitude))
    try:
        return put(model, state, adapter_name, ignore_mismatched_base)
    except AdapterError as error:
        raise AdapterFileError(f"{directory}: {error}") from None
