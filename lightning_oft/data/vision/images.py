"""ImageDataModule: a folder of images, a class per subfolder, or a data set with an image column."""

from dataclasses import replace
from typing import Literal

from lightning.pytorch.utilities import rank_zero_info

from lightning_oft.data.base import SplitDataModule
from lightning_oft.data.vision.pixels import ImageTransform, image_transform, model_files
from lightning_oft.data.vision.sources import drop_unreadable, load_images, split_train


class ImageDataModule(SplitDataModule):
    """Labelled images from a folder or a data set.

    Batches are {"pixel_values": (B, C, H, W) float32, "labels": (B,) int64}. The splits are those that exist (folders
    or tables named train, val, test and test_<name>; each of the latter is a test set of its own); what is missing of
    val and test is taken out of train, the same share of every class. Images that cannot be read are counted, named in
    one warning and left out.

    Args:
        data: Folder with a subfolder of images per class, or with train/val/test folders of those; or a data set: a
            folder written by save_to_disk, or a hub id.
        pretrained: The model the images are for: its image processor makes the pixels, its config has the number of
            channels and the order of the classes. Without it: 224 pixels, RGB, mean and std 0.5.
        image_size: Side of the square image in pixels, instead of the model's.
        channels: 1 for grayscale or 3 for RGB, instead of the model's.
        batch_size: Images in a batch, on each device.
        val_fraction: Share of the training images to validate on, where there is no validation split.
        test_fraction: Share of the training images to test on, where there is no test split.
        seed: Decides the splits and the order of the batches; seed_everything decides the augmentation.
        horizontal_flip: Probability of mirroring a training image; 0 where left and right matter.
        min_crop: Least share of a training image's area that a random crop keeps; 1 turns random crops off.
        image_column: Column of a data set that holds the images.
        label_column: Column of a data set that holds the labels.
        verify: Decode every image once before the first epoch and leave out those that cannot be read; false is for
            very large sets, where one that fails later is left out of its batch, with a warning.
        num_workers: Processes that decode images.
        pin_memory: Page-locked batches, for faster copies to a GPU.
        persistent_workers: Keep those processes from epoch to epoch.

    Raises:
        ValueError: When a number is out of its range; on setup, when there are fewer than two classes, no images or
            no readable ones.
        OSError: On setup, when there is nothing at `data` or `pretrained`.
    """

    columns = ("pixel_values", "labels")
    cache_arguments = (
        "data",
        "pretrained",
        "image_size",
        "channels",
        "fractions",
        "seed",
        "image_column",
        "label_column",
    )

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
        image_column: str = "image",
        label_column: str = "label",
        verify: bool = True,
        num_workers: int = 0,
        pin_memory: bool = False,
        persistent_workers: bool = True,
    ) -> None:
        super().__init__(batch_size, num_workers, pin_memory, persistent_workers, seed)
        if min(val_fraction, test_fraction) < 0 or val_fraction + test_fraction >= 1:
            raise ValueError(
                f"val_fraction={val_fraction}, test_fraction={test_fraction}: must lie in [0, 1) and leave a training set"
            )
        self.data = data
        self.pretrained = pretrained
        self.image_size = image_size
        self.channels = channels
        self.fractions = {"test": test_fraction, "val": val_fraction}
        self.augmentation = ImageTransform(horizontal_flip=horizontal_flip, min_crop=min_crop)
        self.image_column, self.label_column = image_column, label_column
        self.verify = verify

    def setup(self, stage: str) -> None:
        """Find, check and split the images; once, whatever is run afterwards."""
        if self.splits:
            return
        config, processor = model_files(self.pretrained)
        plain = image_transform(config, processor, self.image_size, self.channels)
        tables = load_images(self.data, self.image_column, self.label_column, config.label2id)
        tables = drop_unreadable(tables) if self.verify else tables
        tables = split_train(tables, self.fractions, self.seed)
        augmented = replace(self.augmentation, processor=plain.processor, channels=plain.channels)
        self.processor = plain.processor
        self.class_names = list(tables["train"].features["label"].names)
        self.splits = {
            split: table.with_transform(augmented if split == "train" else plain) for split, table in tables.items()
        }
        sizes = ", ".join(f"{split} {len(table)}" for split, table in tables.items())
        rank_zero_info(f"{self.data}: {len(self.class_names)} classes; {sizes} images")
