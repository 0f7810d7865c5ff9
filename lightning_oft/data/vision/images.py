"""ImageDataModule: a folder of images, a class per subfolder, or a data set with an image column."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch.utils.data import Dataset

from lightning_oft.data.vision.loading import Batch, SplitDataModule, WorkerGenerator
from lightning_oft.data.vision.pixels import Augmentation, PixelFormat, pixel_format, read_configs, to_tensor
from lightning_oft.data.vision.sources import Sample, Source, drop_unreadable, find_images, is_readable, require
from lightning_oft.data.vision.splits import stratified_split


class ImageDataModule(SplitDataModule):
    """Labelled images from a folder or a data set.

    Batches are {"pixel_values": (B, C, H, W) float32, "labels": (B,) int64}. The splits are those that exist (folders
    or tables named train, val, test and test_<name>; each of the latter is a test set of its own); what is missing of
    val and test is taken out of train, the same share of every class. Images that cannot be read are counted, named in
    one warning and left out.

    Args:
        data: Folder with a subfolder of images per class, or with train/val/test folders of those; or a data set: a
            folder written by save_to_disk, or a hub id.
        pretrained: The model the images are for: image size, normalisation and channels are read from its
            preprocessor_config.json and config.json. Without it: 224 pixels, RGB, mean and std 0.5.
        image_size: Side of the square image in pixels, instead of the model's.
        channels: 1 for grayscale or 3 for RGB, instead of the model's.
        batch_size: Images in a batch, on each device.
        val_fraction: Share of the training images to validate on, where there is no validation split.
        test_fraction: Share of the training images to test on, where there is no test split.
        seed: Decides the splits, the order of the batches and the augmentation.
        horizontal_flip: Probability of mirroring a training image; 0 where left and right matter.
        min_crop: Least share of a training image's area that a random crop keeps; 1 turns random crops off.
        color_jitter: Largest relative change of a training image's brightness, contrast and saturation.
        image_column: Column of a data set that holds the images.
        label_column: Column of a data set that holds the labels.
        verify: How every image is checked once before the first epoch: "decode" also finds files cut short and costs
            a few milliseconds an image; "header" is for very large sets, where a file that fails later is left out
            of its batch, with a warning.
        num_workers: Processes that decode images.
        pin_memory: Page-locked batches, for faster copies to a GPU.
        persistent_workers: Keep those processes from epoch to epoch.

    Raises:
        ValueError: When a number is out of its range; on setup, when there are fewer than two classes, no images or
            no readable ones.
        OSError: On setup, when there is nothing at `data` or `pretrained`.
    """

    def __init__(
        self,
        data: str,
        pretrained: str | None = None,
        image_size: int | None = None,
        channels: Literal[1, 3] | None = None,
        batch_size: int = 32,
        val_fraction: float = 0.1,
        test_fraction: float = 0.1,
        seed: int = 0,
        horizontal_flip: float = 0.5,
        min_crop: float = 0.6,
        color_jitter: float = 0.0,
        image_column: str = "image",
        label_column: str = "label",
        verify: Literal["decode", "header"] = "decode",
        num_workers: int = 0,
        pin_memory: bool = False,
        persistent_workers: bool = True,
    ) -> None:
        super().__init__(batch_size, num_workers, pin_memory, persistent_workers, seed)
        stratified_split([], [], (test_fraction, val_fraction))  # says now what is wrong with the fractions
        self.data = data
        self.pretrained = pretrained
        self.image_size = image_size
        self.channels = channels
        self.val_fraction = val_fraction
        self.test_fraction = test_fraction
        self.augmentation = Augmentation(horizontal_flip, min_crop, color_jitter)
        self.columns = (image_column, label_column)
        self.verify = verify

    def setup(self, stage: str) -> None:
        """Find, check and split the images; once, whatever is run afterwards."""
        if self.splits:
            return
        form = pixel_format(self.pretrained, self.image_size, self.channels)
        source = drop_unreadable(find_images(self.data, *self.columns), decode=self.verify == "decode")
        source = self._split(self._in_model_order(source))
        self.class_names = source.classes
        self.splits = {
            role: ImageSamples(samples, form, self.augmentation if role == "train" else None, self.seed)
            for role, samples in source.splits.items()
        }
        sizes = ", ".join(f"{role} {len(samples)}" for role, samples in source.splits.items())
        rank_zero_info(f"{self.data}: {len(source.classes)} classes; {sizes} images")

    def _split(self, source: Source) -> Source:
        """Take what is missing of val and test out of train."""
        train = source.splits["train"]
        has_test = any(role.startswith("test") for role in source.splits)
        test, val, rest = stratified_split(
            [sample.name for sample in train],
            [sample.label for sample in train],
            (0.0 if has_test else self.test_fraction, 0.0 if "val" in source.splits else self.val_fraction),
            self.seed,
        )
        carved = {"train": rest, "val": val, "test": test}
        splits = {role: [train[i] for i in indices] for role, indices in carved.items() if indices}
        found = {role: samples for role, samples in source.splits.items() if role != "train"}
        return Source(source.classes, splits | found)

    def _in_model_order(self, source: Source) -> Source:
        """Where the model already names exactly these classes, number them as the model does."""
        label2id = {} if self.pretrained is None else read_configs(self.pretrained)[1].get("label2id") or {}
        if set(label2id) != set(source.classes) or sorted(label2id.values()) != list(range(len(label2id))):
            return source
        new_label = [label2id[name] for name in source.classes]
        splits = {
            role: [Sample(s.name, new_label[s.label], s.path, s.rows, s.row, s.column) for s in samples]
            for role, samples in source.splits.items()
        }
        return Source(sorted(label2id, key=label2id.__getitem__), splits)


@dataclass(eq=False)
class ImageSamples(Dataset[Batch]):
    """Samples, decoded when asked for. An image that cannot be read is None, warned of; the collation leaves it out."""

    samples: Sequence[Sample]
    form: PixelFormat
    augmentation: Augmentation | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        """A generator for the process that decodes."""
        self._random = WorkerGenerator(self.seed)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Batch | None:  # type: ignore[override]
        sample = self.samples[index]
        try:
            with sample.open() as image:
                # Upright: cameras store how they were held beside the pixels.
                require("PIL.ImageOps", "pillow").exif_transpose(image, in_place=True)
                if self.augmentation is None:
                    pixels_chw = to_tensor(image, self.form)
                else:
                    pixels_chw = self.augmentation(image, self.form, self._random.get())
        except Exception:
            if is_readable(sample):
                raise
            rank_zero_warn(f"{sample.name}: cannot be read and is left out of its batch")
            return None
        return {"pixel_values": self.form.normalize(pixels_chw), "labels": torch.tensor(sample.label)}
