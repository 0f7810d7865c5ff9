"""From an image to the tensor a model takes: transformers' image processors, with a random crop and flip before them."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os.path import expanduser
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.utils.data import Dataset

from lightning_oft.data.base import Batch, require

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class ImageTransform:
    """From a Pillow image to pixel values (C, H, W) float32: random crop and flip, then the model's image processor.

    Attributes:
        processor: transformers' image processor of the model: resizes, crops and normalises.
        channels: 1 (grayscale) or 3 (RGB).
        horizontal_flip: probability of mirroring left and right.
        min_crop: least share of the image's area that a random crop keeps; 1 turns random crops off.
    """

    processor: Any = None
    channels: int = 3
    horizontal_flip: float = 0.0
    min_crop: float = 1.0

    def __post_init__(self) -> None:
        """Raise ValueError where a number is out of its range."""
        flip, crop, channels = self.horizontal_flip, self.min_crop, self.channels
        if not (0 <= flip <= 1 and 0 < crop <= 1 and channels in (1, 3)):
            raise ValueError(
                f"horizontal_flip={flip}, min_crop={crop}, channels={channels}: must lie in [0, 1], (0, 1] and {{1, 3}}"
            )

    def __call__(self, image: "Image") -> Tensor:
        """Crop and flip are drawn from torch's global generator, which differs in each loader process."""
        if image.mode.startswith("I"):  # 16-bit grayscale, which Pillow's own conversion clips at 255, so to white
            image = image.convert("I").point(lambda value: value * (1 / 256)).convert("L")
        image = image.convert("L" if self.channels == 1 else "RGB")
        if self.min_crop < 1:
            image = image.crop(random_box(image.width, image.height, self.min_crop))
        if self.horizontal_flip and torch.rand(()) < self.horizontal_flip:
            image = image.transpose(require("PIL.Image", "pillow").Transpose.FLIP_LEFT_RIGHT)
        pixels: Tensor = self.processor(image, return_tensors="pt")["pixel_values"][0]
        return pixels.float()


def random_box(width: int, height: int, min_area: float) -> tuple[int, int, int, int]:
    """Left, upper, right, lower, in pixels, of a box with area share in [min_area, 1] and aspect ratio in [3/4, 4/3]."""
    u = torch.rand(4).tolist()
    area = width * height * (min_area + (1 - min_area) * u[0])
    ratio = math.exp(math.log(3 / 4) + u[1] * math.log(16 / 9))
    w, h = (max(1, round(side)) for side in (min(math.sqrt(area * ratio), width), min(math.sqrt(area / ratio), height)))
    left, upper = int(u[2] * (width - w + 1)), int(u[3] * (height - h + 1))
    return left, upper, left + w, upper + h


def model_config(pretrained: str | None) -> Any:
    """The model's config, an empty one for None. Raises OSError, one line, where there is none."""
    from transformers import AutoConfig, PreTrainedConfig

    try:
        if pretrained is None:
            return PreTrainedConfig()
        return AutoConfig.from_pretrained(expanduser(pretrained), trust_remote_code=False)
    except (OSError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        raise OSError(f"{pretrained}: no image model found ({reason}); give a folder or a hub id") from error


def image_transform(
    pretrained: str | None, image_size: int | None = None, channels: int | None = None
) -> ImageTransform:
    """The transform of a model's images; what is given by hand goes before the model's own settings.

    Args:
        pretrained: A folder or a hub id; None means 224 pixels, RGB, mean and std 0.5.
        image_size: Side of the square image in pixels.
        channels: 1 or 3.

    Raises:
        OSError: When there is no model at `pretrained`.
        ValueError: When its processor makes images of different sizes, or of neither 1 nor 3 channels.
    """
    config = model_config(pretrained)
    wanted: Any = channels or getattr(config, "num_channels", 3)
    processor = _load_processor(pretrained, getattr(config, "image_size", 224))
    settings = processor.to_dict()
    changes: dict[str, Any] = {"do_convert_rgb": False} if wanted == 1 else {}
    for name in ("image_mean", "image_std"):
        values = settings.get(name)
        if isinstance(values, list | tuple) and len(values) != wanted:
            changes[name] = [sum(values) / len(values)] * wanted
    if image_size is not None:
        square = {"height": image_size, "width": image_size}
        changes["size"] = {"shortest_edge": image_size} if "shortest_edge" in settings["size"] else square
        changes |= {"crop_size": square} if settings.get("do_center_crop") else {}
    transform = ImageTransform(type(processor).from_dict({**settings, **changes}), wanted)
    blank = require("PIL.Image", "pillow").new("L", (64, 96))
    if transform(blank).shape != transform(blank.rotate(90, expand=True)).shape:
        raise ValueError(f"{pretrained}: its image processor makes images of different sizes; set image_size")
    return transform


def _load_processor(pretrained: str | None, image_size: int | Sequence[int]) -> Any:
    """The model's image processor; where it has none, with a warning, one of its image size, mean and std 0.5."""
    import transformers

    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    if pretrained is not None:
        try:
            load: Any = transformers.AutoImageProcessor.from_pretrained
            return load(expanduser(pretrained), trust_remote_code=False)
        except (OSError, ValueError) as error:
            reason = str(error).strip().split("\n")[0]
            rank_zero_warn(
                f"{pretrained}: no image processor ({reason}); using {height}x{width} pixels, mean and std 0.5"
            )
    # Recent releases have the implementation that needs no torchvision under a name of its own.
    plain = getattr(transformers, "ViTImageProcessorPil", None) or transformers.ViTImageProcessor
    return plain(size={"height": height, "width": width})


@dataclass(eq=False)
class ImageDataset(Dataset[Batch]):
    """Images, decoded and transformed when asked for.

    Attributes:
        rows: rows with "image" (undecoded: {"bytes", "path"}) and "label" (a class id).
        transform: makes the pixel values.
    """

    rows: Sequence[Mapping[str, Any]]
    transform: ImageTransform

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Batch | None:  # type: ignore[override]
        row = self.rows[index]
        image = decode(row["image"])
        if image is None:  # the collation leaves it out
            rank_zero_warn(f"{image_name(row['image'], index)}: cannot be read and is left out of its batch")
            return None
        return {"pixel_values": self.transform(image), "labels": torch.tensor(row["label"])}


def decode(cell: Any) -> Any:
    """A Pillow image of an image cell, upright (cameras store how they were held); None where it cannot be read."""
    if not cell:
        return None
    content, path = cell["bytes"], cell["path"]
    bomb = require("PIL.Image", "pillow").DecompressionBombError
    try:
        if content is None and path and Path(path).is_file():
            content = Path(path).read_bytes()  # `datasets` leaves a damaged file open
        return require("datasets", "datasets").Image().decode_example({"bytes": content, "path": path})
    except (OSError, SyntaxError, ValueError, bomb):  # Pillow's decoders raise all four on damaged files
        return None


def image_name(cell: Any, row: int) -> str:
    """Class folder and file name of an undecoded image, or its row where it has no file."""
    path = (cell or {}).get("path")
    return "/".join(Path(path).parts[-2:]) if path else f"row {row}"
