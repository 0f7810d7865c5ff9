"""Pictures that keep their shapes: the sizes they get, and batches of one size in an order that processes share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from lightning_oft.data import DreamBoothDataModule, PictureDataModule
from lightning_oft.data.diffusion.shapes import SameShape, nearest_size

pytest.importorskip("datasets", reason="datasets is not installed: pip install 'lightning_oft[data]'")

SIZES = [(8, 8)] * 5 + [(4, 16)] * 3 + [(16, 4)]


@pytest.mark.parametrize(
    ("shape", "size"),
    [
        ((512, 512), (512, 512)),
        ((1024, 768), (448, 576)),  # width and height of a picture, height and width of its pixels
        ((768, 1024), (576, 448)),
        ((4000, 100), (384, 704)),
    ],
)
def test_a_size_is_of_the_pictures_shape(shape: tuple[int, int], size: tuple[int, int]) -> None:
    assert nearest_size(*shape, 512, 64) == size


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("shuffle", [True, False])
def test_every_batch_is_of_one_size_on_all_processes(processes: int, shuffle: bool) -> None:
    samplers = [SameShape(SIZES, 2, processes, rank, shuffle, seed=1) for rank in range(processes)]
    orders = [list(sampler) for sampler in samplers]
    assert {len(order) for order in orders} == {len(samplers[0])}
    for start in range(0, len(orders[0]), 2):
        assert len({SIZES[row] for order in orders for row in order[start : start + 2]}) == 1
    assert {row for order in orders for row in order} == set(range(len(SIZES)))
    assert len(orders[0]) * processes == {1: 6 + 4 + 2, 2: 8 + 4 + 4}[processes]


def test_the_order_is_that_of_seed_and_epoch() -> None:
    sampler, again = SameShape(SIZES, 2, seed=1), SameShape(SIZES, 2, seed=1)
    first = list(sampler)
    sampler.set_epoch(1)
    assert list(sampler) != first
    assert list(again) == first
    again.set_epoch(1)  # as Lightning does when it resumes
    assert list(again) == list(sampler)


def test_batches_keep_the_shapes_of_pictures(tmp_path: Path) -> None:
    for number, size in enumerate([(32, 16), (16, 32), (16, 32), (20, 20)]):
        Image.new("RGB", size).save(tmp_path / f"{number}.png")
    options: dict[str, Any] = {"prompt": "p", "size": 16, "side_step": 4, "batch_size": 2, "horizontal_flip": 0.5}
    data = PictureDataModule(str(tmp_path), **options)
    data.setup("fit")
    shapes = [tuple(batch["pixel_values"].shape) for batch in data.train_dataloader()]
    assert sorted(shapes) == [(2, 3, 12, 24), (2, 3, 16, 16), (2, 3, 24, 12)]
    assert torch.equal(data.splits["train"][3]["pixel_values"], -torch.ones(3, 16, 16))
    validated = PictureDataModule(str(tmp_path), val_fraction=0.5, **options)
    validated.setup("fit")
    assert all(len(batch["prompt"]) == 2 for batch in validated.val_dataloader()[0])


@pytest.mark.parametrize("step", [0, 9])
def test_steps_of_sides_that_are_none_are_refused(step: int) -> None:
    with pytest.raises(ValueError, match=f"side_step={step}: must lie between 1 and half of the size, 8"):
        PictureDataModule(".", size=16, side_step=step)
    with pytest.raises(ValueError, match="side_step: pictures of the class are square"):
        DreamBoothDataModule(".", class_data="c", class_prompt="c", side_step=8)
