"""Pictures with prompts and control images: where they are found, that both are cut alike, and what is said of wrong ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from lightning_oft.data import ControlDataModule

datasets = pytest.importorskip("datasets", reason="datasets is not installed: pip install 'lightning_oft[data]'")


def lines(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def half(path: Path, size: tuple[int, int] = (16, 8)) -> None:
    """Black on the left, white on the right."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.new("RGB", size)
    image.paste((255, 255, 255), (size[0] // 2, 0, *size))
    image.save(path)


def row(number: int, **changes: Any) -> dict[str, Any]:
    return {"file_name": f"{number}.png", "control": f"edges/{number}.png", "prompt": f"picture {number}", **changes}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number in range(3):
        half(tmp_path / f"{number}.png")
        half(tmp_path / "edges" / f"{number}.png", (32, 16))
    lines(tmp_path / "metadata.jsonl", *map(row, range(3)))
    return tmp_path


def made(folder: Path, **options: Any) -> ControlDataModule:
    data = ControlDataModule(str(folder), **{"size": 8, "batch_size": 3, **options})
    data.setup("fit")
    return data


@pytest.mark.parametrize("flip", [0.0, 1.0])
@pytest.mark.parametrize("side_step", [None, 2])
def test_a_control_is_cut_and_mirrored_as_its_picture(folder: Path, flip: float, side_step: int | None) -> None:
    batch = next(iter(made(folder, horizontal_flip=flip, side_step=side_step).train_dataloader()))
    assert sorted(batch["prompt"]) == ["picture 0", "picture 1", "picture 2"]
    torch.testing.assert_close(batch["control"], (batch["pixel_values"] + 1) / 2, atol=0.1, rtol=0)
    left, right = batch["control"][..., 0], batch["control"][..., -1]
    assert float((left - right).mean()) == pytest.approx(2 * flip - 1, abs=0.1)


def test_a_data_set_has_them_in_columns(folder: Path) -> None:
    files = [str(folder / f"{number}.png") for number in range(2)]
    table = datasets.Dataset.from_dict({"image": files, "edges": files, "prompt": ["a", "b"]})
    table.cast_column("image", datasets.Image()).cast_column("edges", datasets.Image()).save_to_disk(folder / "table")
    batch = next(iter(made(folder / "table", control_column="edges", batch_size=2).train_dataloader()))
    assert batch["control"].shape == (2, 3, 8, 8)
    with pytest.raises(ValueError, match=r"no column 'control' among .*; set image_column, prompt_column, control_col"):
        made(folder / "table")


def test_a_broken_one_of_either_is_named_and_left_out(folder: Path) -> None:
    (folder / "edges" / "1.png").write_bytes(b"no picture")
    (folder / "2.png").write_bytes(b"no picture")
    with pytest.warns(UserWarning, match=r"2 of 3 pictures cannot be read and are left out: edges/1\.png, .*/2\.png"):
        data = made(folder)
    assert [one["prompt"] for one in data.splits["train"]] == ["picture 0"]  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([row(0), row(1, control="edges/9.png")], r"metadata\.jsonl, line 2: its control, 9\.png, is not there"),
        ([row(0), row(1, file_name="9.png")], r"metadata\.jsonl, line 2: its file_name, 9\.png, is not there"),
        ([{"file_name": "0.png", "prompt": "a"}], r"metadata\.jsonl, line 1: has no control, which is text"),
        ([row(0, prompt="")], r"metadata\.jsonl, line 1: has no prompt, which is text"),
    ],
    ids=["control", "picture", "no_control", "no_prompt"],
)
def test_what_a_row_lacks_is_named(folder: Path, rows: Any, message: str) -> None:
    lines(folder / "metadata.jsonl", *rows)
    with pytest.raises(ValueError, match=message):
        made(folder)


def test_without_rows_nothing_is_found(tmp_path: Path) -> None:
    half(tmp_path / "0.png")
    with pytest.raises(ValueError, match=r"metadata\.jsonl: is not there; write a row for each picture"):
        made(tmp_path)


def test_prompts_to_sample_have_controls_too(folder: Path) -> None:
    asked = lines(folder / "asked.jsonl", {"prompt": "a", "control": "edges/0.png", "shape": "star"})
    data = made(folder, test_prompts={"asked": str(asked)})
    batch = next(iter(data.test_dataloader()[0]))
    assert batch["control"].shape == (1, 3, 8, 8)
    assert batch["labels"] == {"shape": ["star"]}
    for wrong, message in (
        ({"prompt": "a"}, "line 1: names no control image"),
        ({"prompt": "a", "control": "edges/7.png"}, r"line 1: its control, 7\.png, is not there"),
        ({"prompt": "a", "control": "asked.jsonl"}, r"line 1: its control, asked\.jsonl, cannot be read"),
    ):
        lines(folder / "asked.jsonl", wrong)
        with pytest.raises(ValueError, match=message):
            made(folder, test_prompts={"asked": str(asked)})
