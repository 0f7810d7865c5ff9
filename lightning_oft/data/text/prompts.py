"""PromptDataModule: prompts that a model answers itself, with what its answers are judged by."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch.utils.data import DataLoader, DistributedSampler
from typing_extensions import override

from lightning_oft.data.base import ResumableLoader
from lightning_oft.data.text.batches import pad
from lightning_oft.data.text.examples import Encoder, check_length, kind_of
from lightning_oft.data.text.rows import PlacedDataModule
from lightning_oft.data.text.sources import Tables, columns_of


class PromptEncoder(Encoder):
    """Makes examples of prompts: {"input_ids"} and every column of the row as it is."""

    @override
    def __call__(self, row: Mapping[str, Any]) -> dict[str, Any]:
        ids = self.prompt(row)
        if self.max_length is not None and len(ids) > self.max_length:
            raise ValueError(f"the prompt has {len(ids)} tokens, more than max_length; leave the row out, or raise it")
        check_length(ids, self.limit, self.max_length)
        return {**row, "input_ids": ids}

    @override
    def prompt(self, row: Mapping[str, Any]) -> list[int]:
        return self._prompt(row["prompt"])


def pad_prompts(examples: Sequence[Mapping[str, Any]], pad_token_id: int) -> dict[str, Any]:
    """B examples as a batch: tokens padded on the left, and their columns."""
    batch: dict[str, Any] = dict(pad([{"input_ids": one["input_ids"]} for one in examples], pad_token_id, side="left"))
    names = [name for name in examples[0] if name != "input_ids"]
    return {**batch, "columns": {name: [one[name] for one in examples] for name in names}}


class PromptDataModule(PlacedDataModule):
    """Prompts to sample completions of, read by `datasets`; every row is checked before the run begins.

    A table has a column prompt (text or messages); its other columns go to the reward functions by their names. Batches of
    B prompts are {"input_ids", "attention_mask"} (B, L) int64, padded on the left, and {"columns"}: by name, the B values
    of each column, among them "row", the prompts' places in their split.

    Args:
        chat_template: File with a chat template in the place of the tokenizer's.
        table: Arguments of TableDataModule, but group_by_length; max_length is the most that a prompt may have.

    Raises:
        OSError: When there is nothing at `data`, on setup.
        ValueError: When an argument is out of its range; on setup, one line that names the first row of no use.
    """

    columns = ("input_ids", "attention_mask", "columns")
    kinds = (("prompt",),)
    collate = staticmethod(pad_prompts)

    @override
    def make_encoder(self, split: str, table: Any, limit: int | None) -> Encoder:
        found = columns_of(table)
        kind_of(found, self.kinds)
        if taken := {"input_ids", "row", "prompts", "completions", "completion_ids"} & set(found):
            raise ValueError(f"a column {min(taken)!r} is made here; give yours another name by columns")
        return self.encoder(tuple(found), limit)

    @override
    def encoder(self, kind: tuple[str, ...], limit: int | None) -> Encoder:
        return PromptEncoder(self.processor, kind, limit, self.max_length)

    @override
    def finish(self, splits: Tables, tables: Tables, limit: int | None) -> Tables:
        return splits

    @override
    def predict_dataloader(self) -> list[DataLoader[Any]]:
        return self.test_dataloader()

    @override
    def train_dataloader(self) -> DataLoader[Any]:
        """Shuffled batches; each step's as often as the task learns from one set of completions."""
        times = getattr(self.task, "num_iterations", 1)
        if times == 1:
            return super().train_dataloader()
        if self.streaming:
            raise ValueError("num_iterations: streamed prompts come once; set it to 1, or streaming to false")
        rows: Any = self.splits["train"]
        batches = self.trainer.accumulate_grad_batches if self.trainer is not None else 1
        sampler = Repeated(rows, self.batch_size * batches, times, *self._processes(), self.seed)
        return ResumableLoader(
            rows, batch_size=self.batch_size, sampler=sampler, collate_fn=self.collate_fn, **self.workers
        )


class Repeated(DistributedSampler[Any]):
    """Shuffled indices, each step's so often before the next's. The last step is filled up from the first.

    Lightning leaves a sampler alone that is made for several processes.
    """

    def __init__(
        self, rows: Sequence[Any], step: int, times: int, processes: int = 1, rank: int = 0, seed: int = 0
    ) -> None:
        super().__init__(rows, processes, rank, seed=seed)  # type: ignore[arg-type]
        self.step, self.times = step, times
        self.num_samples = -(-len(rows) // (step * processes)) * step
        self.total_size = self.num_samples * processes

    @override
    def __iter__(self) -> Iterator[Any]:
        mine = list(super().__iter__())
        steps = [mine[i : i + self.step] for i in range(0, len(mine), self.step)]
        return iter([index for one in steps for _ in range(self.times) for index in one])

    @override
    def __len__(self) -> int:
        return self.num_samples * self.times
