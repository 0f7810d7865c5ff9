"""PictureDataModule: pictures with prompts, as batches of pixels and text."""

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from typing_extensions import override

from lightning_oft.data.base import ResumableLoader, SplitDataModule, require
from lightning_oft.data.diffusion.shapes import SameShape, nearest_sizes
from lightning_oft.data.diffusion.sources import Captioned, find_pictures, read_prompts
from lightning_oft.data.vision.pixels import decode


class Pictures(Dataset[Any]):
    """Pictures as pixels: {"pixel_values": (3, H, W) float32 in [-1, 1], "prompt": text}, and where there are control
    images "control", (3, H, W) float32 in [0, 1].

    The middle of each, mirrored with the probability `horizontal_flip`, drawn from torch's global generator. H and W are
    `size`; with a `side_step` those of `sizes`, so that little is cut off.
    """

    def __init__(
        self, found: Sequence[Captioned], size: int, horizontal_flip: float = 0.0, side_step: int | None = None
    ) -> None:
        self.found, self.size, self.horizontal_flip = found, size, horizontal_flip
        self.sizes = [(size, size)] * len(found) if side_step is None else nearest_sizes(found, size, side_step)
        """Height and width of each."""

    def __len__(self) -> int:
        return len(self.found)

    def __getitem__(self, index: int) -> dict[str, Any]:
        cell, prompt, control = self.found[index]
        pixels = {"pixel_values": to_pixels(decode(cell), self.sizes[index])}
        if control is not None:
            pixels["control"] = to_control(control, self.sizes[index])
        flips = bool(self.horizontal_flip) and bool(torch.rand(()) < self.horizontal_flip)
        return {**({name: one.flip(-1) for name, one in pixels.items()} if flips else pixels), "prompt": prompt}


def to_pixels(image: Any, size: int | tuple[int, int]) -> Tensor:
    """The middle of a Pillow image, of a side or of a height and width -> (3, H, W) float32 in [-1, 1]."""
    height, width = (size, size) if isinstance(size, int) else size
    operations, resampling = require("PIL.ImageOps", "pillow"), require("PIL.Image", "pillow").Resampling
    middle = operations.fit(image.convert("RGB"), (width, height), method=resampling.LANCZOS)
    levels = torch.frombuffer(bytearray(middle.tobytes()), dtype=torch.uint8)
    return levels.view(height, width, 3).permute(2, 0, 1).float() / 127.5 - 1


def to_control(cell: Any, size: int | tuple[int, int]) -> Tensor:
    """The middle of an undecoded control image -> (3, H, W) float32 in [0, 1]."""
    return (to_pixels(decode(cell), size) + 1) / 2


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
        side_step: Keep the shapes of pictures, up to 2 to 1: each gets sides that are multiples of this, such as 64, of
            size x size pixels in all, and a batch holds pictures of one shape, of which some are repeated to fill it.
        batch_size: Pictures in a batch, on each device.
        num_workers: Processes that decode pictures.
        pin_memory: Page-locked batches, for faster copies to a GPU.
        persistent_workers: Keep those processes from epoch to epoch.
        seed: Decides the validation split and the order of the batches.

    Raises:
        ValueError: When a number is out of its range; on setup, when a picture has no prompt, or none can be read.
        OSError: On setup, when there is nothing at `data`, or no such file of prompts.
    """

    columns: ClassVar[tuple[str, ...]] = ("pixel_values", "prompt")
    cache_arguments: ClassVar[tuple[str, ...]] = (
        "data",
        "prompt",
        "size",
        "side_step",
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
        side_step: int | None = None,
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
        if side_step is not None and not 1 <= side_step <= size // 2:
            raise ValueError(
                f"side_step={side_step}: must lie between 1 and half of the size, {size // 2}; 64 is usual"
            )
        self.side_step = side_step
        self.data, self.prompt, self.size, self.horizontal_flip = data, prompt, size, horizontal_flip
        self.val_fraction, self.test_prompts = val_fraction, test_prompts or {}
        self.image_column, self.prompt_column = image_column, prompt_column
        self.learned: list[Captioned] = []

    @override
    def setup(self, stage: str) -> None:
        """Find pictures and prompts, once."""
        if self.splits:
            return
        tests = {name: self.asked(path) for name, path in self.test_prompts.items()}
        self.learned = self.find(self.data, self.prompt)
        self.splits = {**self.pictures(self.learned), **tests}

    def find(self, data: str, prompt: str | None) -> list[Captioned]:
        """Pictures and prompts of a folder or a data set; raises as `find_pictures`."""
        return find_pictures(data, prompt, self.image_column, self.prompt_column)

    def asked(self, path: str) -> Any:
        """A test set, of a file of prompts."""
        return read_prompts(path)

    def shown(self, count: int) -> list[Any]:
        """The first pictures of the training set as Pillow images, for a person to see beside the samples."""
        return list(islice(self.real_pictures(), count))

    def real_pictures(self) -> Iterator[Any]:
        """All pictures of the training set, likewise; a test compares samples with them."""
        for one in self.learned:
            yield require("PIL.ImageOps", "pillow").fit(decode(one.cell).convert("RGB"), (self.size,) * 2)

    def pictures(self, found: list[Captioned]) -> dict[str, Dataset[Any]]:
        """The splits "train" and, where some are set aside, "val"."""
        order = torch.randperm(len(found), generator=torch.Generator().manual_seed(self.seed)).tolist()
        count = min(len(found) - 1, round(self.val_fraction * len(found)))
        parts = {"train": sorted(order[count:]), "val": sorted(order[:count])}
        flips = {"train": self.horizontal_flip, "val": 0.0}
        return {
            name: Pictures([found[i] for i in rows], self.size, flips[name], self.side_step)
            for name, rows in parts.items()
            if rows
        }

    @override
    def _loader(self, split: str, shuffle: bool = False) -> DataLoader[Any]:
        pictures = self.splits[split]
        if self.side_step is None or not isinstance(pictures, Pictures):
            return super()._loader(split, shuffle)
        processes = (1, 0) if self.trainer is None else (self.trainer.world_size, self.trainer.global_rank)
        sampler = SameShape(pictures.sizes, self.batch_size, *processes, shuffle=shuffle, seed=self.seed)
        loader = ResumableLoader if shuffle else DataLoader
        options = {"generator": torch.Generator().manual_seed(self.seed), "collate_fn": self.collate_fn, **self.workers}
        return loader(pictures, self.batch_size, sampler=sampler, **options)
