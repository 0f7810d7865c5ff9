"""PlacedDataModule: what the data modules share whose tasks must know a row again: its place in its split."""

from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

from typing_extensions import override

from lightning_oft.data.text.module import TextDataModule
from lightning_oft.data.text.tables import pad_token_of


class PlacedDataModule(TextDataModule):
    """Base of the data modules of prompts that a task compares completions of. A subclass names the columns that a table
    has, writes `encoder`, and makes batches by `collate`; examples have their places in their split under "row".

    Args:
        chat_template: File with a chat template in the place of the tokenizer's.
        table: Arguments of TableDataModule, but group_by_length.
    """

    collate: ClassVar[Callable[..., dict[str, Any]]]
    """Makes a batch of examples; takes them and `pad_token_id`."""

    def __init__(self, data: str | dict[str, str], chat_template: str | None = None, **table: Any) -> None:
        super().__init__(
            data, packing=False, completion_only=True, chat_template=chat_template, group_by_length=False, **table
        )

    @override
    def setup(self, stage: str) -> None:
        """Find, check and encode the rows; once, whatever is run afterwards."""
        if self.splits:
            return
        super().setup(stage)
        if not self.streaming:
            tables: Any = self.splits
            self.splits = {split: t.add_column("row", list(range(len(t)))) for split, t in tables.items()}
        self.collate_fn = partial(type(self).collate, pad_token_id=pad_token_of(self.processor))
