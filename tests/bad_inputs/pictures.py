"""Wrong pictures and prompts, and losses that are none."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from bad_inputs.table import ROOT, Bench, Mistake
from lightning.pytorch import Trainer
from PIL import Image

from lightning_oft.data import ControlDataModule, DreamBoothDataModule, PictureDataModule
from lightning_oft.tasks import ControlledTextToImage, TextToImage

PIPELINE = str(ROOT / "examples" / "bases" / "drawn-sd")
Make = Callable[[Bench], Any]


def _folder(bench: Bench, prompt: str = "a red circle") -> Path:
    """Two pictures, with this prompt for the second."""
    folder = bench.directory / "pictures"
    folder.mkdir()
    for name in ("a", "b"):
        Image.new("RGB", (32, 32)).save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text(prompt if name == "b" else "a blue star")
    return folder


def _read(bench: Bench, change: Callable[[Path], Any], **options: Any) -> None:
    folder = _folder(bench)
    change(folder)
    warnings.filterwarnings("error", message=".* cannot be read")
    PictureDataModule(str(folder), size=32, **options).setup("fit")


def _table(folder: Path) -> None:
    import datasets

    datasets.disable_progress_bars()
    datasets.Dataset.from_dict({"picture": ["a.png"], "prompt": ["a"]}).save_to_disk(str(folder))


def _emptied(folder: Path) -> None:
    for file in folder.iterdir():
        file.unlink()


def _fit(bench: Bench, prompt: str = "a red circle", size: int = 32, lr: float = 0.0) -> None:
    """A fit of the shipped pipeline on the folder."""
    task = TextToImage(PIPELINE, optimizer=partial(torch.optim.SGD, lr=lr))
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    warnings.filterwarnings("error", message="prompt '")
    trainer: Any = Trainer(accelerator="cpu", max_epochs=2, **quiet)  # type: ignore[arg-type]
    torch.manual_seed(0)
    trainer.fit(
        task if lr else bench.watch(task), PictureDataModule(str(_folder(bench, prompt)), size=size, batch_size=2)
    )


def _controls(bench: Bench, **row: str) -> None:
    folder = _folder(bench)
    (folder / "metadata.jsonl").write_text(json.dumps({"file_name": "a.png", "prompt": "a", **row}))
    warnings.filterwarnings("error", message=".* cannot be read")
    ControlDataModule(str(folder), size=32).setup("fit")


def _controlled(bench: Bench) -> None:
    controls = torch.zeros(1, 3, 16, 32)
    bench.watch(ControlledTextToImage(PIPELINE, sampling={"num_inference_steps": 1})).sample(["a"], [0], controls)


def _evaluate(bench: Bench, name: str, base: str = "drawn-judges/shape") -> None:
    (bench.directory / "network").symlink_to(ROOT / "examples" / "bases" / base)
    TextToImage(PIPELINE, evaluators={name: str(bench.directory / "network")})


def _subject(bench: Bench) -> None:
    DreamBoothDataModule(str(_folder(bench)), size=32, subject="sks").setup("fit")


def _data(
    name: str, make: Make, error: type[Exception], where: str, what: str, remedy: str, varies: bool = False
) -> Mistake:
    return Mistake(name, "picture", make, error, where, what, remedy, varies)


PICTURES = [
    _data("a file that is no picture", partial(_read, change=lambda place: (place / "b.png").write_bytes(b"no")), UserWarning,
        "pictures/b.png", "1 of 2 pictures cannot be read", "are left out"),
    _data("a picture without a prompt", partial(_read, change=lambda place: (place / "b.txt").unlink()), ValueError,
        "pictures/b.png", "has no prompt", "add a row for it to metadata.jsonl, a b.txt, or give one for all"),
    _data("a prompt without a picture", partial(_read, change=lambda place: (place / "metadata.jsonl").write_text(
        json.dumps({"file_name": "c.png", "prompt": "c"}))), ValueError, "metadata.jsonl", "c.png is no picture there", "correct its file_name"),
    _data("a data set without such a column", partial(_read, change=_table), ValueError, "pictures", "no column 'image' among ['picture', 'prompt']",
        "set image_column, prompt_column"),
    _data("an empty folder", partial(_read, change=_emptied), ValueError, "pictures", "no picture that can be read", "give a folder of png, jpg or webp files"),
    _data("a size that the autoencoder does not take", partial(_fit, size=30), ValueError, "pixel_values",
        "pictures of 30 x 30 pixels; the pipeline takes multiples of 4", "set the size of the data to 28 or 32"),
    _data("a prompt longer than the tokenizer reads", partial(_fit, prompt="a red circle on the beach " * 20), UserWarning,
        "prompt 'a red circle", "tokens, and the pipeline reads", "shorten it"),
    _data("a picture without a control image", _controls, ValueError, "metadata.jsonl, line 1", "has no control", "which is text"),
    _data("a control image that is not there", partial(_controls, control="edges/a.png"), ValueError, "metadata.jsonl, line 1",
        "its control, a.png, is not there", "correct the path"),
    _data("a control image that is no picture", partial(_controls, control="a.txt"), UserWarning, "pictures/a.txt", "1 of 1 pictures cannot be read",
        "are left out"),
    _data("a control image of another size than the picture", _controlled, ValueError, "control", "is of 16 x 32 pixels and the picture of 32 x 32",
        "make them alike"),
    _data("a loss that is no number", partial(_fit, prompt="a blue star", lr=1e30), ValueError, "step 1, prompt 'a blue star'", "the loss is nan", "lower the learning rate"),
    _data("a subject that no prompt names", _subject, ValueError, "subject='sks'", "is in no prompt of the pictures, such as 'a blue star'",
        "give its word there"),
    _data("an evaluator that is none", partial(_evaluate, name="lpips"), ValueError, "evaluators", "'lpips' is no evaluator", "there are dino, clip, fid"),
    _data("an evaluator that reads no text", partial(_evaluate, name="clip"), OSError, "network", "a ResNetModel embeds no text", "give a CLIP"),
    _data("an evaluator without its image processor", partial(_evaluate, name="dino", base="drawn-sd/text_encoder"), OSError,
        "network", "no image processor", "save one there", varies=True),
]  # fmt: skip
