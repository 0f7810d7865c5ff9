"""SplitDataModule: what a data module declares so that the tasks can train, score and export with it."""

import itertools
from collections.abc import Callable, Iterator
from hashlib import sha256
from importlib import import_module
from typing import Any, ClassVar

import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader, Dataset, RandomSampler, default_collate
from typing_extensions import override


class SplitDataModule(LightningDataModule):
    """Loaders over `self.splits`, which a subclass fills in `setup`.

    The arguments are torch's DataLoader's; `seed` decides the order of the training batches. Raises ValueError when
    batch_size or num_workers is out of its range.
    """

    columns: ClassVar[tuple[str, ...]] = ()
    """Keys of a batch."""
    cache_arguments: ClassVar[tuple[str, ...]] = ()
    """Attributes whose values decide which examples there are and what is in them; see `cache_key`."""

    def __init__(
        self, batch_size: int, num_workers: int = 0, pin_memory: bool = False, persistent_workers: bool = False, seed: int = 0
    ) -> None:  # fmt: skip
        super().__init__()
        if batch_size < 1 or num_workers < 0:
            raise ValueError(f"batch_size {batch_size}, num_workers {num_workers}: need at least 1 and at least 0")
        self.batch_size, self.seed = batch_size, seed
        # torch refuses persistent workers where there are none to persist.
        persistent = persistent_workers and num_workers > 0
        self.workers: dict[str, Any] = {
            "num_workers": num_workers,
            "pin_memory": pin_memory,
            "persistent_workers": persistent,
        }
        """torch's options of the loader processes."""
        self.splits: dict[str, Dataset[Any]] = {}
        """Data sets by split: "train", "val" where there is one, then the test sets in order."""
        self.class_names: list[str] = []
        """Names of the classes in the order of their ids; empty where the data has no classes."""
        self.collate_fn: Callable[[Any], Any] = default_collate
        """Makes a batch of examples; a text module sets transformers' collator."""
        self.processor: Any = None
        """The processor or tokenizer that made the examples, once `setup` ran; written beside an export."""

    @property
    def num_classes(self) -> int:
        """Known after `setup`."""
        return len(self.class_names)

    @property
    def test_names(self) -> list[str]:
        """Names of the test sets, in the order of the test and predict loaders: the columns of a before/after table."""
        return [name for name in self.splits if name not in ("train", "val")]

    @property
    def cache_key(self) -> str:
        """16 hex digits that name files of prepared examples: equal for equal class and `cache_arguments`."""
        values = [(name, getattr(self, name)) for name in self.cache_arguments]
        return sha256(f"{type(self).__qualname__}{values!r}".encode()).hexdigest()[:16]

    def companions(self) -> list[Any]:
        """What is written beside an export, so that plain libraries prepare examples alike: by default `processor`."""
        return [] if self.processor is None else [self.processor]

    def train_dataloader(self) -> DataLoader[Any]:
        """Shuffled batches, in an order that depends on `seed` and the epoch only."""
        return self._loader("train", shuffle=True)

    def val_dataloader(self) -> list[DataLoader[Any]]:
        """One loader, or none where nothing was set aside."""
        return [self._loader("val")] if "val" in self.splits else []

    def test_dataloader(self) -> list[DataLoader[Any]]:
        """One loader for each of `test_names`."""
        return [self._loader(name) for name in self.test_names]

    def predict_dataloader(self) -> list[DataLoader[Any]]:
        """The test sets again, to predict or to generate for."""
        return self.test_dataloader()

    def _loader(self, split: str, shuffle: bool = False) -> DataLoader[Any]:
        # A generator of its own: the order of the examples does not depend on random numbers that the model draws.
        generator = torch.Generator().manual_seed(self.seed)
        data, options = self.splits[split], {"generator": generator, "collate_fn": self.collate_fn, **self.workers}
        if not shuffle:
            return DataLoader(data, batch_size=self.batch_size, **options)
        sampler = Shuffled(data, self.batch_size, self.seed)
        return ResumableLoader(data, batch_size=self.batch_size, sampler=sampler, **options)


class ResumableLoader(DataLoader[Any]):
    """A DataLoader that a fit which is resumed within an epoch goes on with, and does not begin again.

    Lightning keeps in its checkpoints what `state_dict` gives. The order must be that of the epoch; a sampler that
    has no `epoch`, as `overfit_batches` puts in, begins again.
    """

    _given = _skipped = 0
    _rest_of: int | None = None  # the epoch in which batches are left out

    def state_dict(self) -> dict[str, int | None]:
        """How many batches of which epoch were given."""
        return {"batches": self._given, "epoch": self._epoch}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Leave these out, once; none where they were all that the epoch had."""
        self._skipped, self._rest_of = state_dict["batches"] % max(1, len(self)), state_dict["epoch"]

    @property
    def _epoch(self) -> int | None:
        return getattr(self.sampler, "epoch", None)

    @property
    def _index_sampler(self) -> Any:
        return _Rest(super()._index_sampler, self)

    @override
    def __iter__(self) -> Any:
        # Only now, with the first batch, does the sampler know its epoch, which loader processes would read ahead.
        if self._rest_of is None or self._rest_of != self._epoch:  # a limit ended that epoch before its last batch
            self._skipped = 0
        batches = super().__iter__()
        self._given, self._skipped = self._skipped, 0
        for batch in batches:
            self._given += 1
            yield batch


class _Rest:
    """The indices of batches, but for those that a loader leaves out; torch counts all of them."""

    def __init__(self, indices: Any, loader: ResumableLoader) -> None:
        self.indices, self.loader = indices, loader

    def __iter__(self) -> Iterator[Any]:
        return itertools.islice(iter(self.indices), self.loader._skipped, None)

    def __len__(self) -> int:
        return len(self.indices)


class Shuffled(RandomSampler):
    """Indices in an order that depends on seed and epoch alone: a fit that is resumed goes on with its own.

    The orders are those that a DataLoader with a generator of this seed draws one after another in a fit.
    """

    def __init__(self, data: Any, batch_size: int, seed: int) -> None:
        super().__init__(data)
        self.batch_size, self.seed, self.epoch = batch_size, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Called by Lightning before each epoch."""
        self.epoch = epoch

    @override
    def __iter__(self) -> Iterator[int]:
        generator, order = torch.Generator().manual_seed(self.seed), torch.empty(0)
        for epoch in range(self.epoch + 1):
            if epoch and self.num_samples % self.batch_size:  # torch draws once more where a last batch is not full
                torch.randperm(self.num_samples, generator=generator)
            torch.empty((), dtype=torch.int64).random_(generator=generator)  # the seed of the loader's workers
            order = torch.randperm(self.num_samples, generator=generator)
        return iter(order.tolist())


def require(module: str, package: str) -> Any:
    """Import an optional module. Raises ModuleNotFoundError, one line that says what to install, where it is absent."""
    try:
        return import_module(module)
    except ImportError as error:
        raise ModuleNotFoundError(
            f"{package} is not installed; this data needs it: pip install 'lightning_oft[data]'"
        ) from error
