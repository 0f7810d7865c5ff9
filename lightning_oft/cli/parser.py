"""jsonargparse's parser and help, made readable: one line for an error, and a --help that a person reads to the end."""

from __future__ import annotations

import ast
import re
from argparse import Action
from collections.abc import Iterable
from functools import reduce
from itertools import pairwise
from typing import Any, ClassVar, NoReturn

from jsonargparse import DefaultHelpFormatter
from lightning.pytorch.cli import LightningArgumentParser

from lightning_oft import data, tasks
from lightning_oft.cli.errors import UserError
from lightning_oft.cli.explain import Complaint, explain

TITLES = {
    "oft": "the adapter",
    "model": "the model: any LightningModule, by its name or its import path",
    "data": "the data: any LightningDataModule",
    "optimizer": "the optimizer, in the place of the model's own",
    "lr_scheduler": "the learning rate schedule, with that optimizer",
    "trainer": "Lightning's Trainer",
}


class Formatter(DefaultHelpFormatter):
    """Keeps a description's line breaks; drops what every line of jsonargparse's help repeats."""

    def __init__(self, prog: str, *args: Any, **kwargs: Any) -> None:
        super().__init__(prog, max_help_position=34)  # type: ignore[no-untyped-call]

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return "\n".join(indent + line for line in text.splitlines())

    def _get_default_metavar_for_optional(self, action: Action) -> str:
        return "VALUE"

    def _format_action_invocation(self, action: Action) -> str:
        """`--oft.target_modules VALUE` without its twin `--oft.target_modules+ VALUE`, which appends to a list."""
        options = action.option_strings
        if action.dest in TITLES:
            return f"{options[0]} {'FILE' if action.dest in ('oft', 'trainer') else 'CLASS'}"
        action.option_strings = [option for option in options if not option.endswith("+")] or options
        try:
            return super()._format_action_invocation(action)
        finally:
            action.option_strings = options

    def add_arguments(self, actions: Iterable[Action]) -> None:
        """Leave out `--trainer.strategy.help` and its like: fourteen lines for what nobody looks up here."""
        super().add_arguments([a for a in actions if not re.match(r"--trainer\..*\.help$", "".join(a.option_strings))])

    def _get_type_str(self, action: Action) -> str | None:
        text = super()._get_type_str(action)
        try:
            return text and ast.unparse(_Unions().visit(ast.parse(text, mode="eval")))
        except SyntaxError:
            return text

    def _expand_help(self, action: Action) -> str:
        text, _, known = super()._expand_help(action).partition(", known subclasses: ")
        if known:
            names = [path.rpartition(".")[2] for path in known.rstrip(")").split(", ") if ".demos." not in path]
            text += f", for instance {', '.join(n for n in dict.fromkeys(names) if f'[{n}' not in text)})"
        for pattern, replacement in _SHORTER:
            text = re.sub(pattern, replacement, text)
        return text


class _Unions(ast.NodeTransformer):
    """`Union[A, B]` and `Optional[A]`, which jsonargparse prints for some types, as `A | B` and `A | null`."""

    def visit_Subscript(self, node: ast.Subscript) -> ast.AST:
        self.generic_visit(node)
        name = getattr(node.value, "id", "")
        if name not in ("Union", "Optional"):
            return node
        members = list(node.slice.elts) if isinstance(node.slice, ast.Tuple) else [node.slice]
        members += [ast.Name("null")] if name == "Optional" else []
        return reduce(lambda left, right: ast.BinOp(left, ast.BitOr(), right), members)


_SHORTER = [
    (r":\w+:`~?(?:[\w.]*\.)?(\w+)`", r"\1"),  # Sphinx roles in Lightning's docstrings
    (r"'?``'?", "'"),
    (r"type: Literal\[[^\]]*\](, )?", ""),  # the choices stand beside the option
    (r" Default: '[^ ]*'\.", ""),  # said again in the brackets
    (r", default: null| \(\)$", ""),
    (r'One or more arguments specifying "class_path" and "init_args" for any', "The name of a"),
    (r"Show the help for the given subclass of .* and exit", "Show the options of a class and exit"),
]


class Parser(LightningArgumentParser):
    """Raises one explained line where jsonargparse prints its usage, a tip and a tree of alternatives."""

    class_names: ClassVar[list[str]] = [*tasks.__all__, *data.__all__]

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Called for everything that does not parse; parsers made for a nested class keep jsonargparse's exception."""
        if not self.exit_on_error:
            super().error(message, ex)
        parser = self._command_parser()
        args: list[str] = list(getattr(self, "args", []))
        files = [value for flag, value in pairwise(args) if flag in ("-c", "--config")]
        complaint = Complaint(message, known_keys=parser.known_keys(), config_files=files, class_names=self.class_names)
        raise UserError(f"{parser.prog.split()[-1]}: {explain(complaint)}") from ex

    def known_keys(self) -> list[str]:
        """Every key this parser accepts, dotted."""
        return [a.dest for a in self._actions if a.option_strings and a.dest != "help" and not a.dest.endswith(".help")]

    def tidy(self, command: str) -> None:
        """Give the groups titles of our own and the usage one line: jsonargparse spells out a hundred options."""
        self.usage = f"lightning-oft {command} --config FILE [--KEY VALUE ...]"
        groups = self.groups or {}
        for key, title in TITLES.items():
            if key in groups:
                groups[key].title = title
        self._action_groups[-1].title = "the checkpoint"

    def _command_parser(self) -> Parser:
        """The parser of the command: the top-level parser, which knows no keys, reports for it."""
        commands: dict[str, Parser] = self._subcommands_action.choices if self._subcommands_action else {}
        return next(iter(commands.values()), self)
