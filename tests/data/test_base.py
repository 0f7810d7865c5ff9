from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.demos.boring_classes import BoringModel
from torch.utils.data import DataLoader

from lightning_oft.data.base import SplitDataModule


class Numbers(SplitDataModule):
    """A stranger's data module: three test sets of numbers and no validation."""

    columns = ("x",)
    cache_arguments: ClassVar[tuple[str, ...]] = ("count", "seed")

    def __init__(self, count: int = 5, **arguments: Any) -> None:
        super().__init__(batch_size=2, **arguments)
        self.count = count

    def setup(self, stage: str) -> None:
        numbers = [{"x": torch.tensor(i)} for i in range(self.count)]
        self.splits = {"train": numbers, "a": numbers[:1], "b": numbers[:2]}  # type: ignore[dict-item]


def loaded(**arguments: Any) -> Numbers:
    data = Numbers(**arguments)
    data.setup("fit")
    return data


def test_loaders_are_the_splits() -> None:
    data = loaded()
    assert data.test_names == ["a", "b"]
    assert [len(loader.dataset) for loader in data.test_dataloader()] == [1, 2]  # type: ignore[arg-type]
    assert len(data.predict_dataloader()) == 2
    assert data.val_dataloader() == []
    assert sorted(int(x) for batch in data.train_dataloader() for x in batch["x"]) == list(range(5))


def test_order_depends_on_the_seed_only() -> None:
    def order(seed: int) -> list[int]:
        torch.rand(1)  # what a model draws changes nothing
        return [int(x) for batch in loaded(count=50, seed=seed).train_dataloader() for x in batch["x"]]

    assert order(0) == order(0) != order(1)


class Order(BoringModel):
    """Learns nothing, and remembers the order of the examples."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[int] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.seen += batch["x"].tolist()
        return self.layer(torch.ones(1, 32)).sum()


def fit(
    root: Path, epochs: int, loader: Any, resume: Path | None = None, limits: Any = None, **keeping: Any
) -> list[int]:
    options: Any = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary"), False)
    options |= {"limit_val_batches": 0, **(limits or {})}
    keeper, model = ModelCheckpoint(root, **(keeping or {"filename": str(epochs)})), Order()
    trainer = Trainer(accelerator="cpu", max_epochs=epochs, callbacks=[keeper], **options)
    trainer.fit(model, loader, ckpt_path=resume)
    return model.seen


@pytest.mark.parametrize("count", [5, 6])
def test_a_resumed_fit_goes_on_in_its_order_which_is_torchs_own(tmp_path: Path, count: int) -> None:
    data = loaded(count=count)
    order = fit(tmp_path, 3, data.train_dataloader())
    generator = torch.Generator().manual_seed(0)
    assert order == fit(tmp_path, 3, DataLoader(data.splits["train"], 2, shuffle=True, generator=generator))
    fit(tmp_path, 1, data.train_dataloader())
    assert order[count:] == fit(tmp_path, 3, data.train_dataloader(), tmp_path / "1.ckpt")


@pytest.mark.parametrize("workers", [0, 1])
def test_a_fit_that_is_resumed_within_an_epoch_sees_the_rest_of_it(tmp_path: Path, workers: int) -> None:
    data = loaded(count=5, num_workers=workers)
    keeping = {"every_n_train_steps": 1, "save_top_k": -1, "filename": "{step}"}
    order = fit(tmp_path, 3, data.train_dataloader(), **keeping)
    for step in (1, 2, 3, 4) if workers == 0 else (4,):
        seen = 5 * (step // 3) + 2 * (step % 3)
        assert order[seen:] == fit(tmp_path, 3, data.train_dataloader(), tmp_path / f"step={step}.ckpt", **keeping)


@pytest.mark.filterwarnings("ignore:You requested to overfit")
@pytest.mark.parametrize(
    ("limits", "steps"), [({"limit_train_batches": 2}, (1, 2, 3, 4)), ({"overfit_batches": 2}, (2, 4))]
)
def test_an_epoch_that_a_limit_ends_leaves_nothing_out_of_the_next(
    tmp_path: Path, limits: dict[str, int], steps: tuple[int, ...]
) -> None:
    data, keeping = loaded(count=6), {"every_n_train_steps": 1, "save_top_k": -1, "filename": "{step}"}
    order = fit(tmp_path, 3, data.train_dataloader(), limits=limits, **keeping)
    for step in steps:
        found = fit(tmp_path, 3, data.train_dataloader(), tmp_path / f"step={step}.ckpt", limits, **keeping)
        assert found == order[2 * step :]


def test_cache_key_names_what_decides_the_examples() -> None:
    keys = [made.cache_key for made in (Numbers(), Numbers(num_workers=1), Numbers(count=6), Numbers(seed=1))]
    assert keys[0] == keys[1]
    assert len(set(keys)) == 3


def test_companion_is_the_processor() -> None:
    data = Numbers()
    assert data.companions() == []
    data.processor = object()
    assert data.companions() == [data.processor]


def test_worker_settings_reach_the_loader() -> None:
    loader = loaded(num_workers=1, persistent_workers=True).train_dataloader()
    assert (loader.num_workers, loader.persistent_workers, loader.batch_size) == (1, True, 2)
    assert not loaded(num_workers=0, persistent_workers=True).train_dataloader().persistent_workers


@pytest.mark.parametrize(("arguments", "message"), [((0, 0), "batch_size 0"), ((1, -1), "num_workers -1")])
def test_impossible_arguments_are_refused(arguments: tuple[int, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SplitDataModule(*arguments)
