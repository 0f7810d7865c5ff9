"""TextDataModule: text, prompts with completions, or chats, as batches of tokens for a language model."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from torch.utils.data import DataLoader
from typing_extensions import override

from lightning_oft.data.text.batches import pack, pad
from lightning_oft.data.text.examples import KINDS, Encoder, kind_of
from lightning_oft.data.text.sources import Tables, columns_of
from lightning_oft.data.text.tables import TableDataModule, pad_token_of


class TextDataModule(TableDataModule):
    """Text to learn from, read by `datasets`; every row is checked before the run begins.

    A table has a column text, or prompt and completion (text or messages), or messages (chats: lists of role and
    content). Batches are {"input_ids", "labels"} (B, L) int64, labels -100 where nothing is learned, with
    "attention_mask" or, of packed rows, "position_ids". Prepared examples are cached by `datasets`, and made again
    when the data, the tokenizer or these arguments change.

    Args:
        packing: Put several documents into a row of max_length tokens, where none sees another; without it rows are padded.
        completion_only: Learn completions and the assistant's turns only; false learns prompts too.
        chat_template: File with a chat template in the place of the tokenizer's.
        table: Arguments of TableDataModule.

    Raises:
        OSError: When there is nothing at `data`, on setup.
        ValueError: When an argument is out of its range; on setup, one line that names the first row of no use.
    """

    cache_arguments = ("data", "names", "max_length", "packing", "completion_only", "tokenizer_key")
    kinds: ClassVar[tuple[tuple[str, ...], ...]] = KINDS
    """The columns that a table of each kind has."""

    def __init__(
        self,
        data: str | dict[str, str],
        packing: bool = False,
        completion_only: bool = True,
        chat_template: str | None = None,
        **table: Any,
    ) -> None:
        super().__init__(data, **table)
        if self.group_by_length and packing:
            raise ValueError("group_by_length: packed rows have no lengths to group by; set it to false")
        self.packing, self.completion_only, self.chat_template = packing, completion_only, chat_template
        self.prompts: dict[str, Any] = {}
        """By test set, what a model continues: examples of input_ids."""

    @override
    def make_encoder(self, split: str, table: Any, limit: int | None) -> Encoder:
        return self.encoder(kind_of(columns_of(table), self.kinds), limit)

    def encoder(self, kind: tuple[str, ...], limit: int | None) -> Encoder:
        """What makes examples of the rows of a table, for a model that takes `limit` tokens."""
        return Encoder(self.processor, kind, limit, self.max_length, self.completion_only)

    @override
    def finish(self, splits: Tables, tables: Tables, limit: int | None) -> Tables:
        """Pack what is to be packed, and encode the prompts of the test sets."""
        for split, table in tables.items():
            if split not in ("train", "val") and not self.streaming:
                encoder = self.make_encoder(split, table, limit)
                self.prompts[split] = self._mapped(table, partial(encode_prompts, encoder=encoder), encoder.kind)
        if not self.packing:
            return splits
        length = self.max_length or limit
        if length is None:
            raise ValueError("packing: neither the model nor the tokenizer says how long a row may be; set max_length")
        rows = partial(pack_rows, length=length)
        return {split: self._mapped(table, rows, with_indices=False) for split, table in splits.items()}

    @override
    def _tokenizer(self) -> tuple[Any, int | None]:
        tokenizer, limit = super()._tokenizer()
        if self.chat_template is not None:
            tokenizer.chat_template = Path(self.chat_template).expanduser().read_text(encoding="utf-8")
        return tokenizer, limit

    @override
    def predict_dataloader(self) -> list[DataLoader[Any]]:
        """The prompts of the test sets, padded on the left: {"input_ids", "attention_mask"} (B, L)."""
        collate = partial(pad, pad_token_id=pad_token_of(self.processor), side="left")
        return [
            DataLoader(t, batch_size=self.batch_size, collate_fn=collate, **self.workers) for t in self.prompts.values()
        ]


def encode_prompts(rows: Mapping[str, list[Any]], indices: list[int], encoder: Encoder) -> dict[str, list[Any]]:
    """A batch of rows as what a model continues."""
    places = range(len(indices))
    return {"input_ids": [encoder.prompt({name: rows[name][i] for name in encoder.kind}) for i in places]}


def pack_rows(rows: Mapping[str, list[Any]], length: int) -> dict[str, list[Any]]:
    """A batch of examples as packed rows."""
    examples = [dict(zip(rows, values, strict=True)) for values in zip(*rows.values(), strict=True)]
    packed = pack(examples, length)
    return {name: [row[name] for row in packed] for name in ("input_ids", "labels", "position_ids")}
