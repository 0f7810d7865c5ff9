"""What a fit leaves on disk: the adapter in PEFT's format, and the merged model as plain libraries load it."""

import contextlib
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_oft.callback.checks import submodule
from lightning_oft.callback.strategies.base import StrategyAdapter
from lightning_oft.codecs import cut_like, local_part
from lightning_oft.formats.checkpoint import frozen_names
from lightning_oft.formats.checkpoint_file import CheckpointError, read
from lightning_oft.formats.errors import first_line
from lightning_oft.formats.merged import write_merged
from lightning_oft.formats.peft import write_peft
from lightning_oft.formats.pretrained import (
    check_replaceable,
    companions_of,
    roots_of,
    save_config,
    saves_itself,
    write_pipeline,
    write_pretrained,
)
from lightning_oft.model.adapter_state import take
from lightning_oft.model.folding import packed_layers
from lightning_oft.model.merging import merge_layers, merged, unmerge
from lightning_oft.model.traversal import some, walk


class Exporter:
    """Writes `adapter/` and `merged/` when a fit ends; every process takes part, rank zero writes. Raises OSError or
    ValueError on every process, before the fit begins, where they could not be written.

    `merged/` is left out where the weights take no merge, unless a dtype was given for it. Where adapters turn several
    library models, it has a directory for each, by its name in the module; where these are parts of the module's
    `pipeline`, it is that pipeline.
    """

    def __init__(self, callback: Any, strategy: StrategyAdapter, pl_module: nn.Module, merges: bool) -> None:
        self._callback, self._strategy, self._trainer = callback, strategy, strategy.trainer
        self._pl_module, self._root = pl_module, submodule(walk(pl_module), callback.module)
        self._merges, self._dtype = merges, callback.merged_dtype
        self._can_merge = merges or not packed_layers(walk(self._root))
        if self._dtype is not None and type(strategy) is not StrategyAdapter:
            raise ValueError(
                f"merged_dtype={self._dtype!r}: cannot be written under {type(self._trainer.strategy).__name__}, where "
                "no process has the whole weights: set it to None, and after the run merge the directories, as "
                "`lightning-oft merge --base ID --adapter .../adapter --output DIR` does"
            )
        self._places = roots_of(self._root) if self._can_merge or self._dtype is not None else {}
        self._pipeline: Any = getattr(pl_module, "pipeline", None)
        self._parts = {
            name: root
            for name, part in getattr(self._pipeline, "components", {}).items()
            for root in self._places.values()
            if root is part
        }
        if len(self._parts) < max(1, len(self._places)):
            self._pipeline = None
        keepers = self._trainer.checkpoint_callbacks
        if callback.export_from == "best" and not any(getattr(one, "save_top_k", 0) for one in keepers):
            raise ValueError(
                "export_from='best': no ModelCheckpoint keeps a best file: give Trainer(callbacks=...) one with a "
                "monitor, or set export_from='last'"
            )
        self._companions: list[Any] = []
        problem = self._problem() if self._trainer.is_global_zero else None
        if problem := self._trainer.strategy.broadcast(problem):
            raise OSError(problem)

    def _problem(self) -> str | None:
        """Why results cannot be written. A directory that holds something else than a model stays as it is."""
        directory = Path(self._callback.export_dir)
        try:
            directory.mkdir(parents=True, exist_ok=True)
            for name in self._places if self._pipeline is None else [""]:
                check_replaceable(directory / "merged" / name)
            if (directory / "adapter").is_file():
                what = "is a file where a directory is wanted"
                raise FileExistsError(f"{directory}/adapter: {what}: give another directory")
            with tempfile.TemporaryDirectory(prefix=".", dir=directory) as scratch:  # hidden, if a kill leaves it
                return self._try_companions(Path(scratch))
        except OSError as error:  # ours say all by themselves, and have no number
            said = f"export_dir={str(directory)!r}: cannot be written ({error.strerror}): give another directory"
            return str(error) if error.errno is None else said

    def _try_companions(self, scratch: Path) -> str | None:
        """What stands beside the weights is saved once before the fit: the weights of hours must not fail with it."""
        try:
            what = "the processors"
            if self._places:
                owners = (self._pl_module, getattr(self._trainer, "datamodule", None))
                self._companions = [one for owner in owners for one in companions_of(owner)]
            for companion in self._companions:
                what = type(companion).__name__
                companion.save_pretrained(scratch)
            for root in self._places.values():
                what = f"the configuration of {type(root).__name__}"
                save_config(root, scratch)
        except Exception as error:
            reason = first_line(error)
            return f"export_dir: {what} cannot be saved beside the merged model ({reason}): mend it, or set it to None"
        return None

    @contextlib.contextmanager
    def exporting(self) -> Iterator[dict[str, str]]:
        """Write `adapter/`, and at the end of this context, within which the fit merges, `merged/`; or at once, where
        `merged/` is another state than the fit ends with. Gives where each was written."""
        written = {"adapter": str(Path(self._callback.export_dir) / "adapter")}
        with self._strategy.whole():
            best = self._best() if self._callback.export_from == "best" else {}
            follows = self._merges and not best and self._dtype is None
            with _with_tensors(self._pl_module, best):
                state, metrics = take(self._root, self._callback.adapter_name), self._metrics(bool(best))
                if self._trainer.is_global_zero:
                    write_peft(state, written["adapter"], metrics)
                if self._dtype is not None:
                    self._write_merged(written)
                elif self._can_merge and not follows:
                    merge_layers(walk(self._root), keep_base="always", device=self._strategy.merge_device())
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
        if self._pipeline is None:
            for name, root in self._places.items():
                save = self._saving(root)
                if self._trainer.is_global_zero:
                    save(Path(written["merged model"], name))
            return
        # Another callback may have parts of the pipeline that it has not merged yet.
        with merged(self._pl_module) if self._dtype is None else contextlib.nullcontext():
            saves = {name: self._saving(part) for name, part in self._parts.items()}
            if self._trainer.is_global_zero:
                write_pipeline(self._pipeline, written["merged model"], saves)

    def _saving(self, root: nn.Module) -> Callable[[Path], Any]:
        """What writes one of the models into a directory, once every process has given its part of it."""
        if self._dtype is not None or not saves_itself(root):
            return partial(write_merged, root, dtype=self._dtype, companions=self._companions)
        state = self._strategy.whole_state(root)
        return partial(write_pretrained, root, companions=self._companions, state=state)

    def _metrics(self, of_best: bool) -> dict[str, float]:
        """What is known of the state that is exported. Every process asks: the last ones may yet be gathered."""
        if not of_best:
            return {name: float(value) for name, value in self._trainer.callback_metrics.items()}
        keeper = self._trainer.checkpoint_callback
        return {} if keeper.best_model_score is None else {keeper.monitor: float(keeper.best_model_score)}

    def _best(self) -> dict[str, Tensor]:
        """What trained, as it is in the best checkpoint; nothing, and a warning, where the last state must do."""
        path = getattr(self._trainer.checkpoint_callback, "best_model_path", "")
        mine = self._pl_module.state_dict()
        frozen = frozen_names(self._pl_module, walk(self._pl_module), mine)
        names = [name for name in mine if name not in frozen]
        problem, theirs = "" if path else "no ModelCheckpoint has a best file", {}
        if path:
            try:
                theirs = read(path)["state_dict"]
                lacking = [name for name in names if name not in theirs]
                problem = f"{path} lacks {some(lacking)}, which this run trained" if lacking else ""
            except (OSError, CheckpointError) as error:
                problem = str(error)
        if self._trainer.strategy.reduce_boolean_decision(not problem, all=True):
            return {name: theirs[name] for name in names}
        warnings.warn(f"export_from='best': {problem or 'another process cannot read it'}: the last state is exported")
        return {}


@contextlib.contextmanager
def _with_tensors(pl_module: nn.Module, theirs: Mapping[str, Tensor]) -> Iterator[None]:
    """Within this context the model has these tensors, if any are given; its own return after it. By name and not as an
    AdapterState: another callback may have merged its part of the model already."""
    mine = {name: tensor for name, tensor in pl_module.state_dict().items() if name in theirs} if theirs else {}
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
