"""Pictures to look at: on one sheet, and to the loggers that take some."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from lightning_oft.callback.pictures import LEAST, MARGIN, MOST, log_pictures, sheet, stacked

RED, BLUE = (255, 0, 0), (0, 0, 255)


def picture(colour: tuple[int, int, int], side: int = 8) -> Image.Image:
    return Image.new("RGB", (side, side), colour)


@pytest.mark.parametrize(("side", "shown"), [(8, LEAST), (100, 100), (1024, MOST)])
def test_pictures_stand_in_rows_and_are_neither_tiny_nor_huge(side: int, shown: int) -> None:
    made = sheet({"before": [picture(RED, side)] * 3, "after": [picture(BLUE, side)] * 3})
    assert made.getpixel((made.width - MARGIN - shown // 2, MARGIN + shown // 2)) == RED
    assert made.getpixel((made.width - MARGIN - shown // 2, made.height - MARGIN - shown // 2)) == BLUE
    assert made.height == MARGIN + 2 * (shown + MARGIN)
    captioned = sheet({"": [picture(RED, side)]}, ["a caption that is too long for a single line of its column" * 2])
    assert captioned.height > MARGIN + shown + MARGIN
    assert stacked([made, captioned]).size == (max(made.width, captioned.width), made.height + captioned.height)


class Taker:
    """A logger, or what one logs with, that keeps what it is given under the name of the method."""

    def __init__(self, method: str) -> None:
        self.given: list[Any] = []
        setattr(self, method, lambda *args, **options: self.given.append((args, options)))


@pytest.mark.parametrize("kind", ["Weights & Biases", "TensorBoard", "another", "none"])
def test_pictures_go_to_the_loggers_that_take_some_else_to_a_file(kind: str, tmp_path: Path) -> None:
    taker = Taker("log_image" if kind == "Weights & Biases" else "add_image")
    loggers: dict[str, list[Any]] = {
        "Weights & Biases": [taker],
        "TensorBoard": [SimpleNamespace(experiment=taker)],
        "another": [SimpleNamespace(experiment=object())],
        "none": [],
    }
    root = {"log_dir": str(tmp_path), "default_root_dir": "elsewhere"}
    log_pictures(SimpleNamespace(loggers=loggers[kind], global_step=7, **root), {"a cat": picture(RED)})
    files = [file.relative_to(tmp_path).as_posix() for file in tmp_path.rglob("*.png")]
    if kind in ("another", "none"):
        assert files == ["samples/step-000007.png"]
        return
    assert files == []
    ((args, options),) = taker.given
    assert args[0] == "samples"
    if kind == "Weights & Biases":
        assert (len(args[1]), options) == (1, {"step": 7, "caption": ["a cat"]})
    else:
        assert args[1].shape[2] == 3
        assert (args[2], options) == (7, {"dataformats": "HWC"})
