"""`fit`, `validate`, `test`, `predict`: a LightningCLI application with a top-level `oft:` block."""

from __future__ import annotations

import inspect
import logging
import re
import sys
import warnings
from collections.abc import Iterable
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

from jsonargparse import Namespace, set_parsing_settings
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import BasePredictionWriter
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI, instantiate_class
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch.optim import Optimizer

from lightning_oft import data, tasks
from lightning_oft.callback import OFTFinetuning
from lightning_oft.cli import config_files
from lightning_oft.cli.errors import UserError
from lightning_oft.cli.explain import first_alternative
from lightning_oft.cli.parser import Formatter, Parser
from lightning_oft.cli.report import how_to_load, quiet_test, score_table
from lightning_oft.tasks.optimization import configure

_EXAMPLES = {
    "fit": (
        "Finetune a model: inject rotations, train them, merge them into the weights.\n"
        "Options come from a YAML file, from the command line, or both; the command line wins.",
        "lightning-oft fit --config configs/vision.yaml --trainer.max_epochs 3",
    ),
    "validate": (
        "Score a model on the validation data.\nWith --ckpt_path the rotations in that checkpoint are loaded first.",
        "lightning-oft validate --config configs/vision.yaml --ckpt_path best.ckpt",
    ),
    "test": (
        "Score a model on the test data.\nWith --ckpt_path the rotations in that checkpoint are loaded first.",
        "lightning-oft test --config configs/vision.yaml --oft.pretrained_adapter runs/adapter",
    ),
    "predict": (
        "Run a model on the prediction data.\nWith --ckpt_path the rotations in that checkpoint are loaded first.",
        "lightning-oft predict --config configs/vision.yaml --ckpt_path best.ckpt",
    ),
}


class Application(LightningCLI):
    """LightningCLI with the adapter's block, our order of callbacks and optimizers that see the injected rotations."""

    def __init__(self, arguments: list[str]) -> None:
        self.command = arguments[0]
        description, example = _EXAMPLES[self.command]
        self.scores_before: dict[str, float] = {}
        super().__init__(
            LightningModule,
            LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            # A second run into the same directory is ordinary; Lightning would refuse it over an old config.yaml.
            save_config_kwargs={"overwrite": True},
            parser_class=Parser,
            parser_kwargs={
                "prog": "lightning-oft",
                "formatter_class": Formatter,
                "allow_abbrev": False,  # `--trainer.max_epoch` is a mistake, not a short form
                self.command: {"description": f"{description}\n\nexample:\n  {example}"},
            },
            args=arguments,
        )

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
        """The command that was asked for: a parser for each of the four would take four times as long to build."""
        return {self.command: LightningCLI.subcommands()[self.command]}

    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """What this program is about first, Lightning's fifty Trainer options last: --help is read from the top."""
        parser.add_lightning_class_args(OFTFinetuning, "oft")
        parser.add_lightning_class_args(LightningModule, "model", subclass_mode=True)
        parser.add_lightning_class_args(LightningDataModule, "data", subclass_mode=True, required=False)
        parser.add_optimizer_args()
        parser.add_lr_scheduler_args()
        parser.add_lightning_class_args(Trainer, "trainer")

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        assert isinstance(parser, Parser)
        parser.tidy(subcommand)
        return parser

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """The one option that is neither Lightning's nor the callback's."""
        parser.add_argument(
            "--test_before_and_after",
            type=bool,
            default=False,
            help="In fit: test the model before and after and print both scores as a table.",
        )

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse, without Lightning's warning that `args` and `sys.argv` are both there: `main(args)` is our interface."""
        self.config = parser.parse_args(args)  # type: ignore[arg-type]
        for group in config_files.GROUPS:  # jsonargparse lets a scalar take the place of a whole group of options
            if not isinstance(value := self.config[self.command].get(group), Namespace):
                raise UserError(f"{self.command}: {group}: expected a mapping of options, got {value!r}")

    def _parse_ckpt_path(self) -> None:
        """Leave the configuration alone: the stock method lets a checkpoint's hyperparameters win over what was given."""

    def _set_seed(self) -> None:
        """As Lightning does, without its line about it: an error that follows is to be the only one."""
        seed = self._get(self.config, "seed_everything")
        if seed is not False:
            self.config[self.command]["seed_everything"] = seed_everything(
                None if seed is True else seed, workers=True, verbose=False
            )

    def instantiate_classes(self) -> None:
        """Build model, data and trainer; what they refuse at this point is the configuration."""
        try:
            super().instantiate_classes()
        except (ValueError, TypeError) as error:
            raise UserError(f"{self.command}: {' '.join(first_alternative(str(error)).split())}") from error
        if self.subcommand == "fit" and not is_overridden("configure_optimizers", self.model, LightningModule):
            name = type(self.model).__name__
            raise UserError(
                f"fit: {name} configures no optimizer; give one, as in --optimizer AdamW --optimizer.lr 1e-3"
            )

    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[Callback]) -> Trainer:
        """OFT comes first: a weight-averaging callback must copy the rotations, and so must find them in place."""
        given = config.get("callbacks") or []
        config["callbacks"] = [*callbacks, *(given if isinstance(given, list) else [given])]
        return super()._instantiate_trainer(config, [])

    def _add_configure_optimizers_method_to_model(self, subcommand: str | None) -> None:
        """Build the optimizer when Lightning asks for it.

        The stock method hands `model.parameters()` to it now, before any rotation exists, and trains nothing: exit code 0
        and every generator still zero (Lightning-AI/pytorch-lightning#19110).
        """
        optimizer, scheduler = self._get(self.config_init, "optimizer"), self._get(self.config_init, "lr_scheduler")
        if optimizer:
            # A partial of a module-level function: it pickles for ddp_spawn, and a deep copy of the model takes it along.
            self.model.configure_optimizers = partial(
                _configure_optimizers,
                self.model,
                optimizer=optimizer.as_dict(),
                lr_scheduler=scheduler and scheduler.as_dict(),
            )

    def before_fit(self) -> None:
        """Score the model as it comes."""
        if self._get(self.config_init, "test_before_and_after"):
            self.scores_before = quiet_test(self.trainer, self.model, self.datamodule)

    def after_fit(self) -> None:
        """Score it again, and say where the results are and how to load them."""
        if self.scores_before:
            after = quiet_test(self.trainer, self.model, self.datamodule)
            self._say(score_table(self.scores_before, after))
        export_dir = self._get(self.config, "oft").get("export_dir")
        if export_dir is not None:
            self._say(*how_to_load(Path(export_dir)))

    def after_predict(self) -> None:
        """Predictions that nobody takes are gone: say so."""
        if not any(isinstance(callback, BasePredictionWriter) for callback in self.trainer.callbacks):  # type: ignore[attr-defined]
            self._say("predict: nothing was written; a BasePredictionWriter in trainer.callbacks gets the predictions")

    def _say(self, *lines: str) -> None:
        if self.trainer.is_global_zero:
            print(*lines, sep="\n", flush=True)


def _configure_optimizers(
    module: LightningModule, optimizer: dict[str, Any], lr_scheduler: dict[str, Any] | None
) -> Any:
    """What `optimizer:` and `lr_scheduler:` ask for, over what is trainable by now; rotations without weight decay."""

    def make(groups: Iterable[Any]) -> Optimizer:
        home, _, name = optimizer["class_path"].rpartition(".")
        if "weight_decay" not in inspect.signature(getattr(import_module(home), name)).parameters:
            groups = [p for group in groups for p in group["params"]]  # L-BFGS, for one, takes no groups
        made: Optimizer = instantiate_class((groups,), optimizer)
        return made

    schedule = partial(instantiate_class, init=lr_scheduler) if lr_scheduler else None
    return configure(module, make, schedule)


def _import_named(arguments: list[str]) -> None:
    """Import our tasks and data that the arguments name, so that jsonargparse finds them by their bare names.

    All of them for --help and where none is named; only those otherwise, since each brings its packages along.
    """
    files = [Path(a.removeprefix("--config=")) for a in arguments if a.endswith((".yaml", ".yml", ".json"))]
    texts = [*arguments, *(file.read_text(encoding="utf-8") for file in files if file.is_file())]
    homes = [(home, name) for home in (tasks, data) for name in home.__all__]
    named = [(home, name) for home, name in homes if any(re.search(rf"\b{name}\b", text) for text in texts)]
    for home, name in named or homes:
        getattr(home, name)


# Said by Lightning or torch about each other, or about what this library does on purpose; nothing to act on.
_NOISE = (
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",
    r"Found \d+ module\(s\) in eval mode at the start of training",  # frozen means frozen, statistics included
    r"You have overridden `on_before_batch_transfer` in `LightningModule`",
)


def _worth_saying(record: logging.LogRecord) -> bool:
    """Neither advertisements nor the accelerators that are not there: an error is then the only line it takes."""
    return not re.match(r"💡 Tip: For seamless|[GT]PU available: False", record.getMessage())


def run(arguments: list[str]) -> int:
    """Run one of the four commands."""
    config_files.check(arguments)
    _import_named(arguments)
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    if "transformers" in sys.modules:  # its bars for a second of loading would stand around an error's one line
        sys.modules["transformers"].utils.logging.disable_progress_bar()
    logger = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    logger.addFilter(_worth_saying)
    try:
        with warnings.catch_warnings():
            for message in _NOISE:
                warnings.filterwarnings("ignore", message=message)
            # jsonargparse's own, about how Lightning calls it; its warnings are the ones that start on a new line.
            warnings.filterwarnings("ignore", message=r"\n    ", category=DeprecationWarning)
            Application(arguments)
    finally:
        logger.removeFilter(_worth_saying)
    return 0
