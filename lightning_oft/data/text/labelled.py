"""From a row of a table to an example of a classifier or an encoder-decoder."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lightning_oft.data.text.examples import IGNORED, check_length, check_text, ended, what_is


@dataclass(frozen=True)
class Classes:
    """The ids of labels.

    Args:
        names: Names of the classes in the order of their ids; empty where the data has ids only.
        stored: Names by the ids that a table has, where these have names.
        count: How many classes the model has, where that is known.
    """

    names: tuple[str, ...] = ()
    stored: tuple[str, ...] = ()
    count: int | None = None

    def id_of(self, label: Any) -> int:
        """The id of a label: a name, or an id. Raises ValueError when it is no class."""
        if isinstance(label, float) and label.is_integer():  # pandas reads a column of ids with a gap as floats
            label = int(label)
        if isinstance(label, int):
            count = len(self.stored or self.names) or self.count
            if label < 0 or (count is not None and label >= count):
                known = f"0 to {count - 1}" if count is not None else "0 and more"
                raise ValueError(f"label {label} is no class; the classes are {known}")
            if not self.stored:
                return label
            label = self.stored[label]
        if not isinstance(label, str):
            what = "missing" if label is None else f"{type(label).__name__}"
            raise ValueError(f"label is {what}, not the name or the id of a class")
        if label not in self.names:
            some = ", ".join(self.names[:8]) + (", ..." if len(self.names) > 8 else "")
            raise ValueError(f"label {label!r} is no class; the classes are {some or 'ids; set class_names'}")
        return self.names.index(label)


@dataclass(frozen=True)
class TextEncoder:
    """A text, or two, and a class: {"input_ids": (T,), "labels": int}, and of two texts what the tokenizer says of which
    token belongs to which. Tokens beyond `max_length` are cut; None refuses what is longer than `limit`."""

    tokenizer: Any
    kind: tuple[str, ...]
    classes: Classes
    limit: int | None = None
    max_length: int | None = None

    def __call__(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Raises ValueError, with what and the remedy but not the row, when a row is of no use."""
        *columns, label = self.kind
        for column in columns:
            check_text(column, row[column])
        encoded = tokens(self, *(row[column] for column in columns))
        segments = {"token_type_ids": encoded["token_type_ids"]} if "token_type_ids" in encoded else {}
        ids = {"input_ids": list(encoded["input_ids"]), "labels": self.classes.id_of(row[label])}
        return ids | (segments if len(columns) > 1 else {})


@dataclass(frozen=True)
class WordEncoder:
    """Words and a class for each: {"input_ids": (T,), "labels": (T,)}, -100 at all but the first token of a word."""

    tokenizer: Any
    kind: tuple[str, ...]
    classes: Classes
    limit: int | None = None
    max_length: int | None = None

    def __call__(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Raises ValueError, with what and the remedy but not the row, when a row is of no use."""
        words, tags = (row[column] for column in self.kind)
        for column, cells in zip(self.kind, (words, tags), strict=True):
            if not isinstance(cells, list) or not cells:
                raise ValueError(f"{column} is {what_is(cells)}, not a list")
        if len(words) != len(tags):
            raise ValueError(f"{len(words)} {self.kind[0]} and {len(tags)} {self.kind[1]}; there is one for each")
        for word in words:
            check_text("a word", word)
        classes = [self.classes.id_of(tag) for tag in tags]
        encoded = tokens(self, words, is_split_into_words=True)
        places = encoded.word_ids()
        labels = [
            IGNORED if word is None or word == before else classes[word]
            for before, word in zip([None, *places], places, strict=False)
        ]
        if set(labels) == {IGNORED}:
            raise ValueError(f"the first {self.max_length} tokens hold no word; raise max_length")
        return {"input_ids": list(encoded["input_ids"]), "labels": labels}


@dataclass(frozen=True)
class PairEncoder:
    """A source and a target: {"input_ids": (S,), "labels": (T,)}, each ended, and cut after `max_length` tokens."""

    tokenizer: Any
    kind: tuple[str, ...]
    limit: int | None = None
    max_length: int | None = None

    def __call__(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Raises ValueError, with what and the remedy but not the row, when a row is of no use."""
        source, target = self.kind
        for column in self.kind:
            check_text(column, row[column])
        ids = list(tokens(self, row[source])["input_ids"])
        labels = ended(self.tokenizer, list(tokens(self, text_target=row[target])["input_ids"]))
        return {"input_ids": ids, "labels": labels[: self.max_length]}


def tokens(encoder: TextEncoder | WordEncoder | PairEncoder, *texts: Any, **options: Any) -> Any:
    """What the tokenizer makes of texts, cut where the encoder says so. Raises ValueError when they are too long."""
    cut = {"truncation": True, "max_length": encoder.max_length} if encoder.max_length is not None else {}
    encoded = encoder.tokenizer(*texts, verbose=False, **cut, **options)
    check_length(encoded["input_ids"], encoder.limit, encoder.max_length)
    return encoded
