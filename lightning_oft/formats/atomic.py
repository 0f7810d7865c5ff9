"""Directories and files that a reader finds as they were, as they will be, or not at all: never a mixture."""

import contextlib
import ctypes
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

_HERE = -100  # AT_FDCWD: relative paths start at the working directory
_EXCHANGE = 2  # RENAME_EXCHANGE: https://man7.org/linux/man-pages/man2/rename.2.html
_PREFIX = ".lightning-oft-"  # of unfinished directories


def write_directory(directory: Path, write: Callable[[Path], None], order: tuple[str, ...] | None = None) -> None:
    """Write a directory so that it appears complete or not at all. Raises OSError; what was there is unchanged then.

    `write` fills the directory that it is given. By default that replaces the whole of what is there; with `order`, the
    files of these names alone, one by one, the one without which no reader accepts the rest last.
    """
    directory = Path(os.path.realpath(directory))
    if directory.exists() and not directory.is_dir():
        raise NotADirectoryError(f"{directory} is a file")
    directory.parent.mkdir(parents=True, exist_ok=True)
    within = directory.parent
    if order is not None and directory.is_dir():
        others = [name for name in os.listdir(directory) if name not in order and not name.startswith(_PREFIX)]
        # Beside other files, within the directory itself: it may be a mount point.
        within = directory if others or not os.access(within, os.W_OK) else within
    with TemporaryDirectory(prefix=_PREFIX, dir=within, ignore_cleanup_errors=True) as name:
        scratch = Path(name)
        write(scratch)
        os.chmod(scratch, 0o777 & ~_mask())
        for file in filter(Path.is_file, scratch.rglob("*")):
            _finish(file)
        if directory.is_dir():
            shutil.copymode(directory, scratch)
        if not directory.exists():
            scratch.rename(directory)
        elif within == directory or not _exchanged(scratch, directory):
            _replace(scratch, directory, order)
        _sync(directory.parent)


def write_file(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file so that it appears complete or not at all; `write` fills the path that it is given. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=_PREFIX, dir=path.parent, ignore_cleanup_errors=True) as name:
        part = Path(name, path.name)
        write(part)
        _finish(part)
        os.replace(part, path)


def _finish(file: Path) -> None:
    os.chmod(file, 0o666 & ~_mask())  # safetensors makes them readable by their owner alone
    _sync(file)


def _mask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _exchanged(one: Path, other: Path) -> bool:
    """Whether the two have changed places at once. Only Linux can, and not on every file system."""
    # glibc has renameat2 since 2.28.
    rename = getattr(ctypes.CDLL(None), "renameat2", None) if sys.platform == "linux" else None
    return rename is not None and rename(_HERE, os.fsencode(one), _HERE, os.fsencode(other), _EXCHANGE) == 0


def _replace(scratch: Path, directory: Path, order: tuple[str, ...] | None) -> None:
    """Put the new content in place of the old, which stands aside until all is there and returns after an error.

    Taken away in the reverse of `order` and put in place in it: a kill in between leaves what every reader refuses.
    """
    arrivals = [(scratch / name, directory / name) for name in order] if order is not None else [(scratch, directory)]
    places = [place for _, place in arrivals]
    with TemporaryDirectory(prefix=_PREFIX, dir=places[0].parent, ignore_cleanup_errors=True) as name:
        aside = Path(name)
        try:
            for old in filter(Path.exists, reversed(places)):
                os.replace(old, aside / old.name)
            for new, place in arrivals:
                os.replace(new, place)
        except BaseException:
            for old in reversed(places):
                if (aside / old.name).exists():
                    os.replace(aside / old.name, old)
            raise


def _sync(path: Path) -> None:
    """Make a write or a rename durable, where the system can."""
    with contextlib.suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
