"""jsonargparse's parser with an error on one line, and the Trainer's fifty options on a page of help of their own."""

import argparse
import re
from collections.abc import Iterable
from contextlib import suppress
from pkgutil import resolve_name
from typing import Any, NoReturn

from jsonargparse import ArgumentParser, DefaultHelpFormatter
from lightning.pytorch import Trainer, callbacks, loggers
from lightning.pytorch.cli import LightningArgumentParser
from torch import optim

from lightning_oft import data, tasks
from lightning_oft.cli.errors import UserError, suggestion

TITLES = {
    "oft": "the adapter",
    "model": "the model",
    "data": "the data",
    "optimizer": "the optimizer, in the place of the model's own",
    "lr_scheduler": "the learning rate schedule of that optimizer",
    "trainer": "Lightning's Trainer",
}
HELP = {
    "print_config": "print the options as YAML and exit; =skip_default leaves defaults out",
    "seed_everything": "seed of the random numbers; true draws one, false sets none",
    "model": f"{', '.join(tasks.__all__)}, or an import path",
    "data": f"{', '.join(data.__all__)}, or an import path",
    "optimizer": "a torch optimizer, such as AdamW",
    "lr_scheduler": "a torch schedule, such as CosineAnnealingLR",
    "ckpt_path": 'a checkpoint to start from: a path, "last" or "best"',
    "return_predictions": "keep the predictions in memory, which is the default in one process",
    "weights_only": "load tensors and plain values only, which is the default",
}
"""Help of the options that Lightning and jsonargparse explain to programmers."""
_NAMED_MOST = (tasks, data, callbacks, loggers, optim, optim.lr_scheduler)  # whose classes a configuration names


class TrainerHelp(argparse._HelpAction):
    """`--trainer.help`: the Trainer's options, as jsonargparse shows them."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        """Print them and exit."""
        page = ArgumentParser(usage=parser.usage, add_help=False)
        page.add_class_arguments(Trainer, "trainer", fail_untyped=False)
        page.print_help()
        parser.exit()


class Formatter(argparse.RawDescriptionHelpFormatter, DefaultHelpFormatter):
    """An option with its type, and below it its docstring and its default. The Trainer's fifty options are left out."""

    def __init__(self, prog: str, *args: Any, **kwargs: Any) -> None:
        super().__init__(prog, max_help_position=8)  # type: ignore[no-untyped-call]

    def add_arguments(self, actions: Iterable[argparse.Action]) -> None:
        """Called for each group of options. Not argparse.SUPPRESS: jsonargparse drops such options from config.yaml."""
        super().add_arguments(a for a in actions if isinstance(a, TrainerHelp) or not a.dest.startswith("trainer"))

    def _get_default_metavar_for_optional(self, action: argparse.Action) -> str:
        kind = (self._get_type_str(action) or "[").replace(" | ", "|")
        return "VALUE" if "[" in kind else kind

    def _get_help_string(self, action: argparse.Action) -> str:
        return (action.help or "") + ("" if action.default in (None, argparse.SUPPRESS) else " (default: %(default)s)")


class Parser(LightningArgumentParser):
    """Raises UserError where jsonargparse prints its usage and a tree of alternatives."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"prog": "lightning-oft", **kwargs})  # also of the parsers behind `--model.help`

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Called for everything that does not parse; parsers made for a nested class keep jsonargparse's exception."""
        if not self.exit_on_error:
            super().error(message, ex)
        commands = self._subcommands_action.choices if self._subcommands_action else {}
        parser = next(iter(commands.values()), self)  # the top-level parser, which has no keys, reports for its command
        command, hint = parser.prog.split()[-1], ""
        wrong = _WRONG.search(message)  # a key, a class, or an argument of a class that the message names
        if wrong and (paths := _CLASS.findall(message) if wrong[0].startswith("Option") else []):
            hint = _hint(wrong[1], paths[-1])
        elif wrong:
            valid = [action.dest for action in parser._actions if not action.dest.endswith("help")]
            hint = suggestion(wrong[1], [*valid, *(name for home in _NAMED_MOST for name in home.__all__)])
        raise UserError(f"{command}: {squeezed(message)}{hint or f'; see lightning-oft {command} --help'}") from ex

    def tidy(self, command: str) -> None:
        """Give --help the texts above, and leave the Trainer's options to --trainer.help."""
        self.usage = f"lightning-oft {command} --config FILE [--KEY VALUE ...]"
        for key, group in (self.groups or {}).items():
            group.title = TITLES.get(key, "the checkpoint")
        *first, trainer, checkpoint = self._action_groups
        self._action_groups = [*first, checkpoint, trainer]
        for action in self._actions:
            # Without `--oft.target_modules+`, which appends to a list; the parser still takes it.
            action.option_strings = [option for option in action.option_strings if not option.endswith("+")]
            action.help = HELP.get(action.dest, action.help)
            if action.dest in TITLES or action.dest == "config":
                action.metavar = "FILE" if action.dest in ("config", "oft") else "CLASS"
            elif action.dest in ("optimizer.help", "lr_scheduler.help"):
                action.help = argparse.SUPPRESS  # they work, and torch's pages say more
            elif action.dest.endswith(".help"):
                action.metavar, action.help = "CLASS", "show the options of CLASS and exit"
        text = "show the Trainer's options, such as --trainer.max_epochs 3, and exit"
        trainer.add_argument("--trainer.help", action=TrainerHelp, help=text)


def _hint(word: str, path: str) -> str:
    """What to give in the place of an option that the class at a path has not."""
    name, scratch = path.rpartition(".")[2], ArgumentParser(exit_on_error=False)
    if name in _NO_CLASS:
        return f"; name a class first, as in --{_NO_CLASS[name]}"
    with suppress(Exception):  # a suggestion is no reason to hide the error
        arguments = scratch.add_class_arguments(resolve_name(path), path, fail_untyped=False)
        options = [argument.removeprefix(f"{path}.") for argument in arguments]
        options = [option for option in options if option not in ("params", "optimizer")]  # which the run gives it
        return suggestion(word, options) or f"; {name} takes {', '.join(options[:8])}"
    return ""


_NO_CLASS = {"Optimizer": "optimizer AdamW", "LRScheduler": "lr_scheduler CosineAnnealingLR"}
"""What jsonargparse takes for the class where only options of one are given, and how to name one."""
_TREE = (
    *("Does not validate", "Subtypes:", "Errors:", "Given value type:", "Expected a <class 'NoneType'>"),
    *("Expected a path but", "Subclass types expect", "a class path", "a dict with"),
)
_WRONG = re.compile(r"(?:accept option|unrecognized arguments:|import path string:|no attribute|Option) '?-*([\w.]+)")
_CLASS = re.compile(r"class_path[ =]'([\w.]+)'")


def squeezed(message: str) -> str:
    """A message of jsonargparse on one line, without the lines that draw its tree of alternatives. Long lines keep both
    ends: a value may be the whole configuration, and the key at fault stand at its end."""
    kept = []
    for line in map(str.strip, message.splitlines()):
        if not line.lstrip("- ").startswith(_TREE):
            start = 100 if line.startswith("Given value") else 180
            kept.append(f"{line[:start]} ... {line[-60:]}" if len(line) > start + 60 else line)
    return " ".join(kept).removeprefix("- ")
