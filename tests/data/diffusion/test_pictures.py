"""Pictures with prompts: where they are found, what a batch holds, and what is said of those that are wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from lightning_oft.data import DreamBoothDataModule, PictureDataModule
from lightning_oft.data.diffusion.pictures import to_pixels
from lightning_oft.data.diffusion.sources import read_prompts

pytest.importorskip("datasets", reason="datasets is not installed: pip install 'lightning_oft[data]'")


def picture(path: Path, level: int = 128, size: tuple[int, int] = (8, 8)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (level, 0, 255)).save(path)


def lines(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three pictures with a prompt each, from every place that one can have."""
    for name in ("a.png", "deep/b.jpg", "c.webp"):
        picture(tmp_path / "data" / name)
    lines(tmp_path / "data" / "metadata.jsonl", {"file_name": "deep/b.jpg", "prompt": "from metadata"})
    (tmp_path / "data" / "a.txt").write_text("from a text file\n")
    return tmp_path / "data"


def prompts_of(data: Any) -> list[str]:
    data.setup("fit")
    return [example["prompt"] for example in data.splits["train"]]


def test_prompts_come_from_metadata_a_text_file_or_are_one_for_all(folder: Path) -> None:
    data = PictureDataModule(str(folder), prompt="one for all", size=8)
    assert prompts_of(data) == ["from a text file", "one for all", "from metadata"]


def test_a_batch_is_pixels_and_prompts(folder: Path) -> None:
    data = PictureDataModule(str(folder), prompt="p", size=4, batch_size=3)
    data.setup("fit")
    (batch,) = data.train_dataloader()
    assert set(batch) == {"pixel_values", "prompt"} == set(data.columns)
    assert batch["pixel_values"].shape == (3, 3, 4, 4)
    assert len(batch["prompt"]) == 3
    assert [one.size for one in data.shown(2)] == [(4, 4)] * 2


def test_pixels_are_the_middle_square_from_minus_one_to_one() -> None:
    image = Image.new("RGB", (12, 4), "black")
    image.paste((255, 255, 255), (4, 0, 8, 4))
    assert torch.equal(to_pixels(image, 4), torch.ones(3, 4, 4))
    assert torch.equal(to_pixels(image.crop((0, 0, 4, 4)), 4), -torch.ones(3, 4, 4))


@pytest.mark.parametrize(("flip", "mirrored"), [(0.0, False), (1.0, True)])
def test_training_pictures_are_mirrored_and_others_not(tmp_path: Path, flip: float, mirrored: bool) -> None:
    image = Image.new("RGB", (4, 4), "black")
    image.paste((255, 255, 255), (0, 0, 2, 4))
    for name in "ab":
        image.save(tmp_path / f"{name}.png")
    data = PictureDataModule(str(tmp_path), prompt="p", size=4, horizontal_flip=flip, val_fraction=0.5)
    data.setup("fit")
    train, val = data.splits["train"][0]["pixel_values"], data.splits["val"][0]["pixel_values"]
    assert bool(train[0, 0, 3] > 0) is mirrored
    assert val[0, 0, 0] > 0


def test_a_data_set_on_disk_is_read_like_a_folder(tmp_path: Path) -> None:
    import datasets

    picture(tmp_path / "a.png")
    rows = {"picture": [str(tmp_path / "a.png")] * 2, "text": ["one", None]}
    table = datasets.Dataset.from_dict(rows).cast_column("picture", datasets.Image())
    table.save_to_disk(str(tmp_path / "set"))
    options: dict[str, Any] = {"image_column": "picture", "prompt_column": "text", "size": 4}
    assert prompts_of(PictureDataModule(str(tmp_path / "set"), prompt="all", **options)) == ["one", "all"]
    with pytest.raises(ValueError, match="set: row 1 has no prompt"):
        PictureDataModule(str(tmp_path / "set"), **options).setup("fit")
    with pytest.raises(ValueError, match="no column 'image' among"):
        PictureDataModule(str(tmp_path / "set"), prompt="all").setup("fit")


def test_a_broken_picture_is_named_and_left_out(folder: Path) -> None:
    (folder / "c.webp").write_bytes(b"no picture")
    with pytest.warns(UserWarning, match=r"1 of 3 pictures cannot be read and are left out: data/c\.webp"):
        assert len(prompts_of(PictureDataModule(str(folder), prompt="p", size=4))) == 2


@pytest.mark.parametrize(
    ("break_it", "error", "message"),
    [
        (lambda f: None, ValueError, r"c\.webp: has no prompt; add a row for it to metadata\.jsonl, a c\.txt, or"),
        (lambda f: lines(f / "metadata.jsonl", {"file_name": "z.png", "prompt": "z"}), ValueError, "prompt"),
        (lambda f: lines(f / "metadata.jsonl", {"file_name": "a.png"}), ValueError, "line 1: needs a file_name and a"),
        (lambda f: (f / "metadata.jsonl").write_text("{]"), ValueError, "line 1: is no JSON"),
        (lambda f: (f / "metadata.jsonl").write_text("[]"), ValueError, "line 1: is no JSON object"),
    ],
)
def test_what_is_missing_is_named_in_one_line(
    folder: Path, break_it: Any, error: type[Exception], message: str
) -> None:
    break_it(folder)
    with pytest.raises(error, match=message) as raised:
        PictureDataModule(str(folder), size=4).setup("fit")
    assert "\n" not in str(raised.value)


def test_a_row_without_picture_and_a_folder_without_pictures_are_refused(folder: Path, tmp_path: Path) -> None:
    lines(folder / "metadata.jsonl", {"file_name": "z.png", "prompt": "z"})
    with pytest.raises(ValueError, match=r"metadata\.jsonl: z\.png is no picture there"):
        PictureDataModule(str(folder), prompt="p", size=4).setup("fit")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty: no picture that can be read"):
        PictureDataModule(str(tmp_path / "empty"), size=4).setup("fit")


@pytest.mark.parametrize(
    ("make", "arguments", "message"),
    [
        (PictureDataModule, {"size": 0}, "size=0"),
        (PictureDataModule, {"val_fraction": 1.0}, r"val_fraction=1\.0"),
        (PictureDataModule, {"horizontal_flip": 2.0}, r"horizontal_flip=2\.0"),
        (DreamBoothDataModule, {"class_data": "x"}, "class_data=x, class_prompt=None"),
        (DreamBoothDataModule, {"class_prompt": "x"}, "class_data=None, class_prompt=x"),
        (DreamBoothDataModule, {"class_data": "x", "class_prompt": "x", "class_pictures": 0}, "class_pictures=0"),
    ],
)
def test_impossible_arguments_are_refused(make: Any, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(".", **arguments)


def test_prompts_to_sample_have_seeds_and_labels(tmp_path: Path) -> None:
    rows = [{"prompt": "a cat", "shape": "cat"}, {"prompt": "a dog", "shape": "dog", "seed": 7}]
    path = str(lines(tmp_path / "p.jsonl", *rows))
    assert read_prompts(path) == [
        {"prompt": "a cat", "seed": 0, "labels": {"shape": "cat"}},
        {"prompt": "a dog", "seed": 7, "labels": {"shape": "dog"}},
    ]
    picture(tmp_path / "data" / "a.png")
    data = PictureDataModule(str(tmp_path / "data"), prompt="p", size=4, test_prompts={"cats": path}, batch_size=2)
    data.setup("test")
    assert data.test_names == ["cats"]
    ((batch,),) = data.test_dataloader()
    assert (batch["prompt"], batch["seed"].tolist()) == (["a cat", "a dog"], [0, 7])
    assert batch["labels"] == {"shape": ["cat", "dog"]}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "is empty"),
        ([{"shape": "cat"}], "line 1: needs a prompt"),
        ([{"prompt": "a", "seed": "x"}], "line 1: needs a prompt, which is text, and a seed"),
        ([{"prompt": "a", "shape": "cat"}, {"prompt": "b"}], r"line 2: has the labels \[\], line 1 \['shape'\]"),
    ],
)
def test_prompts_that_are_wrong_are_named(tmp_path: Path, rows: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_prompts(str(lines(tmp_path / "p.jsonl", *rows)))
