"""OFTFinetuning: when each thing happens in a Lightning run. What happens is on the floors below.

Measured order (lightning 2.6): callback.setup, module.setup, configure_model, restore, optimizers, on_fit_start, ...,
on_train_end, strategy.teardown, on_fit_end, teardown.
"""

from __future__ import annotations

import contextlib
import dataclasses
from os import PathLike
from typing import TYPE_CHECKING, Any, Literal

from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_info
from torch import nn
from typing_extensions import override

from lightning_oft.adapters import load_adapter
from lightning_oft.checkpoints import refresh_fingerprints
from lightning_oft.config import OFTConfig
from lightning_oft.surgery import adapter_names, find_targets, freeze, oft_layers, unload, unmerge
from lightning_oft.surgery.blocks import block_sizes
from lightning_oft.surgery.frozen import let_go
from lightning_oft.surgery.inject import inject_into
from lightning_oft.surgery.merge import merge_gathered
from lightning_oft.surgery.walk import merged_layers

from . import guards, report
from .averages import spare_the_base
from .export import check_place, export, export_merged
from .files import write_whole
from .shadow import (
    after_configure_model,
    drop_checkpoint_hooks,
    keep_checkpoint_hooks,
    leave,
    new_base,
    resume,
    writes_adapter_only,
)
from .strategies import strategy_of

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer


class OFTFinetuning(Callback):
    """Finetune a LightningModule by learned rotations of its frozen weights.

    Injects the rotations when a run is set up, freezes everything else, holds constrained rotations in their ball
    after every optimizer step (COFT), writes checkpoints of the adapter alone, and merges the rotations into the
    weights when the fit ends, so that the model is a plain one again. A later validate, test, predict or fit takes
    the merge back for as long as it runs.

    Put it before weight-averaging callbacks. Generators should not decay towards the identity: give them to an
    optimizer group without weight decay.

    Args:
        enabled: false runs the same task without OFT.
        module: dotted path, below the LightningModule, of the part to adapt; all of it by default. What lies outside is
            frozen too.
        adapter_name: name of this set of rotations.
        pretrained_adapter: directory of an adapter (this library's or PEFT's) to start from; its file decides which
            layers are adapted and how.
        merge_on_fit_end: fold the rotations into the weights when the fit ends.
        keep_base: keep a CPU copy of the adapted weights to take the merge back to the bit: "auto" up to 8 GiB a
            process, "always" or "never".
        save_adapter_only: leave the frozen base out of checkpoints.
        export_dir: where to write, when the fit ends, `adapter/` (PEFT's format) and `merged/` (a plain model).
        export_from: what to export: the "last" state of the fit or ModelCheckpoint's "best".
        **config: the fields of OFTConfig.

    Raises:
        TypeError: an argument is of a wrong type, or there is no such option.
        ValueError: a field has a wrong value; names the field.
    """

    def __init__(
        self,
        enabled: bool = True,
        module: str | None = None,
        adapter_name: str = "default",
        pretrained_adapter: str | None = None,
        merge_on_fit_end: bool = True,
        keep_base: Literal["auto", "always", "never"] = "auto",
        save_adapter_only: bool = True,
        export_dir: str | None = None,
        export_from: Literal["last", "best"] = "last",
        **config: Any,
    ) -> None:
        super().__init__()
        guards.check_options(config, keep_base=keep_base, export_from=export_from)
        guards.check_types(
            bool, enabled=enabled, merge_on_fit_end=merge_on_fit_end, save_adapter_only=save_adapter_only
        )
        guards.check_types(str, module=module, adapter_name=adapter_name)
        guards.check_types((str, PathLike), pretrained_adapter=pretrained_adapter, export_dir=export_dir)
        self.config = OFTConfig(**config)
        self.enabled = enabled
        self.module = module
        self.adapter_name = adapter_name
        self.pretrained_adapter = None if pretrained_adapter is None else str(pretrained_adapter)
        self.merge_on_fit_end = merge_on_fit_end
        self.keep_base = keep_base
        self.save_adapter_only = save_adapter_only
        self.export_dir = None if export_dir is None else str(export_dir)
        self.export_from = export_from
        self._layers: list[str] = []
        self._was_merged: list[str] = []
        self._was_plain = False
        self._started = False
        self._trained: list[nn.Parameter] = []
        self._steps: Any = None
        self._holds: list[Any] = []

    @property
    @override
    def state_key(self) -> str:
        """Two of these callbacks may adapt two parts of one model."""
        return self._generate_state_key(module=self.module, adapter_name=self.adapter_name)

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Called when a run begins: takes an earlier merge back, and injects where the model is already built."""
        if not self.enabled:
            return
        self._stop_watching()  # of a run that failed and whose other callbacks failed at that
        self._was_plain, self._started = not oft_layers(pl_module), False
        guards.check_company(trainer, self)
        if stage == "fit":
            guards.check_directories(trainer, self)
            guards.check_launcher(trainer, self)
        write_whole(trainer)
        strategy_of(trainer).before_inject(trainer, pl_module)
        self._holds = strategy_of(trainer).hold_checkpoints(pl_module, writes_adapter_only(pl_module))
        self._was_merged = list(merged_layers(pl_module))
        if self._was_merged:
            unmerge(pl_module)
        if strategy_of(trainer).injects_early(trainer):
            self._inject(pl_module, built=False)
        after_configure_model(pl_module, self._injected)
        keep_checkpoint_hooks(pl_module)
        self._trained = [parameter for parameter in pl_module.parameters() if parameter.requires_grad]

    def _injected(self, pl_module: nn.Module) -> None:
        """Inject into what the module's own setup and configure_model have built since, and into nothing but that: what
        another callback's setup has frozen or thawed since ours is as we left it."""
        for parameter in self._trained:
            parameter.requires_grad_(True)
        self._trained = []
        self._inject(pl_module, built=True)
        guards.quiet_eval_warning(pl_module)

    def _inject(self, pl_module: nn.Module, built: bool) -> None:
        root = guards.submodule(pl_module, self.module, required=built)
        if root is None:
            return
        known = self.adapter_name in adapter_names(root)
        if self.pretrained_adapter is not None:
            if not known and (built or find_targets(root, self.config, strict=False)):
                load_adapter(root, self.pretrained_adapter, self.adapter_name)
        else:
            targets = find_targets(root, self.config, strict=built)
            guards.check_config(root, self.adapter_name, self.config, targets)
            have = {name for name, layer in oft_layers(root).items() if self.adapter_name in layer.oft_R}  # type: ignore[operator]
            fresh = {name: target for name, target in targets.items() if name not in have}
            if fresh or not known or built:
                inject_into(root, fresh, block_sizes(fresh, self.config), self.config, self.adapter_name, strict=built)
        strategy_of(pl_module.trainer).after_inject(pl_module.trainer, root)
        self._layers = self._own_layers(root)
        freeze(pl_module)

    def _own_layers(self, root: nn.Module) -> list[str]:
        return [name for name, layer in oft_layers(root).items() if self.adapter_name in layer.oft_R]  # type: ignore[operator]

    def root(self, pl_module: nn.Module) -> nn.Module:
        """The part of the LightningModule that this callback adapts."""
        root = guards.submodule(pl_module, self.module, required=True)
        assert root is not None
        return root

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Called when the fit begins: the model is built, restored and wrapped, the optimizers exist."""
        if not self.enabled:
            return
        root = self.root(pl_module)
        guards.check_layers(self._layers, self._own_layers(root))
        guards.check_optimizers(strategy_of(trainer).held(trainer), root, self.adapter_name)
        self._steps = strategy_of(trainer).watch_steps(trainer, root, self.adapter_name)
        strategy_of(trainer).project(trainer, root)
        check_place(trainer, self.export_dir)
        spare_the_base(trainer, pl_module)
        resume(pl_module)
        rank_zero_info(report.start_line(pl_module, root, self.adapter_name))
        report.warn_about_constraint(root, self.adapter_name)
        for logger in trainer.loggers:
            logger.log_hyperparams({"oft": dataclasses.asdict(self.config)})

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Called before each batch: from the first on, what is trained is kept, however the fit ends."""
        self._started = True

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Called when an epoch ends: says so once if a truncated series has left its tolerance."""
        if self._steps is not None:
            self._steps.check_series()

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Called when the fit has ended, after all checkpoints and averages: exports and merges."""
        if not self.enabled:
            return
        self._stop_watching()
        root = self.root(pl_module)
        strategy_of(trainer).settle(pl_module)
        written = export(trainer, pl_module, root, self)
        if self.merge_on_fit_end:
            waiting = [name for name in oft_layers(root) if name not in merged_layers(root)]
            if waiting:  # another callback has merged a part already
                self._merge(trainer, root, only=waiting)
            _let_go(pl_module)
        written |= export_merged(trainer, pl_module, root, self)
        rank_zero_info(report.end_line(root, self.adapter_name, written))

    @override
    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Called when a checkpoint has been loaded: knows a new base again, and continues its random numbers."""
        if not self.enabled:
            return
        if new_base(pl_module):
            refresh_fingerprints(pl_module)
        if trainer.strategy.restore_checkpoint_after_setup:  # on_fit_start is over by then
            resume(pl_module)

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Called when a run fails or is interrupted: nothing stays registered, and a fit that has begun merges nothing.
        What failed before that leaves the model as it was, without rotations or merged."""
        begun = trainer.state.fn == "fit" and self._started
        if begun or trainer.world_size > 1:  # a process that failed alone must not wait for others
            self._was_merged = []
        if self._was_plain and not begun:
            with contextlib.suppress(RuntimeError):  # inside disable_adapters, which is about to be left
                unload(pl_module)
            drop_checkpoint_hooks(pl_module)
        self._leave(trainer, pl_module)

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Called when a run ends: a merge that setup took back is made again."""
        self._leave(trainer, pl_module)

    def _leave(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._stop_watching()
        leave(pl_module)
        if self.enabled and self._was_merged and oft_layers(pl_module) and not merged_layers(pl_module):
            self._merge(trainer, pl_module, only=self._was_merged)
            _let_go(pl_module)
        self._was_merged, self._was_plain = [], False

    def _merge(self, trainer: Trainer, root: nn.Module, only: list[str] | None = None) -> None:
        ways = strategy_of(trainer)
        device, gathered = ways.device(trainer), ways.gathered(trainer)
        merge_gathered(root, keep_base=self.keep_base, device=device, gathered=gathered, only=only)

    def _stop_watching(self) -> None:
        if self._steps is not None:
            self._steps.remove()
            self._steps = None
        for handle in self._holds:
            handle.remove()
        self._holds = []

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_steps": None, "_holds": [], "_trained": []}


def _let_go(pl_module: nn.Module) -> None:
    """Once all of its parts are merged, a model trains like any other."""
    if len(merged_layers(pl_module)) == len(oft_layers(pl_module)):
        let_go(pl_module)
