"""EncodedRows: what frozen encoders made of pictures and prompts, as files, so that they run once."""

import warnings
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lightning_oft.formats.atomic import write_file

Row = dict[str, Tensor]


class EncodedRows:
    """Tensors of single examples on disk, one file each, named by a key that says all that decides what is in it.

    A file appears whole or not at all, and is right whenever it was written: several processes and runs may fill one
    directory. One that is damaged is made again, with a warning. Raises ValueError where `directory` is a file.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory).expanduser()
        if self.directory.exists() and not self.directory.is_dir():
            raise ValueError(f"{directory}: is a file where a directory is wanted; give another cache_dir")

    def get(self, keys: Sequence[str], encode: Callable[[Sequence[int]], Row]) -> Row:
        """The tensors of a batch by name, (B, ...), on the CPU.

        `encode` makes those of the places that it is given, where no file has them; they are kept unless a value is
        not finite.
        """
        rows = {key: row for key in set(keys) if (row := self._read(key)) is not None}
        if missing := [key for key in dict.fromkeys(keys) if key not in rows]:
            made = {name: tensor.cpu() for name, tensor in encode([keys.index(key) for key in missing]).items()}
            for place, key in enumerate(missing):
                rows[key] = row = {name: tensor[place].contiguous().clone() for name, tensor in made.items()}
                if all(bool(tensor.isfinite().all()) for tensor in row.values()):
                    self._write(key, row)
        return {name: torch.stack([rows[key][name] for key in keys]) for name in rows[keys[0]]}

    def _path(self, key: str) -> Path:
        return self.directory / key[:2] / f"{key[2:]}.safetensors"

    def _read(self, key: str) -> Row | None:
        """None where there is no such file, or it is not as it was written."""
        path = self._path(key)
        try:
            with safe_open(path, "pt") as file:
                row = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no dictionary
                said = (file.metadata() or {}).get("checksum")
            if said == _checksum(row):
                return row
        except FileNotFoundError:
            return None
        except (OSError, SafetensorError):
            pass
        warnings.warn(f"{path}: is damaged, and made again")
        return None

    def _write(self, key: str, row: Row) -> None:
        path, metadata = self._path(key), {"checksum": _checksum(row)}
        try:
            write_file(path, lambda place: save_file(row, place, metadata))
        except (OSError, SafetensorError) as error:
            reason = str(error).split("\n")[0]
            warnings.warn(
                f"{self.directory}: not all that is encoded can be kept ({reason}); free space, or mend its rights"
            )


def _checksum(row: Row) -> str:
    """A power cut may leave a file of the right length that holds zeros."""
    total = 0
    for _, tensor in sorted(row.items()):
        total = zlib.crc32(tensor.view(torch.uint8).numpy().tobytes(), total)
    return str(total)
