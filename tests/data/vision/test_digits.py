import sys

import numpy as np
import pytest
import torch

from lightning_oft.data import DigitsDataModule
from lightning_oft.data.vision.digits import load_digits, new_domain


def made(**arguments: object) -> DigitsDataModule:
    data = DigitsDataModule(**arguments)  # type: ignore[arg-type]
    data.setup("fit")
    return data


def pixels(data: DigitsDataModule, split: str) -> torch.Tensor:
    return torch.stack([data.splits[split][i]["pixel_values"] for i in range(len(data.splits[split]))])  # type: ignore[arg-type]


def test_held_out_digits_are_in_no_other_split() -> None:
    data = made(rotation=0, invert=False)
    known = {tuple(image.flatten().tolist()) for split in ("train", "val") for image in pixels(data, split)}
    held_out = {tuple(image.flatten().tolist()) for image in pixels(data, "original")}
    assert len(known) == 1438
    assert known.isdisjoint(held_out)


def test_held_out_digits_are_those_that_the_shipped_base_never_saw() -> None:
    (_, labels), (held_out, held_out_labels) = load_digits()
    assert (len(labels), len(held_out_labels)) == (1438, 359)
    assert (held_out_labels[:8], int(held_out.sum())) == ([7, 5, 8, 0, 5, 0, 7, 5], 112994)


def test_seed_decides_the_validation_split_only() -> None:
    assert torch.equal(pixels(made(seed=0), "original"), pixels(made(seed=1), "original"))
    assert not torch.equal(pixels(made(seed=0), "val"), pixels(made(seed=1), "val"))


def test_both_test_sets_show_the_same_digits() -> None:
    data = made(rotation=90, invert=True)
    assert data.test_names == ["new", "original"]
    # In [-1, 1], where inverting is a sign; 8-bit levels are rounded.
    torch.testing.assert_close(
        pixels(data, "new"), -torch.rot90(pixels(data, "original"), 1, (2, 3)), atol=1 / 127, rtol=0
    )


def test_new_domain_undoes_itself() -> None:
    (levels, _), _ = load_digits()
    assert np.array_equal(new_domain(new_domain(levels, 90, True), 270, True), levels)


def test_batches_are_what_a_task_takes() -> None:
    data = made(batch_size=16)
    batch = next(iter(data.train_dataloader()))
    assert tuple(batch) == ("pixel_values", "labels")
    assert batch["pixel_values"].shape == (16, 1, 8, 8)
    assert batch["pixel_values"].dtype == torch.float32
    assert batch["labels"].dtype == torch.int64
    assert (float(batch["pixel_values"].min()), float(batch["pixel_values"].max())) == (-1, 1)


def test_no_validation_split_is_no_validation() -> None:
    assert made(val_fraction=0.0).val_dataloader() == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"rotation": 45}, "rotation=45"), ({"val_fraction": 1.0}, "leave a training set")],
)
def test_impossible_arguments_are_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DigitsDataModule(**arguments)  # type: ignore[arg-type]


def test_missing_scikit_learn_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ModuleNotFoundError, match=r"^scikit-learn .*pip install 'lightning_oft\[data\]'$"):
        made()
