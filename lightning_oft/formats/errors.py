"""What is wrong with a file, in one line that a terminal prints as it stands."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from lightning_oft.model.placement import AdapterError


def printable(text: str, limit: int = 1000) -> str:
    """One line of bounded length: names and values come from a file, which may hold control characters or megabytes."""
    if len(text) > limit:  # the remedy stands at the end
        text = f"{text[: limit - 300]} ... {text[-300:]}"
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def first_line(error: BaseException) -> str:
    """What another library says of a file, without its further lines."""
    text = getattr(error, "strerror", None) or str(error).strip() or type(error).__name__
    return printable(str(text).splitlines()[0][:200])


class AdapterFileError(AdapterError):
    """An adapter file that cannot be read, written or put on this model: where, what, remedy. Nothing changed."""

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


class CheckpointError(AdapterFileError):
    """A checkpoint that cannot be read or does not fit the model: where, what, remedy. Nothing has been loaded."""


@contextlib.contextmanager
def refusing(
    what: str,
    file: str | Path | None = None,
    error_class: type[AdapterFileError] = AdapterFileError,
    remedy: str = "copy it again",
) -> Iterator[None]:
    """Within this context whatever is raised is one line after the file's name: an AdapterFileError's own, or what is
    wrong, what the reader of damaged bytes says of it, and the remedy."""
    try:
        yield
    except (ImportError, MemoryError):
        raise
    except Exception as error:
        said = str(error) if isinstance(error, AdapterFileError) else f"{what} ({first_line(error)}); {remedy}"
        raise error_class(said if file is None else f"{file}: {said}") from None
