"""One `.safetensors` file that is a whole adapter, in the formats of tools that have no directory for it."""

from collections.abc import Mapping
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from lightning_oft.formats.atomic import write_file
from lightning_oft.formats.errors import AdapterFileError, refusing


def write_tensors(file: str | Path, tensors: Mapping[str, Tensor]) -> Path:
    """Write a file that appears complete or not at all. Raises AdapterFileError where it cannot be written."""
    with refusing("cannot be written", file, remedy="free space there or give another file"):
        if Path(file).suffix != ".safetensors":
            raise AdapterFileError("the tools that read this format ask for a .safetensors file: name it so")
        write_file(Path(file), lambda part: save_file(dict(tensors), part, {"format": "pt"}))
    return Path(file)


def read_tensors(file: Path) -> dict[str, Tensor]:
    """All tensors of a file. Raises AdapterFileError where it is damaged."""
    with refusing("not a whole safetensors file", file), safe_open(file, framework="pt") as opened:
        return {key: opened.get_tensor(key).clone() for key in opened.keys()}  # noqa: SIM118 - no dictionary


def keys_of(path: Path) -> list[str]:
    """The names of the tensors at a path; none where it is no such file."""
    try:
        with safe_open(path, framework="pt") as opened:
            return list(opened.keys())
    except Exception:  # a directory, or a file of anything
        return []


def metadata_of(file: Path) -> dict[str, str]:
    """What a file says beside its tensors."""
    with refusing("not a whole safetensors file", file), safe_open(file, framework="pt") as opened:
        return opened.metadata() or {}
