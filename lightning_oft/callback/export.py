"""What a fit leaves on disk: the adapter in PEFT's format, and the merged model as plain libraries load it."""

import contextlib
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_oft.callback.checks import submodule
from lightning_oft.callback.strategies.base import StrategyAdapter
from lightning_oft.codecs import cut_like, local_part
from lightning_oft.formats.checkpoint import frozen_names
from lightning_oft.formats.checkpoint_file import CheckpointError, read
from lightning_oft.formats.peft import write_peft
from lightning_oft.formats.pretrained import check_replaceable, root_of, write_pretrained
from lightning_oft.model.adapter_state import take
from lightning_oft.model.merging import merge, unmerge
from lightning_oft.model.traversal import walk


class Exporter:
    """Writes `adapter/` and `merged/` when a fit ends; every process takes part, rank zero writes. Raises OSError on
    every process, before the fit begins, where they could not be written."""

    def __init__(self, callback: Any, strategy: StrategyAdapter, pl_module: nn.Module) -> None:
        self._callback, self._strategy, self._trainer = callback, strategy, strategy.trainer
        self._pl_module, self._root = pl_module, submodule(walk(pl_module), callback.module)
        problem = _problem_with(Path(callback.export_dir)) if self._trainer.is_global_zero else None
        if problem := self._trainer.strategy.broadcast(problem):
            raise OSError(problem)

    @contextlib.contextmanager
    def exporting(self) -> Iterator[dict[str, str]]:
        """Write `adapter/`, and at the end of this context, within which the fit merges, `merged/`; or at once, where
        `merged/` is another state than the fit ends with. Gives where each was written."""
        written = {"adapter": str(Path(self._callback.export_dir) / "adapter")}
        wants_best = self._callback.export_from == "best"
        best = getattr(self._trainer.checkpoint_callback, "best_model_path", "") if wants_best else ""
        if wants_best and not best:
            warnings.warn(
                "export_from='best': no ModelCheckpoint has a best file (give it a monitor): the last state is exported"
            )
        follows = self._callback.merge_on_fit_end and not best
        with self._strategy.whole(), _state_of_checkpoint(self._pl_module, best):
            state = take(self._root, self._callback.adapter_name)
            if self._trainer.is_global_zero:
                write_peft(state, written["adapter"])
            if not follows:
                merge(self._root, keep_base="always", device=self._strategy.merge_device())
                try:
                    self._write_merged(written)
                finally:
                    unmerge(self._root)
        self._trainer.strategy.barrier("export")
        yield written
        if follows:
            with self._strategy.whole():
                self._write_merged(written)
            self._trainer.strategy.barrier("export")

    def _write_merged(self, written: dict[str, str]) -> None:
        written["merged model"] = str(Path(self._callback.export_dir) / "merged")
        state = self._strategy.whole_state(root_of(self._root))
        if self._trainer.is_global_zero:
            companions = _companions(self._pl_module) + _companions(getattr(self._trainer, "datamodule", None))
            write_pretrained(self._root, written["merged model"], companions, state)


def _problem_with(directory: Path) -> str | None:
    """Why results cannot be written into a directory. One that holds something else than a model stays as it is."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            pass
        check_replaceable(directory / "merged")
        if (directory / "adapter").is_file():
            raise FileExistsError(f"{directory}/adapter: is a file where a directory is wanted: give another directory")
    except OSError as error:  # ours say all by themselves, and have no number
        said = f"export_dir={str(directory)!r}: cannot be written ({error.strerror}): give another directory"
        return str(error) if error.errno is None else said
    return None


def _companions(owner: Any) -> list[Any]:
    """The processors and tokenizers of a task or its data: those that it declares, else those under the usual names."""
    names = ("image_processor", "processor", "tokenizer", "feature_extractor")
    found = owner.companions() if hasattr(owner, "companions") else [getattr(owner, name, None) for name in names]
    return [item for item in found if hasattr(item, "save_pretrained")]


@contextlib.contextmanager
def _state_of_checkpoint(pl_module: nn.Module, path: str) -> Iterator[None]:
    """Within this context the model has the trained tensors of a checkpoint, if one is given; its own return after it.
    By name and not as an AdapterState: another callback may have merged its part of the model already."""
    if not path:
        yield
        return
    theirs, frozen = read(path)["state_dict"], frozen_names(pl_module, walk(pl_module))
    mine = {name: tensor for name, tensor in pl_module.state_dict().items() if name not in frozen}
    if missing := next((name for name in mine if name not in theirs), None):
        raise CheckpointError(
            f"{path}: lacks {missing}, which this run trained; nothing was exported: set export_from='last'"
        )
    last = {name: tensor.detach().clone() for name, tensor in mine.items()}
    try:
        _copy(mine, theirs)
        yield
    finally:
        _copy(mine, last)


@torch.no_grad()
def _copy(into: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    for name, tensor in into.items():
        local_part(tensor).copy_(cut_like(values[name], tensor))
