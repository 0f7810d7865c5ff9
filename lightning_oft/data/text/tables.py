"""TableDataModule: rows of a table, found by `datasets`, checked and encoded one by one, as padded batches of tokens."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from functools import partial
from hashlib import sha256
from typing import Any, ClassVar

from lightning.pytorch.utilities import rank_zero_info
from torch import nn
from torch.utils.data import DataLoader
from typing_extensions import override

from lightning_oft.data.base import ResumableLoader, SplitDataModule
from lightning_oft.data.text.batches import LengthGrouped, pad
from lightning_oft.data.text.sources import Stream, Tables, columns_of, load_tables, naming_lines


class TableDataModule(SplitDataModule, ABC):
    """Base of the data modules of text. A subclass writes `make_encoder`.

    Prepared examples are cached by `datasets`, and made again when the data, the tokenizer or what `cache_arguments`
    names changes.

    Args:
        data: A file (.jsonl, .json, .csv, .tsv, .parquet, .txt with a row a line), a folder of such files, a folder written
            by save_to_disk, or a hub id; or a mapping of splits to those. train and val are such splits; every other
            name is a test set of its own.
        columns: Where columns have other names than ours: ours to theirs, as in {text: body}.
        pretrained: The model whose tokenizer makes the tokens. None: the tokenizer of the task that is run.
        max_length: Tokens kept of a row. None: as many as the model takes, and a longer row is an error.
        batch_size: Rows in a batch, on each device.
        val_fraction: Share of the training rows to validate on, where there is no val split.
        group_by_length: Batches of rows of like length.
        subset: Name of a hub data set's configuration.
        streaming: Read rows as they are needed, for data that fits no disk; a bad row is found when it is reached.
        seed: Decides the validation rows and the order of the batches.
        num_workers: Loader processes.
        pin_memory: Page-locked batches, for faster copies to a GPU.

    Raises:
        OSError: When there is nothing at `data`, on setup.
        ValueError: When an argument is out of its range; on setup, one line that names the first row of no use.
    """

    columns: ClassVar[tuple[str, ...]] = ("input_ids", "labels")
    cache_arguments: ClassVar[tuple[str, ...]] = ("data", "names", "max_length", "tokenizer_key")

    def __init__(
        self,
        data: str | dict[str, str],
        columns: dict[str, str] | None = None,
        pretrained: str | None = None,
        max_length: int | None = None,
        batch_size: int = 8,
        val_fraction: float = 0.0,
        group_by_length: bool = False,
        subset: str | None = None,
        streaming: bool = False,
        seed: int = 0,
        num_workers: int = 0,
        pin_memory: bool = False,
    ) -> None:
        super().__init__(batch_size, num_workers, pin_memory, num_workers > 0, seed)
        if max_length is not None and max_length < 2:
            raise ValueError(f"max_length={max_length}: a row needs at least 2 tokens, one to predict the other from")
        if not 0 <= val_fraction < 1 or (streaming and val_fraction):
            raise ValueError(f"val_fraction={val_fraction}: must lie in [0, 1), and be 0 for streamed data")
        if group_by_length and streaming:
            raise ValueError("group_by_length: streamed rows have no lengths to group by; set it to false")
        self.data, self.names, self.pretrained, self.subset = data, columns or {}, pretrained, subset
        self.max_length, self.val_fraction, self.streaming = max_length, val_fraction, streaming
        self.group_by_length = group_by_length

    @abstractmethod
    def make_encoder(self, split: str, table: Any, limit: int | None) -> Any:
        """What makes an example of a row: its `kind` names the columns that it takes. `limit` is how many tokens the model
        takes. Raises ValueError when the table lacks a column."""

    def prepare_tables(self, tables: Tables) -> None:
        """Called with the tables before any row is encoded."""

    def finish(self, splits: Tables, tables: Tables, limit: int | None) -> Tables:
        """Called with the encoded splits; returns those to train and test on."""
        return splits

    @property
    def tokenizer_key(self) -> str:
        """Names everything of the tokenizer that decides which tokens it makes; known after `setup`."""
        return "" if self.processor is None else tokenizer_key(self.processor)

    def prepare_data(self) -> None:
        """Called on one process of a machine before `setup`: fill the cache that the others read."""
        if not self.streaming:
            self.setup("fit")

    def setup(self, stage: str) -> None:
        """Find, check and encode the rows; once, whatever is run afterwards."""
        if self.splits:
            return
        self.processor, limit = self._tokenizer()
        tables, splits = load_tables(self.data, self.subset, self.streaming), {}
        with naming_lines(self.data):
            tables = self._renamed(tables)
            self.prepare_tables(tables)
            for split, table in tables.items():
                try:
                    encoder = self.make_encoder(split, table, limit)
                except ValueError as error:
                    raise ValueError(f"{split}: {error}") from None
                of_files = self.streaming and table.num_shards > 1
                encode = partial(encode_rows, encoder=encoder, split=split, of_files=of_files)
                splits[split] = self._mapped(table, encode, encoder.kind)
        if self.val_fraction and "val" not in splits and "train" in splits:
            parts = splits["train"].train_test_split(self.val_fraction, seed=self.seed)
            splits = {
                "train": parts["train"],
                "val": parts["test"],
                **{k: v for k, v in splits.items() if k != "train"},
            }
        self.splits = splits = self.finish(splits, tables, limit)
        self.collate_fn = partial(pad, pad_token_id=pad_token_of(self.processor))
        if not self.streaming:
            rank_zero_info(", ".join(f"{split} {len(table)} rows" for split, table in splits.items()))

    @property
    def task(self) -> Any:
        """The LightningModule that is run with this data; None before that is known."""
        return getattr(self.trainer, "lightning_module", None)

    def _tokenizer(self) -> tuple[Any, int | None]:
        """The tokenizer, and how many tokens the model takes."""
        task = self.task
        if self.pretrained is not None:
            from transformers import AutoTokenizer

            tokenizer: Any = AutoTokenizer.from_pretrained(self.pretrained, trust_remote_code=False)
        else:
            tokenizer = getattr(task, "tokenizer", None)
        if tokenizer is None:
            raise ValueError("pretrained is not given and the model has no tokenizer; set data.init_args.pretrained")
        limits = [tokenizer.model_max_length, positions_of(getattr(task, "model", None))]
        limit = min((n for n in limits if n is not None and 0 < n < 10**9), default=None)
        if limit is not None and self.max_length is not None and self.max_length > limit:
            raise ValueError(f"max_length={self.max_length}: the model takes {limit} tokens")
        return tokenizer, limit

    def _renamed(self, tables: Tables) -> Tables:
        """The tables with our names of columns."""
        for split, table in tables.items():
            found = columns_of(table)
            if missing := [name for name in self.names.values() if name not in found]:
                raise ValueError(f"{split}: no column {missing[0]!r}; found {', '.join(found)}: correct columns")
            dropped = [ours for ours, theirs in self.names.items() if ours in found and ours != theirs]
            tables[split] = table.remove_columns(dropped).rename_columns(
                {v: k for k, v in self.names.items() if v != k}
            )
        return tables

    def _mapped(self, table: Any, function: Any, kind: tuple[str, ...] = (), with_indices: bool = True) -> Any:
        """A table after a function of batches of rows; of a cache while neither rows, tokenizer nor arguments change."""
        options: dict[str, Any] = {"batched": True, "remove_columns": columns_of(table)}
        options["with_indices"] = with_indices
        if not self.streaming:
            # datasets would hash the tokenizer's memory, which changes with use.
            made = (table._fingerprint, function.func.__name__, function.keywords.get("split"), self.cache_key, kind)
            options |= {"new_fingerprint": sha256(repr(made).encode()).hexdigest()[:16], "desc": "tokens"}
        return table.map(function, **options)

    @override
    def train_dataloader(self) -> DataLoader[Any]:
        """Shuffled batches; by length where that is asked for, and a part of a stream on each process."""
        table: Any = self.splits["train"]
        if self.streaming:
            return DataLoader(self._part(table.shuffle(seed=self.seed)), **self._stream_options())
        if not self.group_by_length:
            return super().train_dataloader()
        sampler = LengthGrouped(
            [len(ids) for ids in table["input_ids"]], self.batch_size, *self._processes(), self.seed
        )
        return ResumableLoader(
            table, batch_size=self.batch_size, sampler=sampler, collate_fn=self.collate_fn, **self.workers
        )

    @override
    def _loader(self, split: str, shuffle: bool = False) -> DataLoader[Any]:
        if self.streaming:
            return DataLoader(self._part(self.splits[split]), **self._stream_options())
        return super()._loader(split, shuffle)

    def _processes(self) -> tuple[int, int]:
        return (1, 0) if self.trainer is None else (self.trainer.world_size, self.trainer.global_rank)

    def _part(self, table: Any) -> Any:
        from datasets.distributed import split_dataset_by_node

        processes, rank = self._processes()
        return Stream(split_dataset_by_node(table, rank, processes) if processes > 1 else table, self.data)

    def _stream_options(self) -> dict[str, Any]:
        return {"batch_size": self.batch_size, "collate_fn": self.collate_fn, **self.workers}


def encode_rows(
    rows: Mapping[str, list[Any]], indices: list[int], encoder: Any, split: str, of_files: bool = False
) -> dict[str, list[Any]]:
    """A batch of rows as examples. Raises ValueError, one line that names the split and the row, counted from 1; with
    `of_files` in its file, which nobody knows here, so that the row's beginning is told too."""
    made: dict[str, list[Any]] = {}
    for place, index in enumerate(indices):
        row = {name: rows[name][place] for name in encoder.kind}  # may read the batch, which raises for any row of it
        try:
            example = encoder(row)
        except ValueError as error:
            which = f" of one of its files, {str(row)[:80]}..." if of_files else ""
            raise ValueError(f"{split}, row {index + 1}{which}: {error}") from None
        for name, values in example.items():
            made.setdefault(name, []).append(values)
    return made


def tokenizer_key(tokenizer: Any) -> str:
    """16 hex digits, equal for tokenizers that make the same tokens of the same rows."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    made = backend.to_str() if backend is not None else sorted(tokenizer.get_vocab().items())
    special = sorted((name, str(token)) for name, token in tokenizer.special_tokens_map.items())
    return sha256(repr((type(tokenizer).__name__, made, special, tokenizer.chat_template)).encode()).hexdigest()[:16]


def positions_of(model: Any) -> int | None:
    """How many tokens a transformers model has places for. RoBERTa and its kin count them from after the padding's id."""
    places: int | None = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    for name, module in model.named_modules() if isinstance(model, nn.Module) and places is not None else ():
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            return int(module.num_embeddings) - int(module.padding_idx) - 1
    return places


def pad_token_of(tokenizer: Any) -> int:
    """The id to pad with: the tokenizer's, else that of the end, else 0; padding is masked whatever it is."""
    ids = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return int(next(number for number in ids if number is not None))
