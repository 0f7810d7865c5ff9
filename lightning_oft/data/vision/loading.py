"""What both image data modules share: how labelled examples become the loaders of a fit, a test and a prediction."""

from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

Batch = dict[str, Tensor]
"""pixel_values (B, C, H, W) float32 and labels (B,) int64; without the first dimension for one example."""


class SplitDataModule(LightningDataModule):
    """Loaders over `self.splits`, which a subclass fills in `setup`.

    Keys: "train", "val" where there is one, then the test sets in order. `test_names` and `class_names` are what the
    tasks read: the names of the test sets, and of the classes in the order of their ids.
    """

    def __init__(
        self, batch_size: int, num_workers: int, pin_memory: bool, persistent_workers: bool, seed: int
    ) -> None:
        super().__init__()
        if batch_size < 1 or num_workers < 0:
            raise ValueError(f"batch_size {batch_size}, num_workers {num_workers}: need at least 1 and at least 0")
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.pin_memory = pin_memory
        # torch refuses persistent workers where there are none to persist.
        self.persistent_workers = persistent_workers and num_workers > 0
        self.seed = seed
        self.splits: dict[str, Dataset[Batch]] = {}
        self.class_names: list[str] = []

    @property
    def num_classes(self) -> int:
        """How many classes there are; known after `setup`."""
        return len(self.class_names)

    @property
    def test_names(self) -> list[str]:
        """The test sets' names, in the order of the loaders."""
        return [name for name in self.splits if name not in ("train", "val")]

    def train_dataloader(self) -> DataLoader[Batch]:
        """Shuffled batches, in an order that depends on `seed` and the epoch only."""
        return self._loader("train", shuffle=True)

    def val_dataloader(self) -> list[DataLoader[Batch]]:
        """One loader, or none where nothing was set aside."""
        return [self._loader("val")] if "val" in self.splits else []

    def test_dataloader(self) -> list[DataLoader[Batch]]:
        """One loader a test set."""
        return [self._loader(name) for name in self.test_names]

    def predict_dataloader(self) -> list[DataLoader[Batch]]:
        """The test sets again."""
        return self.test_dataloader()

    def _loader(self, split: str, shuffle: bool = False) -> DataLoader[Batch]:
        return DataLoader(
            self.splits[split],
            batch_size=self.batch_size,
            shuffle=shuffle,
            num_workers=self.num_workers,
            pin_memory=self.pin_memory,
            persistent_workers=self.persistent_workers,
            collate_fn=collate,
            # Its own generator: the order of the images is then untouched by what the model draws.
            generator=torch.Generator().manual_seed(self.seed),
        )


def collate(examples: Sequence[Batch | None]) -> Batch:
    """Stack examples into a batch; None, an image that could not be read, is left out."""
    found = [example for example in examples if example is not None]
    if not found:
        raise ValueError(f"a batch of {len(examples)} images of which none can be read; check the files")
    return {key: torch.stack([example[key] for example in found]) for key in found[0]}


class WorkerGenerator:
    """A random generator for the process it is used in: seeded by `seed`, and in a loader's worker by that worker's."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self._generator: tuple[int, torch.Generator] | None = None

    def get(self) -> torch.Generator:
        """The generator; a new one in each worker, and in each epoch's workers unless they persist."""
        info: Any = torch.utils.data.get_worker_info()
        seed = self.seed if info is None else info.seed
        if self._generator is None or self._generator[0] != seed:
            self._generator = (seed, torch.Generator().manual_seed(seed))
        return self._generator[1]
