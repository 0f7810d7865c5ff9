"""User errors: which exceptions are user errors, their text on one line, and suggestions for a mistyped word."""

import argparse
import difflib
import traceback
from collections.abc import Iterable
from typing import NoReturn

_MISFIT = "Error(s) in loading state_dict"  # torch's, of weights that do not fit a model


class UserError(Exception):
    """An error that the user can correct. The message is one line: where, what, and the remedy."""


class OneLineParser(argparse.ArgumentParser):
    """An argparse parser whose errors are UserErrors that name the nearest valid option."""

    def __init__(self, command: str, description: str | None) -> None:
        raw = argparse.RawDescriptionHelpFormatter  # keeps a description's line breaks
        super().__init__(f"lightning-oft {command}", None, description, formatter_class=raw, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        """Raise what argparse would have printed below its usage."""
        _, _, words = message.partition("unrecognized arguments: ")
        options = [option for action in self._actions for option in action.option_strings]
        hint = suggestion(words.split(" ")[0].partition("=")[0], options)
        raise UserError(f"{self.prog.split()[-1]}: {message}{hint}")


def a_name(text: str) -> str:
    """The name of a file or a directory. Raises ArgumentTypeError for an empty one, the current directory."""
    if not text.strip():
        raise argparse.ArgumentTypeError("is empty; give a name")
    return text


def suggestion(word: str, candidates: Iterable[str]) -> str:
    """`"; did you mean 'x'?"` for the candidates nearest to `word`, or an empty string where nothing is near."""
    candidates = set(candidates)
    near = [one for one in candidates if one.lower() == word.lower()]
    near = near or difflib.get_close_matches(word, candidates, n=1, cutoff=0.85)
    near = near or difflib.get_close_matches(word, candidates)
    return f"; did you mean {' or '.join(map(repr, near))}?" if near else ""


def is_user_error(error: BaseException) -> bool:
    """Whether the user can correct `error`, so that one line is enough and a traceback is noise.

    An error that this package, Lightning or jsonargparse raises on purpose is, and so is a file, a hub name or an
    optional package that is not there. A failure inside somebody's model after hours of training keeps its traceback.
    """
    if isinstance(error, UserError | OSError | ImportError) or type(error).__name__ == "MisconfigurationException":
        return True
    if _said_by_a_worker(error) is not None:
        return True
    modules = ["", *(frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__))]
    on_purpose = modules[-1].partition(".")[0] in ("lightning_oft", "lightning", "pytorch_lightning", "jsonargparse")
    return str(error).startswith(_MISFIT) or (on_purpose and isinstance(error, ValueError | TypeError | RuntimeError))


def one_line(error: BaseException) -> str:
    """The message of `error` on one line that a terminal prints as it stands, of bounded length."""
    text = " ".join((_said_by_a_worker(error) or str(error)).split()) or type(error).__name__
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        text = f"{error.filename}: {error.strerror}"
    if text.startswith(_MISFIT):
        remedy = "an adapter's checkpoint needs oft.enabled: true and the adapter's own oft block"
        text = f"the checkpoint does not fit the model that is configured; {remedy} ({text[:200].rstrip()} ...)"
    if len(text) > 1000:  # a value is repeated in the middle; the remedy stands at the end
        text = f"{text[:700]} ... {text[-300:]}"
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _said_by_a_worker(error: BaseException) -> str | None:
    """What this package raised on purpose in a DataLoader's process, which torch hands on with the traceback as text."""
    lines = str(error).strip().splitlines()
    if not (isinstance(error, ValueError) and lines and "in DataLoader worker process" in lines[0]):
        return None
    frames = [line for line in lines if line.startswith('  File "')]
    return lines[-1].partition(": ")[2] if frames and "lightning_oft" in frames[-1] else None
