"""Checkpoint files that are whole or not there at all, whenever the process dies."""

from __future__ import annotations

import contextlib
import os
import pickle
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from typing_extensions import override

from lightning_oft.checkpoint_files import CheckpointError, first_line


class WholeCheckpoints(TorchCheckpointIO):
    """Writes a checkpoint beside its final name and renames it when it is complete and on the disk.

    Lightning's own writes it in the system's temporary directory and moves it. Where that is another file system (a
    tmpfs, another disk) the move is a copy under the final name, which first empties the checkpoint that was there: a
    run killed during the copy left an empty or truncated `last.ckpt` in 10 of 10 tries (50 MB, /dev/shm to ext4).
    """

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Called for every checkpoint; places that are no local files are left to Lightning."""
        if storage_options is not None or "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        target = Path(path)  # not where a link leads: that is another checkpoint (save_last="link")
        # One name for each target: what a killed run left is written over by the next, and does not pile up.
        part = target.with_name(f".{target.name}.part")
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
            reason = _os_error(error)
            if reason is None:
                raise
            raise OSError(
                f"{path}: the checkpoint cannot be written ({reason.strerror or reason}); what was there is unchanged: "
                "free space there or give another directory"
            ) from None

    @override
    def load_checkpoint(self, path: str | Path, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Called for every checkpoint that is resumed or tested."""
        if "://" in str(path):
            remote: dict[str, Any] = super().load_checkpoint(path, *args, **kwargs)
            return remote
        if Path(path).is_dir():
            raise CheckpointError(
                f"{path}: is a folder, which only the strategy that wrote it can read, though on any number of processes: "
                "resume it under that strategy (ModelParallelStrategy, where it has .distcp files)"
            )
        try:
            loaded: dict[str, Any] = super().load_checkpoint(path, *args, **kwargs)
        except (FileNotFoundError, PermissionError, ImportError, AttributeError, MemoryError):
            raise
        except pickle.UnpicklingError:
            raise CheckpointError(
                f"{path}: is no checkpoint, is damaged, or holds more than tensors and plain values; copy it again, or pass "
                "weights_only=False if you trust what it may run"
            ) from None
        except Exception as error:  # a damaged archive raises anything
            raise CheckpointError(
                f"{path}: is no checkpoint or is damaged ({first_line(error)}); copy it again"
            ) from None
        return loaded


def _os_error(error: BaseException | None) -> OSError | None:
    """What the system said; torch.save hides it behind an error of its own about positions in the file."""
    while error is not None and not isinstance(error, OSError):
        error = error.__context__
    return error


def write_whole(trainer: Any) -> None:
    """Replace the Trainer's default way of writing checkpoints, within wrappers such as AsyncCheckpointIO too; one that
    the user chose stays."""
    holder, writer = trainer.strategy, trainer.strategy.checkpoint_io
    while hasattr(writer, "_checkpoint_io"):
        holder, writer = writer, writer._checkpoint_io
    if type(writer).__name__ == "TorchCheckpointIO":
        holder._checkpoint_io = WholeCheckpoints()
