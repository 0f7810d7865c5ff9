"""Pictures to look at: samples side by side on one sheet, given to the loggers or written as PNG."""

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

LEAST, MOST, MARGIN, LINE = 96, 256, 4, 11
"""In pixels: the sides that a picture has on a sheet, between pictures, of a line of text."""


def sheet(rows: Mapping[str, Sequence[Any]], captions: Sequence[str] = ()) -> Any:
    """Rows of Pillow images, by what is written before each, as one; `captions` stand above the columns."""
    from PIL import Image, ImageDraw

    side = min(MOST, max(LEAST, *(max(picture.size) for row in rows.values() for picture in row)))
    texts = [textwrap.wrap(caption, side // 6) for caption in captions]
    left = 6 * max(map(len, rows)) + 2 * MARGIN if any(rows) else MARGIN
    top, step = LINE * max(map(len, texts), default=0) + MARGIN, side + MARGIN
    size = (left + step * max(map(len, rows.values())), top + step * len(rows))
    made = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(made)
    for column, lines in enumerate(texts):
        pen.multiline_text((left + column * step, 1), "\n".join(lines), fill="black", font_size=LINE - 1, spacing=1)
    for number, (name, row) in enumerate(rows.items()):
        y = top + number * step
        pen.text((MARGIN, y + side // 2), name, fill="black", font_size=LINE - 1)
        for column, picture in enumerate(row):
            made.paste(_scaled(picture, side), (left + column * step, y))
    return made


def stacked(sheets: Sequence[Any]) -> Any:
    """Images one below the other."""
    from PIL import Image

    made = Image.new("RGB", (max(one.width for one in sheets), sum(one.height for one in sheets)), "white")
    for number, one in enumerate(sheets):
        made.paste(one, (0, sum(above.height for above in sheets[:number])))
    return made


def _scaled(picture: Any, side: int) -> Any:
    """Its longer side at most `side`; smaller ones by whole numbers, so that pixels stay pixels."""
    from PIL import Image

    longest = max(picture.size)
    if longest <= side:
        factor = side // longest
        return picture.resize(tuple(factor * one for one in picture.size), Image.Resampling.NEAREST)
    return picture.resize(tuple(max(1, one * side // longest) for one in picture.size), Image.Resampling.LANCZOS)


def log_pictures(trainer: Any, by_prompt: Mapping[str, Any]) -> None:
    """Give pictures to each logger that takes some (Weights & Biases, TensorBoard); where none does, a sheet of them
    becomes a PNG in the log directory."""
    taken = False
    for logger in trainer.loggers:
        if hasattr(logger, "log_image"):
            logger.log_image("samples", [*by_prompt.values()], step=trainer.global_step, caption=[*by_prompt])
            taken = True
        elif hasattr(logger.experiment, "add_image"):
            import numpy as np

            made = np.asarray(sheet({"": [*by_prompt.values()]}, [*by_prompt]))
            logger.experiment.add_image("samples", made, trainer.global_step, dataformats="HWC")
            taken = True
    if not taken:
        place = Path(trainer.log_dir or trainer.default_root_dir) / "samples" / f"step-{trainer.global_step:06}.png"
        write_picture(place, sheet({"": [*by_prompt.values()]}, [*by_prompt]))


def write_picture(path: Path, picture: Any) -> None:
    """Write a PNG, in a folder that is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path)
