"""Floor 3: adapter files in PEFT's format, written and read; what PEFT cannot say stands beside it under our own key."""

from .contents import Contents, contents_of
from .format import AdapterFile, AdapterFileError
from .loading import check_fingerprint, load_adapter
from .reading import read_adapter
from .writing import save_adapter, write_contents

__all__ = [
    "AdapterFile",
    "AdapterFileError",
    "Contents",
    "check_fingerprint",
    "contents_of",
    "load_adapter",
    "read_adapter",
    "save_adapter",
    "write_contents",
]
