"""Batches of pictures that keep their shapes: which sizes they get, and in which order they come."""

import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import cycle, islice
from typing import Any

import torch
from torch.utils.data import DistributedSampler

from lightning_oft.data.diffusion.sources import Captioned
from lightning_oft.data.vision.pixels import decode

WIDEST = 2.0
"""The longer side by the shorter one; of pictures that are longer still, the ends are cut off."""


def nearest_sizes(found: Sequence[Captioned], size: int, step: int) -> list[tuple[int, int]]:
    """Height and width for each picture: multiples of `step`, of its shape and about size x size pixels in all."""
    with ThreadPoolExecutor() as pool:
        shapes: Iterator[tuple[int, int]] = pool.map(lambda one: decode(one.cell).size, found)
        return [nearest_size(width, height, size, step) for width, height in shapes]


def nearest_size(width: int, height: int, size: int, step: int) -> tuple[int, int]:
    """Height and width for a picture of this width and height."""
    root = math.sqrt(min(WIDEST, max(1 / WIDEST, width / height)))
    tall, wide = (max(1, round(side / step)) * step for side in (size / root, size * root))
    return tall, wide


class SameShape(DistributedSampler[Any]):
    """Indices of which every `batch_size` are of pictures of one size, on every process alike.

    Where a size has not enough of them to fill its last batch on all processes, some come again. Shuffled, the order
    depends on seed and epoch alone. Lightning leaves a sampler alone that is made for several processes.
    """

    def __init__(
        self,
        sizes: Sequence[tuple[int, int]],
        batch_size: int,
        processes: int = 1,
        rank: int = 0,
        shuffle: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__(sizes, processes, rank, shuffle, seed)  # type: ignore[arg-type]
        self.rows = {size: [row for row, other in enumerate(sizes) if other == size] for size in sorted(set(sizes))}
        self.batch_size, self.together = batch_size, batch_size * processes
        self.total_size = sum(-(-len(rows) // self.together) * self.together for rows in self.rows.values())
        self.num_samples = self.total_size // processes

    def __iter__(self) -> Iterator[Any]:
        """The indices of this process: the same places of the same batches as on the others."""
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        steps = []
        for rows in self.rows.values():
            order = torch.randperm(len(rows), generator=generator).tolist() if self.shuffle else range(len(rows))
            filled = list(islice(cycle(rows[i] for i in order), -(-len(rows) // self.together) * self.together))
            steps += [filled[i : i + self.together] for i in range(0, len(filled), self.together)]
        chosen = torch.randperm(len(steps), generator=generator).tolist() if self.shuffle else range(len(steps))
        start = self.rank * self.batch_size
        return iter([row for i in chosen for row in steps[i][start : start + self.batch_size]])
