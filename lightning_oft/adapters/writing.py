"""Writing an adapter directory so that a reader finds the old adapter, the new one or an error, never a mixture."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path

from safetensors.torch import save
from torch import nn

from lightning_oft.exchange import exchange

from .contents import Contents, contents_of
from .format import CONFIG_FILE, OWN_KEY, TENSOR_FILE, AdapterFileError

_SCRATCH = ".adapter-"
"""How the names of unfinished directories begin."""


def save_adapter(model: nn.Module, directory: str | Path, adapter_name: str = "default") -> Path:
    """Write one adapter as `adapter_config.json` and `adapter_model.safetensors`, which PEFT reads too.

    Names in the files start at the transformers or diffusers model that contains the adapter, else at `model`. What
    PEFT cannot represent is written with a warning that names the layers. An interrupted or failing write leaves what
    was there before, or a directory that `load_adapter` refuses.

    Args:
        model: a model with adapters, merged or not.
        directory: where to write, whatever the adapter's name; made where it does not exist.
        adapter_name: the adapter to write.

    Returns:
        The directory.

    Raises:
        ValueError: there is no such adapter, or a generator is not finite; names it.
        AdapterFileError: the directory cannot be written.
    """
    return write_contents(contents_of(model, adapter_name), directory)


def write_contents(contents: Contents, directory: str | Path) -> Path:
    """Write what `contents_of` took. Raises AdapterFileError where the directory cannot be written."""
    place = Path(os.path.realpath(directory))
    files = _encode(contents)
    try:
        if place.is_dir():
            _replace(place, files)
        else:
            _create(place, files)
    except OSError as error:
        reason = error.strerror or str(error)
        raise AdapterFileError(
            f"{directory}: the adapter cannot be written ({reason}); what was there is unchanged: "
            "free space there or give another directory"
        ) from None
    for note in contents.notes:
        warnings.warn(note, stacklevel=3)
    return Path(directory)


def _encode(contents: Contents) -> dict[str, bytes]:
    """The files in the order in which they are put in place: the configuration, with the tensors' digest, last."""
    tensors = save(contents.tensors, metadata={"format": "pt"})
    own = {**contents.config[OWN_KEY], "sha256": hashlib.sha256(tensors).hexdigest()}
    config = json.dumps({**contents.config, OWN_KEY: own}, indent=2, allow_nan=False)
    return {TENSOR_FILE: tensors, CONFIG_FILE: config.encode() + b"\n"}


@contextlib.contextmanager
def _scratch(parent: Path, files: dict[str, bytes]) -> Iterator[Path]:
    """A directory with the files, on disk and not only in its cache; it goes, however this ends."""
    scratch = parent / f"{_SCRATCH}{secrets.token_hex(8)}"
    try:
        scratch.mkdir()
        for name, content in files.items():
            with (scratch / name).open("wb") as stream:
                stream.write(content)
                stream.flush()
                os.fsync(stream.fileno())
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _create(place: Path, files: dict[str, bytes]) -> None:
    """A new directory appears with one rename."""
    place.parent.mkdir(parents=True, exist_ok=True)
    with _scratch(place.parent, files) as scratch:
        scratch.rename(place)
    _sync(place.parent)


def _replace(place: Path, files: dict[str, bytes]) -> None:
    """Put the new directory in the place of the old one at once; one by one the files where that cannot be."""
    kept = [name for name in os.listdir(place) if name not in files and not name.startswith(_SCRATCH)]
    if not kept and os.access(place, os.W_OK):
        with contextlib.suppress(OSError), _scratch(place.parent, files) as scratch:
            shutil.copymode(place, scratch)
            if exchange(scratch, place):
                _sync(place.parent)
                return
    _replace_files(place, files)


def _replace_files(place: Path, files: dict[str, bytes]) -> None:
    """Take the old configuration and tensors away, put the new tensors in place, then the new configuration.

    A kill in between leaves no configuration, which every reader refuses; an error puts the old ones back. The files
    wait inside the directory, which may be a mount point, or hold other files too.
    """
    with _scratch(place, files) as scratch:
        aside = scratch / "old"
        aside.mkdir()
        try:
            for name in reversed(files):
                if (place / name).exists():
                    os.replace(place / name, aside / name)
            for name in files:
                os.replace(scratch / name, place / name)
        except BaseException:
            for name in files:
                if (aside / name).exists():
                    os.replace(aside / name, place / name)
            raise
    _sync(place)


def _sync(directory: Path) -> None:
    """Make a rename itself durable, where the system can."""
    with contextlib.suppress(OSError):
        descriptor = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
