"""DigitsDataModule: real handwritten digits, moved to a domain the shipped base model has never seen."""

from collections import defaultdict
from collections.abc import Sequence
from hashlib import sha256
from typing import Any, Literal

import torch

from lightning_oft.data.base import SplitDataModule, require
from lightning_oft.data.vision.pixels import image_transform, model_files

Levels = Any
"""numpy, (N, 8, 8) uint8: grey levels from 0, the background, to 16."""


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

    columns = ("pixel_values", "labels")
    cache_arguments = ("rotation", "invert", "pretrained", "val_fraction", "seed")

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
        if not 0 <= val_fraction < 1:
            raise ValueError(f"val_fraction={val_fraction}: must lie in [0, 1) to leave a training set")
        self.rotation = rotation
        self.invert = invert
        self.pretrained = pretrained
        self.val_fraction = val_fraction

    def setup(self, stage: str) -> None:
        """Read, turn, invert and split the digits; once."""
        if self.splits:
            return
        (pool, labels), (held_out, held_out_labels) = load_digits()
        val, train = stratified_split(labels, self.val_fraction, self.seed)
        new = self._examples(new_domain(pool, self.rotation, self.invert), labels)
        self.splits = {"train": [new[i] for i in train]}  # type: ignore[dict-item]
        if val:
            self.splits["val"] = [new[i] for i in val]  # type: ignore[assignment]
        self.splits["new"] = self._examples(new_domain(held_out, self.rotation, self.invert), held_out_labels)
        self.splits["original"] = self._examples(held_out, held_out_labels)
        self.class_names = [str(digit) for digit in range(10)]

    def _examples(self, levels: Levels, labels: list[int]) -> Any:
        """(N, 8, 8) levels as examples: of exact values in [-1, 1], or as 8-bit images through the model's processor."""
        if self.pretrained is None:
            pixels = (torch.from_numpy(levels.astype("float32")).unsqueeze(1) / 16 - 0.5) / 0.5
        else:
            transform = image_transform(*model_files(self.pretrained))
            grey = ((levels.astype("uint16") * 255 + 8) // 16).astype("uint8")
            pixels = torch.stack([transform.pixels(require("PIL.Image", "pillow").fromarray(image)) for image in grey])
        return [{"pixel_values": image, "labels": torch.tensor(n)} for image, n in zip(pixels, labels, strict=True)]


def load_digits() -> tuple[tuple[Levels, list[int]], tuple[Levels, list[int]]]:
    """(levels, labels) of the 1,438 digits to train on, then of the 359 held-out ones: the same for everybody.

    Raises ModuleNotFoundError, a line that names the extra, when scikit-learn is not installed.
    """
    found = require("sklearn.datasets", "scikit-learn").load_digits()
    levels, labels = found.images.astype("uint8"), found.target
    held_out, pool = stratified_split(labels.tolist(), 0.2)
    return (levels[pool], labels[pool].tolist()), (levels[held_out], labels[held_out].tolist())


def new_domain(levels: Levels, rotation: int, invert: bool) -> Levels:
    """Turn digits counterclockwise by a multiple of 90 degrees and invert them. (N, 8, 8) -> (N, 8, 8)."""
    import numpy as np

    turned = np.rot90(levels, rotation // 90, (1, 2))
    return 16 - turned if invert else turned


def stratified_split(labels: Sequence[int], fraction: float, seed: int = 0) -> tuple[list[int], list[int]]:
    """Indices of the same share of every class, and of the rest; both sorted. Every class keeps one in the rest.

    Decided by hashes of seed and index: the shipped base was pre-trained on this split, so it must never change.
    """
    members: defaultdict[int, list[int]] = defaultdict(list)
    for index, label in enumerate(labels):
        members[label].append(index)
    taken: set[int] = set()
    for indices in members.values():
        ranked = sorted(indices, key=lambda i: sha256(f"{seed}:{i}".encode()).digest())
        taken.update(ranked[: min(round(fraction * len(ranked)), len(ranked) - 1)])
    return sorted(taken), [i for i in range(len(labels)) if i not in taken]
