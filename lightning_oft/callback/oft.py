"""OFTFinetuning: when each thing happens in a Lightning run. What happens is on the floors below.

Measured order (lightning 2.6): callback.setup, module.setup, configure_model, restore, optimizers, on_fit_start, ...,
on_train_end, strategy.teardown, on_fit_end, teardown.
"""

import contextlib
import dataclasses
import warnings
from typing import Any, Literal

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn
from typing_extensions import override

from lightning_oft.callback import checkpoint_hooks, checks, optimizers, report
from lightning_oft.callback.run import Run
from lightning_oft.callback.strategies.base import strategy_adapter
from lightning_oft.codecs import reshard
from lightning_oft.config import OFTConfig
from lightning_oft.model import activation, fingerprint, freezing, injection, merging, plan, saved_modules, targets
from lightning_oft.model.traversal import Modules, adapted, adapter_names, merged_layers, walk


class OFTFinetuning(Callback):
    """Finetune a LightningModule by learned rotations of its frozen weights.

    Injects the rotations when a run is set up, freezes everything else, projects constrained rotations into their ball
    after every optimizer step (COFT), writes checkpoints of the adapter alone, and merges the rotations into the
    weights when the fit ends, so that the model is a plain one again. A later validate, test, predict or fit takes
    the merge back for as long as it runs.

    Put it before weight-averaging callbacks. Generators should not decay towards the identity: give them to an
    optimizer group without weight decay.

    Args:
        enabled: false runs the same task without OFT.
        module: dotted path of the part to adapt, all by default; the rest is frozen.
        adapter_name: name of this set of rotations.
        pretrained_adapter: directory or hub id of an adapter (this library's or PEFT's) to start from; its file decides all but
            `magnitude`.
        ignore_mismatched_base: accept a pretrained_adapter of another base.
        merge_on_fit_end: fold the rotations into the weights when the fit ends.
        keep_base: keep a CPU copy of the adapted weights to take a merge back to the bit; "auto": up to 8 GiB.
        save_adapter_only: leave the frozen base out of checkpoints.
        export_dir: where a fit writes `adapter/` (PEFT's format) and `merged/`, plain.
        merged_dtype: of `merged/`; without it a quantized base is not written.
        export_from: state to export, "last" or ModelCheckpoint's "best".
        **config: the fields of OFTConfig. Where modules_to_save is not among them, the modules that the LightningModule's
            `new_head` names are trained whole; our tasks name a head that starts random.

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
        ignore_mismatched_base: bool = False,
        merge_on_fit_end: bool = True,
        keep_base: Literal["auto", "always", "never"] = "auto",
        save_adapter_only: bool = True,
        export_dir: str | None = None,
        export_from: Literal["last", "best"] = "last",
        merged_dtype: Literal["float32", "bfloat16", "float16"] | None = None,
        **config: Any,
    ) -> None:
        super().__init__()
        self.enabled = enabled
        self.module = module
        self.adapter_name = adapter_name
        self.pretrained_adapter = pretrained_adapter
        self.ignore_mismatched_base = ignore_mismatched_base
        self.merge_on_fit_end = merge_on_fit_end
        self.keep_base = keep_base
        self.save_adapter_only = save_adapter_only
        self.export_dir = export_dir
        self.export_from = export_from
        self.merged_dtype = merged_dtype
        checks.check_arguments(config, vars(self))
        self.config, self._given = OFTConfig(**config), set(config)
        self._run: Run | None = None

    @property
    @override
    def state_key(self) -> str:
        """Two of these callbacks may adapt two parts of one model."""
        return self._generate_state_key(module=self.module, adapter_name=self.adapter_name)

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Called when a run begins: takes an earlier merge back, and injects where the model is already built."""
        if not self.enabled:
            checkpoint_hooks.refuse_adapters(pl_module)
            return
        self._forget_run()  # one that failed, and whose other callbacks failed at that
        checks.check_callbacks(trainer, self, stage)
        modules = walk(pl_module)
        run = self._run = Run(
            strategy_adapter(trainer), adapter_names(modules), list(merged_layers(modules)), self.config
        )
        run.keeps_adapter = not run.strategy.can_unload
        run.strategy.prepare(pl_module, checkpoint_hooks.writes_adapter_only(trainer), run.undo)
        if run.was_merged:
            merging.unmerge(pl_module)
        if run.strategy.injects_early():
            self._inject(pl_module, built=False)
        checkpoint_hooks.after_configure_model(pl_module, self._inject)
        checkpoint_hooks.add_checkpoint_hooks(pl_module)
        run.trainable = [parameter for parameter in pl_module.parameters() if parameter.requires_grad]

    def _inject(self, pl_module: nn.Module, built: bool = True) -> None:
        """Inject into what is there; once all is `built`, into what the module's setup and configure_model have made
        since, and nothing else: what another callback's setup has frozen or unfrozen is as this one left it."""
        run, everything = self._run, walk(pl_module)
        assert run is not None
        run.modes = {module: freezing.asked_mode(module) for module in everything.values()} | run.modes
        for parameter in run.trainable:
            parameter.requires_grad_(True)
        run.trainable = []
        if self.module and not built and self.module not in everything:
            return
        root = checks.submodule(everything, self.module)
        modules = walk(root)
        run.strategy.check_packed(everything)
        if built:
            checks.check_precision(run.strategy.trainer, everything)
            fingerprint.note_base(everything, again=True)  # the module's own setup may have loaded it
        run.config = self._whole_heads(pl_module, modules)
        if self.pretrained_adapter is None:
            planned = plan.plan_injection(modules, run.config, self.adapter_name, strict=built)
            if built and self.adapter_name not in run.found:  # what is there is all there will be
                targets.report_names(modules, run.config, planned.layers)
            injection.carry_out(modules, planned)
        elif self.adapter_name not in adapter_names(modules) and (
            built or targets.find_targets(modules, self.config, strict=False)
        ):
            from lightning_oft.formats import load_adapter, read_adapter

            theirs = read_adapter(self.pretrained_adapter, self.adapter_name, or_only=True).config
            checks.check_given(self._given, self.config, theirs)
            options = self.ignore_mismatched_base, self.config.magnitude
            load_adapter(root, self.pretrained_adapter, self.adapter_name, *options)
        run.strategy.after_inject(root)
        run.layers, run.saved = self._layers(modules), self._saved(modules)
        freezing.freeze(everything)
        if built and freezing.only_norms_rest(everything):  # which Lightning takes for a mistake
            run.undo.enter_context(warnings.catch_warnings())
            warnings.filterwarnings("ignore", message=r"Found \d+ module\(s\) in eval mode at the start of training")

    def _whole_heads(self, pl_module: nn.Module, modules: Modules) -> OFTConfig:
        """The configuration; where it does not say what to train whole, that is the new, random head of a task."""
        heads = [
            head for head in getattr(pl_module, "new_head", ()) if any(targets.matches(m, [head]) for m in modules)
        ]
        if self.config.modules_to_save is not None or not heads:
            return self.config
        return dataclasses.replace(self.config, modules_to_save=heads)

    def _layers(self, modules: Modules) -> list[str]:
        return [name for name, _, state in adapted(modules) if self.adapter_name in state.configs]

    def _saved(self, modules: Modules) -> list[str]:
        return [one.name for one in saved_modules.saved_tensors(modules) if self.adapter_name in one.slot.owners]

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Called when the fit begins: the model is built, restored and wrapped, the optimizers exist. Whatever could
        make its end fail is asked here."""
        if (run := self._run) is None:
            return
        modules = walk(checks.submodule(walk(pl_module), self.module))
        checks.check_layers(run.layers, self._layers(modules), run.saved, self._saved(modules))
        rotations = checks.trainable_rotations(modules, self.adapter_name)
        optimizers.check_rotations(run.strategy.optimized(), rotations, pl_module)
        checkpoint_hooks.retrain(pl_module, run.unfrozen)
        optimizers.check_frozen(trainer.optimizers, pl_module, self.module)
        checks.check_pruning(trainer, pl_module)
        run.merges = checks.can_merge(trainer, self, modules)
        run.steps = run.strategy.watch_steps(rotations, run.undo)
        if self.export_dir is not None:
            from lightning_oft.callback.export import Exporter

            run.exporter = Exporter(self, run.strategy, pl_module, run.merges)
        checks.check_averages(trainer, pl_module)
        report.report_start(self.adapter_name, {one: modules[one] for one in run.layers}, rotations, pl_module)
        optimizers.report(trainer.optimizers, rotations, pl_module)
        for logger in trainer.loggers:
            logger.log_hyperparams({"oft": dataclasses.asdict(run.config)})

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Called before each batch: from the first on, what is trained is kept, however the fit ends."""
        if (run := self._run) is not None:
            if not run.has_begun:
                checks.report_frozen(trainer, walk(checks.submodule(walk(pl_module), self.module)), self.adapter_name)
                run.first_forward = checks.watch_first_forward(pl_module, batch, run.undo)
            run.has_begun = run.keeps_adapter = True

    @override
    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Any) -> None:
        """Called before each backward: the first forward has shown whether weights are read past their layers."""
        if (run := self._run) is not None and run.first_forward is not None:
            first, run.first_forward = run.first_forward, None
            checks.check_reads(first)

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Called when an epoch ends: says so once if a truncated series has left its tolerance."""
        if self._run is not None and self._run.steps is not None:
            self._run.steps.check_series()

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Called when the fit has ended, after all checkpoints and averages: exports and merges."""
        if (run := self._run) is None:
            return
        run.keeps_adapter = True
        run.undo.close()
        reshard(pl_module.modules())
        root = checks.submodule(walk(pl_module), self.module)
        with run.exporter.exporting() if run.exporter is not None else contextlib.nullcontext({}) as written:
            waiting = [name for name, _, state in adapted(walk(root)) if state.merged is None]
            if run.merges and waiting:  # another callback may have merged all of it already
                self._merge(run, pl_module, root, waiting)
        report.report_end(self.adapter_name, walk(root), written)

    @override
    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Called when a checkpoint has been loaded: recognises a new base, and what another callback had unfrozen."""
        if self._run is None:
            return
        from lightning_oft.formats.checkpoint import ENTRY

        self._run.keeps_adapter |= activation.has_learned(walk(pl_module))
        entry = checkpoint.get(ENTRY, {})
        if "state_dict" in checkpoint and not entry.get("adapter_only"):  # FSDP takes it out, and loads no other base
            fingerprint.refresh_fingerprints(walk(pl_module))
        self._run.unfrozen = set(entry.get("unfrozen", ()))
        if trainer.strategy.restore_checkpoint_after_setup:  # on_fit_start is over by then
            checkpoint_hooks.retrain(pl_module, self._run.unfrozen)

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Called when a run fails or is interrupted: nothing stays registered, and a fit that has begun merges nothing.
        What failed before that leaves the model as it was, without rotations or merged."""
        if (run := self._run) is not None:
            begun = run.keeps_adapter = trainer.state.fn == "fit" and run.has_begun
            if begun or trainer.world_size > 1:  # a process that failed alone must not wait for others
                run.was_merged = []
        self.teardown(trainer, pl_module, "")

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Called when a run ends: a merge that setup took back is made again, and what trained and loaded nothing
        leaves the model as it found it."""
        checkpoint_hooks.remove_configure_model(pl_module)
        if (run := self._run) is None:
            if not self.enabled:
                checkpoint_hooks.allow_adapters(pl_module)
            return
        self._forget_run()
        freezing.ask_norms(walk(pl_module), run.modes)
        if not run.keeps_adapter:
            self._take_out(run, pl_module)
        modules = walk(pl_module)
        if run.was_merged and adapter_names(modules) and not merged_layers(modules):
            self._merge(run, pl_module, pl_module, run.was_merged, requantize=True)

    def _take_out(self, run: Run, pl_module: nn.Module) -> None:
        """Take out what the run has put in, and nothing that was there before."""
        modules = walk(pl_module)
        with contextlib.suppress(RuntimeError):  # inside disable_adapters, which is about to be left
            if not run.found:
                injection.unload(pl_module)
                checkpoint_hooks.remove_checkpoint_hooks(pl_module)
            elif self.adapter_name in set(adapter_names(modules)) - set(run.found):
                injection.delete_adapter(pl_module, self.adapter_name)

    def _forget_run(self) -> None:
        if self._run is not None:
            self._run.undo.close()
        self._run = None

    def _merge(
        self, run: Run, pl_module: nn.Module, root: nn.Module, only: list[str], requantize: bool = False
    ) -> None:
        """Merge layers of a part; once all parts are merged, the model trains like any other."""
        freezing.ask_norms(walk(pl_module), run.modes)
        run.strategy.merge(root, self.keep_base, only, requantize)
        modules = walk(pl_module)
        if all(state.merged is not None for _, _, state in adapted(modules)):
            freezing.unfreeze_merged(modules)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_run": None}
