"""From examples to batches: several documents packed into a row, rows padded to one length."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_oft.data.text.examples import IGNORED

Example = dict[str, list[int]]


def pack(examples: Sequence[Example], length: int) -> list[Example]:
    """Examples put together into rows of at most `length` tokens, longest first, each into the fullest row that has room.

    A row has position_ids that begin again at 0 with each document, by which transformers' models keep documents apart
    as long as they get no attention mask and no cache.
    """
    rows: list[list[Example]] = []
    room: list[list[int]] = [[] for _ in range(length + 1)]  # by free tokens, the rows that have as many
    for example in sorted(examples, key=lambda example: -len(example["input_ids"])):
        size = len(example["input_ids"])
        free = next((free for free in range(size, length + 1) if room[free]), None)
        if free is None:
            rows.append([])
            free = max(length, size)
            row = len(rows) - 1
        else:
            row = room[free].pop()
        rows[row].append(example)
        room[free - size].append(row)
    return [_joined(row) for row in rows]


def _joined(documents: Iterable[Example]) -> Example:
    row: Example = {"input_ids": [], "labels": [], "position_ids": []}
    for document in documents:
        row["input_ids"] += document["input_ids"]
        row["labels"] += document["labels"]
        row["position_ids"] += range(len(document["input_ids"]))
    return row


def pad(examples: Sequence[Example], pad_token_id: int, side: str = "right", multiple: int = 1) -> dict[str, Tensor]:
    """Examples as a batch of int64: input_ids (B, L), labels where there are some, and attention_mask, or the
    position_ids of packed rows, of which padding is one more document. labels have a length of their own: (B,) of
    classes, (B, L) of tokens, (B, M) of targets."""
    columns = {name: [example[name] for example in examples] for name in examples[0]}
    if "position_ids" not in columns:
        columns["attention_mask"] = [[1] * len(ids) for ids in columns["input_ids"]]
    fillings = {"input_ids": pad_token_id, "labels": IGNORED}
    batch = {}
    for name, rows in columns.items():
        if isinstance(rows[0], list):
            longest = max(map(len, rows))
            length = -(-longest // multiple) * multiple
            filled = [
                range(length - len(row)) if name == "position_ids" else [fillings.get(name, 0)] * (length - len(row))
                for row in rows
            ]
            pairs = zip(rows, filled, strict=True)
            rows = [[*row, *filling] if side == "right" else [*filling, *row] for row, filling in pairs]
        batch[name] = torch.tensor(rows)
    return batch


class LengthGrouped(torch.utils.data.DistributedSampler[Any]):
    """Shuffled indices in which neighbours are of like length, so that batches hold little padding.

    Groups of 50 batches are sorted by length. Lightning leaves a sampler alone that is made for several processes.
    """

    def __init__(
        self, lengths: Sequence[int], batch_size: int, processes: int = 1, rank: int = 0, seed: int = 0
    ) -> None:
        super().__init__(lengths, processes, rank, seed=seed)  # type: ignore[arg-type]
        self.lengths, self.batch_size = lengths, batch_size

    def __iter__(self) -> Any:
        """The indices of this process, which has the same places of the same batches in every epoch of a seed."""
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        order = torch.randperm(len(self.lengths), generator=generator).tolist()
        order += order[: self.total_size - len(order)]
        size = self.batch_size * self.num_replicas
        batches = []
        for start in range(0, len(order), 50 * size):
            group = sorted(order[start : start + 50 * size], key=lambda index: -self.lengths[index])
            batches += [group[i : i + size] for i in range(0, len(group), size)]
        full, rest = batches[:-1], batches[-1:]
        shuffled = [full[i] for i in torch.randperm(len(full), generator=generator).tolist()] + rest
        return iter([index for batch in shuffled for index in batch[self.rank :: self.num_replicas]])
