"""Seq2SeqDataModule: sources and targets for an encoder-decoder."""

from typing import Any

from typing_extensions import override

from lightning_oft.data.text.examples import kind_of
from lightning_oft.data.text.labelled import PairEncoder
from lightning_oft.data.text.sources import columns_of
from lightning_oft.data.text.tables import TableDataModule


class Seq2SeqDataModule(TableDataModule):
    """Sources with their targets, read by `datasets`; every row is checked before the run begins.

    A table has the columns source and target. Batches are {"input_ids", "attention_mask"} (B, S) and "labels" (B, L),
    all int64, labels -100 where a target is padded. Arguments as for TableDataModule; max_length holds for both.
    """

    @override
    def make_encoder(self, split: str, table: Any, limit: int | None) -> PairEncoder:
        kind = kind_of(columns_of(table), (("source", "target"),))
        return PairEncoder(self.processor, kind, limit, self.max_length)
