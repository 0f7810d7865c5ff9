"""Two directories that change places at once: whoever looks finds the one or the other, and never neither."""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path

_HERE = -100  # AT_FDCWD: relative paths start at the working directory
_EXCHANGE = 2  # RENAME_EXCHANGE: https://man7.org/linux/man-pages/man2/rename.2.html


def exchange(one: Path, other: Path) -> bool:
    """Whether the two have changed places. Only Linux can, and not on every file system; else nothing has happened."""
    if sys.platform != "linux":
        return False
    rename = getattr(ctypes.CDLL(None), "renameat2", None)  # glibc has it since 2.28
    return rename is not None and rename(_HERE, os.fsencode(one), _HERE, os.fsencode(other), _EXCHANGE) == 0
