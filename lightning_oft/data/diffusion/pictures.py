"""PictureDataModule: pictures with prompts, as batches of pixels and text."""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils.data import Dataset
from typing_extensions import override

from lightning_oft.data.base import SplitDataModule, require
from lightning_oft.data.diffusion.sources import Captioned, find_pictures, read_prompts
from lightning_oft.data.vision.pixels import decode


class Pictures(Dataset[Any]):
    """Pictures as square pixels: {"pixel_values": (3, S, S) float32 in [-1, 1], "prompt": text}.

    The middle square of each, mirrored with the probability `horizontal_flip`, drawn from torch's global generator.
    """

    def __init__(self, found: Sequence[Captioned], size: int, horizontal_flip: float = 0.0) -> None:
        self.found, self.size, self.horizontal_flip = found, size, horizontal_flip

    def __len__(self) -> int:
        return len(self.found)

    def __getitem__(self, index: int) -> dict[str, Any]:
        cell, prompt = self.found[index]
        image = decode(cell)
        pixels = to_pixels(image, self.size)
        flips = bool(self.horizontal_flip) and bool(torch.rand(()) < self.horizontal_flip)
        return {"pixel_values": pixels.flip(-1) if flips else pixels, "prompt": prompt}


def to_pixels(image: Any, size: int) -> Tensor:
    """The middle square of a Pillow image -> (3, size, size) float32 in [-1, 1]."""
    operations, resampling = require("PIL.ImageOps", "pillow"), require("PIL.Image", "pillow").Resampling
    square = operations.fit(image.convert("RGB"), (size, size), method=resampling.LANCZOS)
    levels = torch.frombuffer(bytearray(square.tobytes()), dtype=torch.uint8)
    return levels.view(size, size, 3).permute(2, 0, 1).float() / 127.5 - 1


class PictureDataModule(SplitDataModule):
    """Pictures with prompts, from a folder or a data set.

    Training batches are {"pixel_values": (B, 3, S, S) float32 in [-1, 1], "prompt": B strings}. Test sets are files of
    prompts to sample, {"prompt", "seed", "labels"}. Pictures that cannot be read are named in one warning and left out.

    Args:
        data: Folder of pictures, with their prompts in metadata.jsonl (rows of file_name and prompt) or in a text file
            beside each; or a data set: a folder written by save_to_disk, or a hub id.
        prompt: The prompt of pictures that have none of their own.
        size: Side in pixels; of each picture the middle square is taken.
        horizontal_flip: Probability of mirroring a training picture; 0 where left and right matter.
        val_fraction: Share of the pictures to validate on.
        test_prompts: By the name of a test set, a file of JSON lines: a prompt and, by what a judge reads, its class.
        image_column: Column of a data set that holds the pictures.
        prompt_column: Column of a data set, or of metadata.jsonl, that holds the prompts.
        batch_size: Pictures in a batch, on each device.
        num_workers: Processes that decode pictures.
        pin_memory: Page-locked batches, for faster copies to a GPU.
        persistent_workers: Keep those processes from epoch to epoch.
        seed: Decides the validation split and the order of the batches.

    Raises:
        ValueError: When a number is out of its range; on setup, when a picture has no prompt, or none can be read.
        OSError: On setup, when there is nothing at `data`, or no such file of prompts.
    """

    columns = ("pixel_values", "prompt")
    cache_arguments: ClassVar[tuple[str, ...]] = (
        "data",
        "prompt",
        "size",
        "val_fraction",
        "image_column",
        "prompt_column",
        "seed",
    )

    def __init__(
        self,
        data: str,
        prompt: str | None = None,
        size: int = 512,
        horizontal_flip: float = 0.0,
        val_fraction: float = 0.0,
        test_prompts: dict[str, str] | None = None,
        image_column: str = "image",
        prompt_column: str = "prompt",
        batch_size: int = 4,
        num_workers: int = 0,
        pin_memory: bool = False,
        persistent_workers: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size, num_workers, pin_memory, persistent_workers, seed)
        if not (0 <= val_fraction < 1 and 0 <= horizontal_flip <= 1 and size >= 1):
            raise ValueError(
                f"val_fraction={val_fraction}, horizontal_flip={horizontal_flip}, size={size}: must lie in [0, 1), in "
                "[0, 1] and be at least 1"
            )
        self.data, self.prompt, self.size, self.horizontal_flip = data, prompt, size, horizontal_flip
        self.val_fraction, self.test_prompts = val_fraction, test_prompts or {}
        self.image_column, self.prompt_column = image_column, prompt_column
        self.learned: list[Captioned] = []

    @override
    def setup(self, stage: str) -> None:
        """Find pictures and prompts, once."""
        if self.splits:
            return
        tests: dict[str, Any] = {name: read_prompts(path) for name, path in self.test_prompts.items()}
        self.learned = self.find(self.data, self.prompt)
        self.splits = {**self.pictures(self.learned), **tests}

    def find(self, data: str, prompt: str | None) -> list[Captioned]:
        """Pictures and prompts of a folder or a data set; raises as `find_pictures`."""
        return find_pictures(data, prompt, self.image_column, self.prompt_column)

    def shown(self, count: int) -> list[Any]:
        """The first pictures of the training set as Pillow images, for a person to see beside the samples."""
        pictures = self.learned[:count]
        return [
            require("PIL.ImageOps", "pillow").fit(decode(one.cell).convert("RGB"), (self.size,) * 2) for one in pictures
        ]

    def pictures(self, found: list[Captioned]) -> dict[str, Dataset[Any]]:
        """The splits "train" and, where some are set aside, "val"."""
        order = torch.randperm(len(found), generator=torch.Generator().manual_seed(self.seed)).tolist()
        count = min(len(found) - 1, round(self.val_fraction * len(found)))
        parts = {"train": sorted(order[count:]), "val": sorted(order[:count])}
        flips = {"train": self.horizontal_flip, "val": 0.0}
        return {
            name: Pictures([found[i] for i in rows], self.size, flips[name]) for name, rows in parts.items() if rows
        }
