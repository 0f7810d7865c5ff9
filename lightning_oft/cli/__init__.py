"""The command line. This file imports nothing heavy: `--version` and `info` must not pay for Lightning's seven seconds.

lightning-oft fit | validate | test | predict   a LightningCLI application         (application.py)
lightning-oft merge | export | info             what is done to files, no Trainer  (merge.py, export.py, info.py)
"""

import os
import signal
import sys
from collections.abc import Sequence
from importlib import import_module

from lightning_oft import __version__
from lightning_oft.cli.errors import UserError, is_user_error, one_line, suggestion

__all__ = ["main"]

COMMANDS = {
    "fit": "finetune a model: inject rotations, train them, merge them",
    "validate": "score a model or a checkpoint on the validation data",
    "test": "score a model or a checkpoint on the test data",
    "predict": "run a model or a checkpoint on the prediction data",
    "merge": "fold an adapter into its base model; plain transformers loads the result",
    "export": "write the adapter inside a Lightning checkpoint as a PEFT directory",
    "info": "say what an adapter directory or a checkpoint holds",
}
FILE_COMMANDS = ("merge", "export", "info")

USAGE = """\
usage: lightning-oft [-h] [--version] COMMAND ...

Orthogonal Finetuning for PyTorch Lightning: a pretrained weight is rotated, not added to.
Only the rotations are trained; merged into the weights they cost nothing at inference.

commands:
{commands}

  -h, --help  show this message, or that of a command: lightning-oft COMMAND --help
  --version   show the version

example:
  lightning-oft fit --config configs/vision.yaml

LIGHTNING_OFT_DEBUG=1 in the environment brings back the traceback behind an error's one line.
"""


def main(args: Sequence[str] | None = None) -> int:
    """Run the command line, `sys.argv` by default. Returns the exit code: 0, or 2 after one line about a user error."""
    arguments = list(sys.argv[1:] if args is None else args)
    try:
        return _dispatch(arguments)
    except SystemExit as stop:  # argparse's --help, Lightning's Ctrl-C, and its SIGTERM, which carries no code
        if type(stop).__name__ == "SIGTERMException":
            return 128 + signal.SIGTERM
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except Exception as error:
        if os.environ.get("LIGHTNING_OFT_DEBUG", "0") not in ("", "0") or not is_user_error(error):
            raise
        sys.stderr.write(f"lightning-oft: error: {one_line(error)}\n")
        return 2


def _dispatch(arguments: list[str]) -> int:
    first = arguments[0] if arguments else "--help"
    if first in ("-h", "--help"):
        print(USAGE.format(commands="\n".join(f"  {name:<10}{text}" for name, text in COMMANDS.items())), end="")
        return 0
    if first == "--version":
        print(f"lightning-oft {__version__}")
        return 0
    if first in COMMANDS:
        if (here := os.getcwd()) not in sys.path:  # a user's modules are there; looked through last
            sys.path.append(here)
        module = import_module(f"lightning_oft.cli.{first if first in FILE_COMMANDS else 'application'}")
        return int(module.run(arguments))
    if first.startswith("-") and (command := next((a for a in arguments if a in COMMANDS), None)):
        raise UserError(f"options come after the command: lightning-oft {command} {first} ...")
    hint = suggestion(first, [*COMMANDS, "--help", "--version"]) or f"; one of {', '.join(COMMANDS)}"
    raise UserError(f"unknown command {first!r}{hint}")
