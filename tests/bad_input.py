"""The table of wrong calls, configurations, files, checkpoints, YAML keys and commands, with what each of them says.

    python tests/bad_input.py > docs/bad-input.md

renders it with the messages of the library as it is; `tests/test_bad_input.py` holds the library, the table and the
page to each other.
"""

from __future__ import annotations

import os
import re
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))

from bad_inputs.calls import CALLS, CONFIGS
from bad_inputs.commands import COMMANDS, YAMLS
from bad_inputs.files import CHECKPOINTS, FILES
from bad_inputs.pictures import PICTURES
from bad_inputs.table import Bench, Exit, Mistake, is_same, snapshot
from bad_inputs.text import DATA

TABLE: list[Mistake] = [*CALLS, *CONFIGS, *FILES, *CHECKPOINTS, *YAMLS, *COMMANDS, *DATA, *PICTURES]
_HEAD = """\
# What goes wrong, and what it says

Every message says where, what, and the remedy, in one line; no call below changes the model that it was given. On the
command line a mistake is one line on standard error and exit code 2. `...` stands for a directory, `(...)` for what
another library says or names.

The error is an exception's class, or the command line's exit code.

This page is written by `python tests/bad_input.py > docs/bad-input.md` from the table that the tests run.
"""


class Outcome(NamedTuple):
    """What a mistake came to: the error (an exit code on the command line), its message, and whether models changed."""

    error: BaseException | int
    message: str
    intact: bool


@contextmanager
def _elsewhere(directory: Path) -> Iterator[None]:
    """Where nothing that a mistake writes is in the way, and its warnings are not the subject."""
    before = Path.cwd()
    os.chdir(directory)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        os.chdir(before)


def outcome(mistake: Mistake, directory: Path) -> Outcome:
    """Make a mistake in a directory."""
    bench = Bench(directory)
    error: BaseException | int = 0
    message = ""
    with _elsewhere(directory):
        try:
            mistake.make(bench)
        except Exit as stopped:
            error, message = stopped.code, str(stopped)
        except Exception as raised:
            error, message = raised, str(raised)
    intact = all(is_same(before, snapshot(model)) for model, before in bench.watched)
    return Outcome(error, message, intact)


def shown(mistake: Mistake, message: str, directory: Path) -> str:
    """A message as the page shows it: without the directory, and without what differs between other libraries' versions."""
    text = re.sub(rf"{re.escape(str(directory))}(?=/|\b)", "...", message)
    return re.sub(r"(?<= )\(.*\)(?=;)|(?<=could be adapted: ).*", "(...)", text) if mistake.varies else text


def row(mistake: Mistake, message: str) -> str:
    """One line of the page's table."""
    error = f"exit {mistake.error}" if isinstance(mistake.error, int) else f"`{mistake.error.__name__}`"
    shown = message.removeprefix("lightning-oft: error: ").replace("|", chr(92) + "|").replace("*", chr(92) + "*")
    return f"| {mistake.category} | {mistake.name} | {error} | {shown} |"


def page(rows: list[str]) -> str:
    """The whole page from its rows."""
    return "\n".join([_HEAD, "| of a | mistake | error | message |", "| --- | --- | --- | --- |", *rows, ""])


def main() -> None:
    """Make every mistake and print the page."""
    rows = []
    for mistake in TABLE:
        with tempfile.TemporaryDirectory() as root:
            directory = Path(root).resolve()
            rows.append(row(mistake, shown(mistake, outcome(mistake, directory).message, directory)))
    print(page(rows), end="")


if __name__ == "__main__":
    main()
