"""`fit`, `validate`, `test`, `predict`: a LightningCLI application with a top-level `oft:` block."""

import logging
import os
import sys
import warnings
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jsonargparse import set_parsing_settings
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, instantiate_class
from lightning.pytorch.plugins.io import CheckpointIO
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch.optim import Optimizer

from lightning_oft import data, tasks
from lightning_oft.callback.checkpoint_io import AtomicCheckpointIO
from lightning_oft.callback.oft import OFTFinetuning
from lightning_oft.callback.pictures import sheet, stacked, write_picture
from lightning_oft.callback.random_state import RandomState
from lightning_oft.callback.samples import Samples
from lightning_oft.cli import COMMANDS, config_files
from lightning_oft.cli.errors import UserError
from lightning_oft.cli.parser import Formatter, Parser, squeezed
from lightning_oft.cli.tables import sample_table, score_table, test_table
from lightning_oft.formats import read_adapter
from lightning_oft.formats.pretrained import loader_of
from lightning_oft.tasks.optimization import configure

_EXAMPLES = {"fit": "--trainer.max_epochs 3", "test": "--oft.pretrained_adapter runs/adapter"}
_DESCRIPTION = """{summary}.
Options come from a YAML file, from the command line, or both; the command line wins.

example:
  lightning-oft {command} --config configs/vision.yaml {example}"""


class Application(LightningCLI):
    """LightningCLI with the adapter's block, our order of callbacks and optimizers that see the injected rotations."""

    def __init__(self, arguments: list[str]) -> None:
        self.command = command = arguments[0]
        self.scores_before: dict[str, float] = {}
        self.samples_before: dict[str, Any] = {}
        summary, example = COMMANDS[command].capitalize(), _EXAMPLES.get(command, "--ckpt_path best.ckpt")
        description = _DESCRIPTION.format(summary=summary, command=command, example=example)
        super().__init__(
            # A second run into the same directory is ordinary; Lightning would refuse it over an old config.yaml.
            save_config_kwargs={"overwrite": True},
            parser_class=Parser,
            parser_kwargs={
                "prog": "lightning-oft",
                "formatter_class": Formatter,
                "allow_abbrev": False,  # `--trainer.max_epoch` is a mistake, not a short form
                command: {"description": description},
            },
            args=arguments,
        )

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
        """The command of this run alone: building a parser for each of the four would take four times as long."""
        return {self.command: LightningCLI.subcommands()[self.command]}

    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the adapter first and the Trainer last: --help is read from the top."""
        parser.add_lightning_class_args(OFTFinetuning, "oft")
        parser.add_lightning_class_args(LightningModule, "model", subclass_mode=True)
        parser.add_lightning_class_args(LightningDataModule, "data", subclass_mode=True, required=False)
        parser.add_optimizer_args()
        parser.add_lr_scheduler_args()
        parser.add_lightning_class_args(Trainer, "trainer")
        text = "in fit, test the model before and after and print both scores as a table"
        parser.add_argument("--test_before_and_after", type=bool, default=False, help=text)

    def _prepare_subcommand_parser(self, *args: Any, **kwargs: Any) -> LightningArgumentParser:
        parser = super()._prepare_subcommand_parser(*args, **kwargs)
        if self.command == "test":
            parser.set_defaults({"verbose": False})  # Lightning's table cuts off names; ours comes after the test
        parser.tidy(self.command)  # type: ignore[attr-defined]
        return parser

    def _parse_ckpt_path(self) -> None:
        """Leave the configuration alone: the stock method prefers a checkpoint's hyperparameters to what was given."""

    def instantiate_classes(self) -> None:
        """Build model, data and trainer. A ValueError or TypeError here is about the configuration."""
        try:
            super().instantiate_classes()
        except (ValueError, TypeError) as error:
            reason, *_ = str(error).partition("Given value type:")  # the values that follow are the whole block
            raise UserError(f"{self.command}: {squeezed(reason)}") from error
        if self.command == "fit" and not is_overridden("configure_optimizers", self.model, LightningModule):
            name, example = type(self.model).__name__, "--optimizer AdamW --optimizer.lr 1e-3"
            raise UserError(f"fit: {name} configures no optimizer; give one, as in {example}")

    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[Callback]) -> Trainer:
        """Put OFT first: a weight-averaging callback copies the rotations, which OFT injects."""
        given = {key: config[key] or [] for key in ("callbacks", "plugins")}
        listed = {key: value if isinstance(value, list) else [value] for key, value in given.items()}
        # Lightning takes one CheckpointIO: ours is for a configuration that has none.
        has_writer = any(isinstance(plugin, CheckpointIO) for plugin in listed["plugins"])
        config["callbacks"] = [*callbacks, RandomState(), Samples(), *listed["callbacks"]]
        config["plugins"] = [*([] if has_writer else [AtomicCheckpointIO()]), *listed["plugins"]]
        return super()._instantiate_trainer(config, [])

    def _add_configure_optimizers_method_to_model(self, subcommand: str | None) -> None:
        """Build the optimizer in `configure_optimizers`, where the rotations exist.

        The stock method builds it here, over `model.parameters()` without a rotation, and trains nothing: exit code 0
        and every generator zero (Lightning-AI/pytorch-lightning#19110).
        """
        optimizer, scheduler = self._get(self.config_init, "optimizer"), self._get(self.config_init, "lr_scheduler")
        if optimizer:
            given = {"optimizer": optimizer.as_dict(), "lr_scheduler": scheduler and scheduler.as_dict()}
            # A partial of a module-level function pickles for ddp_spawn, and a deep copy of the model takes it along.
            self.model.configure_optimizers = partial(_optimizers, self.model, **given)

    def before_fit(self) -> None:
        """Score the model before the fit, and let it generate."""
        if self._get(self.config_init, "test_before_and_after"):
            self.scores_before, self.samples_before = self._scores(), self._samples()

    def after_fit(self) -> None:
        """Score the model after the fit, and say where the results are and how to load them."""
        if self.scores_before:
            self._say(score_table(self.scores_before, self._scores(), getattr(self.model, "shown_scores", ("acc",))))
        if self.samples_before:
            self._show(self.samples_before, self._samples())
        if export_dir := self._get(self.config, "oft").get("export_dir"):
            merged, adapter = Path(export_dir, "merged"), Path(export_dir, "adapter")
            if (adapter / "adapter_config.json").is_file():
                self._say(f"load the adapter with       {loading_line(adapter)}")
            places = [merged] if loader_of(merged) else sorted(merged.glob("*/"))
            for place, loader in ((place, loader_of(place)) for place in places):
                if loader:
                    whole = getattr(self.model, "loader", "")
                    call = (
                        f'{whole}("{place}")' if whole else f'{loader}.from_pretrained("{place}"{self._dtype(loader)})'
                    )
                    self._say(f"load the merged model with  {call}")

    def _dtype(self, loader: str) -> str:
        """What a pipeline in half precision must be told: its parts have different ideas of what is loaded otherwise."""
        dtype = next(self.model.parameters()).dtype
        return "" if loader != "DiffusionPipeline" or dtype == torch.float32 else f", dtype={dtype}"

    def _scores(self) -> dict[str, float]:
        """Every metric of a test without its table and progress bar."""
        bar = self.trainer.progress_bar_callback
        if bar:
            bar.disable()
        scores = self.trainer.test(self.model, datamodule=self.datamodule, verbose=False)
        if bar:
            bar.enable()
        return {name: float(value) for loader in scores for name, value in loader.items()}

    def _samples(self) -> dict[str, Any]:
        """What the model makes of its prompts, by prompt; nothing for other tasks."""
        return self.model.samples() if isinstance(self.model, tasks.Task) else {}

    def _show(self, before: Mapping[str, Any], after: Mapping[str, Any]) -> None:
        """Print what the model made of its prompts, or draw it on a sheet, below what it learned from."""
        if all(isinstance(one, str) for one in before.values()):
            self._say(sample_table(before, after))
        elif self.trainer.is_global_zero:
            sheets = [sheet({"before": [*before.values()], "after": [*after.values()]}, [*before])]
            if learned := self.datamodule.shown(len(before)) if hasattr(self.datamodule, "shown") else []:
                sheets.insert(0, sheet({"taught": learned}))
            folder = self._get(self.config, "oft").get("export_dir") or self.trainer.default_root_dir
            place = Path(folder, "before_after.png")
            write_picture(place, stacked(sheets))
            self._say(f"before and after            {place}")

    def after_validate(self) -> None:
        """Refuse to end in silence where there was nothing to validate on."""
        trainer, what = self.trainer, "validation data; a data module's val_fraction sets some aside"
        self._require(trainer.num_val_batches, trainer.limit_val_batches, what)

    def after_test(self) -> None:
        """Print the scores, and refuse to end in silence where there was nothing to test on."""
        trainer, what = self.trainer, "test set; give the data module one, or validate"
        self._require(trainer.num_test_batches, trainer.limit_test_batches, what)
        if scores := {name: float(value) for name, value in trainer.callback_metrics.items()}:
            self._say(test_table(scores))

    def _require(self, batches: Sequence[float], limit: float | None, what: str) -> None:
        """Raise UserError where a run had no batches, unless it was told to have none."""
        if not sum(batches) and limit != 0:
            raise UserError(f"{self.command}: the data has no {what}")

    def after_predict(self) -> None:
        """Say that there was nothing to predict, or that the predictions are lost where no callback writes them."""
        trainer, what = self.trainer, "examples to predict; give the data module a test set"
        self._require(trainer.num_predict_batches, trainer.limit_predict_batches, what)
        callbacks = self.trainer.callbacks  # type: ignore[attr-defined]
        if not any(isinstance(callback, BasePredictionWriter) for callback in callbacks):
            self._say("predict: nothing was written; a BasePredictionWriter in trainer.callbacks gets the predictions")

    def _say(self, text: str) -> None:
        if self.trainer.is_global_zero:
            print(text, flush=True)


def loading_line(adapter: Path) -> str:
    """How to load an adapter: by PEFT, unless that would leave out some of its layers."""
    state = read_adapter(adapter)
    if len(state.known_to_peft()) == len(state.layers):
        return f'PeftModel.from_pretrained(base_model, "{adapter}")'
    return f'lightning_oft.load_adapter(base_model, "{adapter}")'


def _optimizers(module: LightningModule, optimizer: dict[str, Any], lr_scheduler: dict[str, Any] | None) -> Any:
    """The optimizer and schedule of the configuration over the trainable parameters; rotations without weight decay."""

    def make(parameters: Iterable[Any]) -> Optimizer:
        made: Optimizer = instantiate_class((parameters,), optimizer)
        return made

    schedule = partial(instantiate_class, init=lr_scheduler) if lr_scheduler else None
    return configure(module, make, schedule)


_WARNINGS = (
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",  # Lightning about torch
    r"Found \d+ module\(s\) in eval mode at the start",  # a frozen base stays in eval mode, statistics included
    r"You have overridden `on_before_batch_transfer` in `LightningModule`",  # as our tasks do
    r"Total length of `list` across ranks is zero",  # no test set: before and after there are samples alone
    r"LightningCLI's args parameter is intended",  # `main(args)` is our interface, whatever sys.argv holds
    r"\n    ",  # jsonargparse about how Lightning calls it; only its warnings start with a new line
)
"""Warnings about nothing that a user of the command line can change."""

_LOGS = ("💡 Tip: For seamless", "GPU available: False", "TPU available: False", "Seed set to")
"""Beginnings of Lightning's log lines that would stand before an error's one line."""


def _without_noise(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(_LOGS)


def run(arguments: list[str]) -> int:
    """Run one of the four commands."""
    text = " ".join([*arguments, *config_files.check(arguments)])
    for home in (tasks, data):  # jsonargparse finds a bare name among imported classes only
        for name in home.__all__:
            if name in text:
                getattr(home, name)
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    if "transformers" in sys.modules:  # its progress bars would stand before an error's one line
        sys.modules["transformers"].utils.logging.disable_progress_bar()
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")  # read when `datasets` is imported, which is later
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.seed"):
        logging.getLogger(name).addFilter(_without_noise)
    with warnings.catch_warnings():
        for message in _WARNINGS:
            warnings.filterwarnings("ignore", message=message)
        Application(arguments)
    return 0
