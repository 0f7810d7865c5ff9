"""Data of the classifiers of text and of words."""

from typing import Any, ClassVar

from typing_extensions import override

from lightning_oft.data.text.examples import kind_of
from lightning_oft.data.text.labelled import Classes, TextEncoder, WordEncoder
from lightning_oft.data.text.sources import Tables, columns_of
from lightning_oft.data.text.tables import TableDataModule


class LabelledDataModule(TableDataModule):
    """Base of the data modules with classes, which rows have by name or by id.

    The classes are those of `class_names`, else the model's where it names them, else those of the data: in the order
    of a data set that has one, else by name. Ids without names are the model's own.
    """

    cache_arguments = ("data", "names", "max_length", "tokenizer_key", "class_names", "model_classes")
    kinds: ClassVar[tuple[tuple[str, ...], ...]]
    """The columns that a table may have, the label last."""
    encoder: ClassVar[Any]

    def __init__(self, data: str | dict[str, str], class_names: list[str] | None = None, **table: Any) -> None:
        super().__init__(data, **table)
        self.class_names = class_names or []

    @property
    def model_classes(self) -> int | None:
        """How many classes the model has, where a task is run that says so."""
        return getattr(self.task, "num_classes", None)

    @override
    def prepare_tables(self, tables: Tables) -> None:
        """Find the names of the classes."""
        if self.class_names:
            return
        label = self.kinds[0][-1]
        tables = {split: table for split, table in tables.items() if label in columns_of(table)}
        stored = next((names for table in tables.values() if (names := stored_names(table, label))), ())
        found = set(stored) if stored or self.streaming else {n for t in tables.values() for n in _names(t[label])}
        config = getattr(getattr(self.task, "model", None), "config", None)
        order: dict[str, int] = getattr(config, "label2id", None) or {}
        if found and found <= set(order):
            self.class_names = sorted(order, key=order.__getitem__)
        else:
            self.class_names = list(stored) or sorted(found)

    @override
    def make_encoder(self, split: str, table: Any, limit: int | None) -> Any:
        kind = kind_of(columns_of(table), self.kinds)
        classes = Classes(tuple(self.class_names), stored_names(table, kind[-1]), self.model_classes)
        return self.encoder(self.processor, kind, classes, limit, self.max_length)


class TextClassificationDataModule(LabelledDataModule):
    """Texts with a class each, read by `datasets`; every row is checked before the run begins.

    A table has the columns text and label, and text_pair where a class is that of two texts. Batches are {"input_ids",
    "attention_mask"} (B, L) and "labels" (B,), all int64; of two texts also "token_type_ids" (B, L) where the tokenizer
    has those.

    Args:
        class_names: Names of the classes in the order of their ids. None: the model's where it has those of the data, else
            those of the data: in a data set's own order, or by name. Streamed names must be given.
    """

    kinds = (("text", "text_pair", "label"), ("text", "label"))
    encoder = TextEncoder


class TokenClassificationDataModule(LabelledDataModule):
    """Words with a class each, read by `datasets`; every row is checked before the run begins.

    A table has the columns tokens (a list of words) and tags (as many classes). Batches are {"input_ids",
    "attention_mask", "labels"} (B, L) int64; the first token of a word has its label, every other -100.

    Args:
        class_names: Names of the classes in the order of their ids. None: the model's where it has those of the data, else
            those of the data: in a data set's own order, or by name. Streamed names must be given.
    """

    kinds = (("tokens", "tags"),)
    encoder = WordEncoder


def stored_names(table: Any, column: str) -> tuple[str, ...]:
    """Names by id of a column of classes, or of lists of classes; none where it has no names."""
    feature: Any = (table.features or {}).get(column)
    while feature is not None and not hasattr(feature, "names"):
        feature = feature[0] if isinstance(feature, list) else getattr(feature, "feature", None)
    return tuple(feature.names) if feature is not None else ()


def _names(column: Any) -> set[str]:
    """The names in a column of labels, or of lists of them."""
    return {name for cell in column for name in (cell if isinstance(cell, list) else [cell]) if isinstance(name, str)}
