"""DigitsDataModule: real handwritten digits, moved to a domain the shipped base model has never seen."""

from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import interpolate
from torch.utils.data import Dataset

from lightning_oft.data.vision.loading import Batch, SplitDataModule
from lightning_oft.data.vision.pixels import PixelFormat, pixel_format
from lightning_oft.data.vision.sources import require
from lightning_oft.data.vision.splits import stratified_split

HELD_OUT = 0.2
"""Share of the digits that neither pre-training nor adaptation ever sees."""
DIGITS_FORMAT = PixelFormat(8, 8, 1, (0.5,), (0.5,))


class DigitsDataModule(SplitDataModule):
    """scikit-learn's 1,797 scanned digits (8x8 pixels, 16 grey levels) in a new domain: turned and inverted.

    Trains and validates in the new domain on the digits that the base model was pre-trained on in the old one, and
    tests on digits held out from both: test set "new" shows them in the new domain, "original" as they were scanned.
    Batches are {"pixel_values": (B, C, H, W) float32, "labels": (B,) int64}.

    Args:
        rotation: Degrees the digits are turned, counterclockwise: 0, 90, 180 or 270.
        invert: Dark on light becomes light on dark.
        pretrained: Take image size, channels and normalisation from this model. Without it: 8 pixels, grayscale,
            mean and std 0.5, which is what the shipped base model takes.
        batch_size: Digits in a batch.
        val_fraction: Share of the digits not held out to validate on.
        seed: Decides the validation split and the order of the batches. The held-out digits are always the same.
        num_workers: Loader processes; the digits are in memory, so none are needed.
        pin_memory: Page-locked batches, for faster copies to a GPU.

    Raises:
        ValueError: When a number is out of its range.
        ModuleNotFoundError: On setup, when scikit-learn is not installed.
    """

    def __init__(
        self,
        rotation: Literal[0, 90, 180, 270] = 90,
        invert: bool = True,
        pretrained: str | None = None,
        batch_size: int = 64,
        val_fraction: float = 0.1,
        seed: int = 0,
        num_workers: int = 0,
        pin_memory: bool = False,
    ) -> None:
        super().__init__(batch_size, num_workers, pin_memory, num_workers > 0, seed)
        if rotation not in (0, 90, 180, 270):
            raise ValueError(f"rotation={rotation}: pixels stay pixels only at 0, 90, 180 and 270 degrees")
        stratified_split([], [], (val_fraction,))
        self.rotation = rotation
        self.invert = invert
        self.pretrained = pretrained
        self.val_fraction = val_fraction

    def setup(self, stage: str) -> None:
        """Read, turn, invert and split the digits; once."""
        if self.splits:
            return
        form = DIGITS_FORMAT if self.pretrained is None else pixel_format(self.pretrained)
        (pool, labels), (held_out, held_out_labels) = load_digits()
        names = [str(i) for i in range(len(labels))]
        val, train = (
            torch.tensor(i) for i in stratified_split(names, labels.tolist(), (self.val_fraction,), self.seed)
        )
        new = new_domain(pool, self.rotation, self.invert)
        self.splits = {"train": Digits(new[train], labels[train], form)}
        if len(val):
            self.splits["val"] = Digits(new[val], labels[val], form)
        self.splits["new"] = Digits(new_domain(held_out, self.rotation, self.invert), held_out_labels, form)
        self.splits["original"] = Digits(held_out, held_out_labels, form)
        self.class_names = [str(digit) for digit in range(10)]


def load_digits() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """The digits to train on and the held-out ones, which are the same for everybody.

    Returns:
        Twice (images (N, 1, 8, 8) float32 in [0, 1], labels (N,) int64): 1,438 and 359 digits.

    Raises:
        ModuleNotFoundError: When scikit-learn is not installed; the line names the extra.
    """
    found = require("sklearn.datasets", "scikit-learn").load_digits()
    images = torch.tensor(found.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(found.target, dtype=torch.int64)
    names = [str(i) for i in range(len(labels))]
    held_out, pool = stratified_split(names, labels.tolist(), (HELD_OUT,))
    return (images[pool], labels[pool]), (images[held_out], labels[held_out])


def new_domain(images: Tensor, rotation: int, invert: bool) -> Tensor:
    """Turn images counterclockwise by a multiple of 90 degrees and invert them. (N, C, H, W) in [0, 1] -> the same."""
    turned = torch.rot90(images, rotation // 90, (-2, -1))
    return 1 - turned if invert else turned


class Digits(Dataset[Batch]):
    """Digits in memory. images: (N, 1, 8, 8) float32 in [0, 1]; labels: (N,) int64; form: what the model expects."""

    def __init__(self, images: Tensor, labels: Tensor, form: PixelFormat) -> None:
        self.images = images
        self.labels = labels
        self.form = form

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Batch:
        return {"pixel_values": fit_to(self.images[index], self.form), "labels": self.labels[index]}


def fit_to(image: Tensor, form: PixelFormat) -> Tensor:
    """Resize, repeat channels and normalise. (..., 1, 8, 8) in [0, 1] -> (..., c, height, width) float32."""
    if image.shape[-2:] != (form.height, form.width):
        images = image.reshape(-1, *image.shape[-3:])  # interpolate wants a batch
        size = (form.height, form.width)
        image = interpolate(images, size, mode="bilinear", antialias=True).view(*image.shape[:-2], *size)
    return form.normalize(image.expand(*image.shape[:-3], form.channels, -1, -1))
