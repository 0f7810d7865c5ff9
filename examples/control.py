"""Outlines become pictures: a pipeline that draws what a prompt says learns to draw it along an outline.

    python examples/control.py

draws 600 pictures of the drawn world (bases/drawings.py) with the outlines of their shapes; their prompts name colour and
scene, never the shape. It teaches examples/bases/drawn-sd to follow outlines, by rotations and a light hint encoder, prints
how often classifiers read shape, colour and scene off 100 samples before and after, and draws docs/control.png.
"""

import json
import sys
import tempfile
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

from lightning.pytorch import Trainer, seed_everything
from PIL import Image, ImageChops, ImageDraw, ImageFilter
from torch.optim import AdamW
from torch.optim.lr_scheduler import CosineAnnealingLR

from lightning_oft import OFTFinetuning
from lightning_oft.callback.pictures import sheet
from lightning_oft.data import ControlDataModule
from lightning_oft.tasks import ControlledTextToImage

ROOT = Path(__file__).parents[1]
BASES = ROOT / "examples" / "bases"
sys.path.insert(0, str(BASES))
from drawings import COLOURS, SCALE, SCENES, SHAPES, SIDE, picture, prompt, shape  # noqa: E402 - found by the line above

PICTURES, STEPS, RATE = 600, 600, 0.01
TARGETS = r".*\.(to_[qkv]|to_out\.0|net\.0\.proj|net\.2|proj_in|proj_out|conv1|conv2|conv_shortcut|conv)"
SHOWN = {
    "star": "a blue on the beach", "heart": "a green at night", "cross": "a red in the snow",
    "moon": "a yellow on the sea", "ring": "a purple on white", "square": "a orange on the grass",
}  # fmt: skip


def drawn(name: str, colour: str, scene: str, seed: int) -> dict[str, Image.Image]:
    """A picture of the drawn world, and the outline of its shape, white on black."""
    mask = Image.new("RGB", (SIDE * SCALE,) * 2)

    def draw(canvas: ImageDraw.ImageDraw, rng: Random, x: float, y: float, r: float) -> None:
        state = rng.getstate()
        shape(name, COLOURS[colour])(canvas, rng, x, y, r)
        rng.setstate(state)  # turned alike
        shape(name, (255, 255, 255))(ImageDraw.Draw(mask), rng, x, y, r)

    made = picture(scene, draw, Random(seed))
    edge = ImageChops.subtract(mask, mask.filter(ImageFilter.MinFilter(9)))
    return {"picture": made, "outline": edge.resize((SIDE, SIDE), Image.Resampling.BOX)}


def write(folder: Path, count: int, start: int) -> list[dict[str, str]]:
    """Pictures and outlines into a folder; returns what is in each."""
    folder.mkdir()
    rng, rows = Random(start), []
    for number in range(start, start + count):
        name, colour, scene = (rng.choice(list(kinds)) for kinds in (SHAPES, COLOURS, SCENES))
        for kind, image in drawn(name, colour, scene, number).items():
            image.save(folder / f"{kind}-{number}.png")
        said = {"prompt": prompt(scene, colour), "control": f"outline-{number}.png"}
        rows.append({**said, "file_name": f"picture-{number}.png", "shape": name, "colour": colour, "scene": scene})
    return rows


def write_rows(path: Path, rows: list[dict[str, str]], *names: str) -> str:
    """JSON of these fields, a row a line."""
    lines = (json.dumps({name: row[name] for name in names}) + "\n" for row in rows)
    path.write_text("".join(lines), encoding="utf-8")
    return str(path)


def task(outlines: list[str]) -> ControlledTextToImage:
    """The drawn pipeline, to be looked at along these outlines."""
    return ControlledTextToImage(
        str(BASES / "drawn-sd"),
        outlines,
        prompts=list(SHOWN.values()),
        sampling={"num_inference_steps": 20, "guidance_scale": 2.5},
        judges={what: str(BASES / "drawn-judges" / what) for what in ("shape", "colour", "scene")},
        optimizer=partial(AdamW, lr=RATE),
        lr_scheduler=partial(CosineAnnealingLR, T_max=STEPS),
        lr_interval="step",
    )


def main() -> dict[str, Any]:
    """Shares of the samples that show what was asked for, before and after."""
    seed_everything(0)
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as place:
        learned, asked = Path(place, "learned"), Path(place, "asked")
        write_rows(learned / "metadata.jsonl", write(learned, PICTURES, 0), "file_name", "control", "prompt")
        tests = write(asked, 100, 10_000)
        tested = write_rows(asked / "asked.jsonl", tests, "prompt", "control", "shape", "colour", "scene")
        outlines = {name: drawn(name, "red", "white", 20_000 + n)["outline"] for n, name in enumerate(SHOWN)}
        for name, image in outlines.items():
            image.save(asked / f"{name}.png")
        model = task([str(asked / f"{name}.png") for name in SHOWN])
        data = ControlDataModule(str(learned), size=SIDE, batch_size=16, test_prompts={"asked": tested})
        oft = OFTFinetuning(module="unet", oft_block_size=8, target_modules=TARGETS, use_cayley_neumann=False)
        off: Any = dict.fromkeys(
            ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False
        )
        trainer = Trainer(accelerator="cpu", max_steps=STEPS, limit_val_batches=0, callbacks=[oft], **off)
        rows: dict[str, Any] = {"outline": list(outlines.values())}
        for when in ("before", "after"):
            if when == "after":
                trainer.fit(model, data)
            found[when] = trainer.test(model, data, verbose=False)[0]
            pairs = model.samples().values()
            rows[when] = [pair.crop((SIDE, 0, 2 * SIDE, SIDE)) for pair in pairs]
        sheet(rows, list(SHOWN.values())).save(ROOT / "docs" / "control.png")
    return found


if __name__ == "__main__":
    for when, scores in main().items():
        print(f"{when:<7}", "  ".join(f"{name.split('/')[-1]} {value:.2f}" for name, value in scores.items()))
