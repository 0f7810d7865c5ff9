"""AtomicCheckpointIO: checkpoint files that are whole or not there at all, whenever the process dies."""

import contextlib
import os
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from typing_extensions import override


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint beside its final name and renames it when it is complete and on the disk.

    Opt in with `Trainer(plugins=[AtomicCheckpointIO()])`; `lightning-oft fit` does. Lightning's own moves a checkpoint
    from the system's temporary directory. From another file system that is a copy, which first empties what was there:
    a run killed during it left an empty or truncated `last.ckpt` in 10 of 10 tries (50 MB, /dev/shm to ext4).
    """

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Called for every checkpoint; places that are no local files are left to Lightning."""
        if storage_options is not None or "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        target = Path(path)  # not where a link leads: that is another checkpoint (save_last="link")
        part = target.with_name(f".{target.name}.part")  # always the same: the next run replaces what a killed one left
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with part.open("wb") as stream:
                torch.save(checkpoint, stream)
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(part, target)
        except BaseException as error:
            with contextlib.suppress(OSError):
                part.unlink()
            cause: BaseException | None = error  # torch.save hides the system's error behind one about positions
            while cause is not None and not isinstance(cause, OSError):
                cause = cause.__context__
            if cause is None:
                raise
            raise OSError(
                f"{path}: the checkpoint cannot be written ({cause.strerror or cause}); what was there is unchanged: "
                "free space there or give another directory"
            ) from None

    @override
    def load_checkpoint(self, path: str | Path, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Called for every checkpoint that is resumed or tested; torch says of a damaged one anything but its name."""
        try:
            return super().load_checkpoint(path, *args, **kwargs)
        except (FileNotFoundError, PermissionError, ImportError, AttributeError, MemoryError):
            raise
        except Exception as error:
            reason = str(getattr(error, "strerror", None) or error).strip().split("\n")[0]
            raise ValueError(f"{path}: cannot be read as a checkpoint file ({reason}); copy it again") from None
