"""From an image to the tensor a model takes: transformers' image processors, with a random crop and flip before them."""

import math
from dataclasses import dataclass
from os.path import expanduser
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightning_oft.data.base import require


@dataclass(frozen=True)
class ImageTransform:
    """From rows of a table to a batch: in training a random crop and flip, then the model's image processor.

    `horizontal_flip` is a probability; `min_crop` the least share of an image's area that a crop keeps, 1 for no crop.
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

    def __call__(self, rows: dict[str, list[Any]]) -> dict[str, Tensor]:
        """Rows of undecoded images and class ids -> pixel_values (B, C, H, W) float32 and labels (B,) int64.

        Images that cannot be read are left out, with a warning. Raises ValueError when none is left.
        """
        images = {}
        for i, cell in enumerate(rows["image"]):  # transformed one by one: a batch of photographs fills the memory
            if image := decode(cell):
                images[i] = self.pixels(image)
            else:
                rank_zero_warn(f"{image_name(cell)}: cannot be read and is left out of its batch")
        if not images:
            raise ValueError(f"a batch of {len(rows['image'])} images of which none can be read; check the files")
        labels = torch.tensor([rows["label"][i] for i in images])
        return {"pixel_values": torch.stack(list(images.values())), "labels": labels}

    def pixels(self, image: Any) -> Tensor:
        """A Pillow image -> (C, H, W) float32; crop and flip are drawn from torch's global generator."""
        if image.mode.startswith("I"):  # 16-bit grayscale, which Pillow's own conversion clips at 255, so to white
            image = image.convert("I").point(lambda value: value * (1 / 256)).convert("L")
        image = image.convert("L" if self.channels == 1 else "RGB")
        if self.min_crop < 1:
            area, *place = torch.rand(3).tolist()
            scale = math.sqrt(self.min_crop + (1 - self.min_crop) * area)
            size = [math.ceil(side * scale) for side in image.size]
            left, upper = (int(u * (side - s + 1)) for u, side, s in zip(place, image.size, size, strict=True))
            image = image.crop((left, upper, left + size[0], upper + size[1]))
        if self.horizontal_flip and torch.rand(()) < self.horizontal_flip:
            image = image.transpose(require("PIL.Image", "pillow").Transpose.FLIP_LEFT_RIGHT)
        pixels: Tensor = self.processor(image, return_tensors="pt")["pixel_values"][0]
        return pixels.float()


def model_files(pretrained: str | None) -> tuple[Any, Any]:
    """A model's config and image processor, OSError where it lacks one; for None 224 pixels, mean and std 0.5."""
    import transformers

    if pretrained is None:
        # Recent releases have the implementation that needs no torchvision under a name of its own.
        plain = getattr(transformers, "ViTImageProcessorPil", None) or transformers.ViTImageProcessor
        return transformers.PreTrainedConfig(), plain(size=224)
    kinds: tuple[Any, Any] = (transformers.AutoConfig, transformers.AutoImageProcessor)
    try:
        config, processor = (kind.from_pretrained(expanduser(pretrained), trust_remote_code=False) for kind in kinds)
    except (OSError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        raise OSError(
            f"{pretrained}: no image model with a processor found ({reason}); give a folder or a hub id"
        ) from error
    return config, processor


def image_transform(
    config: Any, processor: Any, image_size: int | None = None, channels: int | None = None
) -> ImageTransform:
    """The transform of a model's images; what is given by hand goes before the model's own settings.

    Raises ValueError when its processor makes images of different sizes, or of neither 1 nor 3 channels.
    """
    wanted: Any = channels or getattr(config, "num_channels", 3)
    settings = processor.to_dict() | ({"do_convert_rgb": False} if wanted == 1 else {})
    for name in ("image_mean", "image_std"):
        values = settings.get(name)
        if values and len(values) != wanted:
            settings[name] = [sum(values) / len(values)] * wanted
    if image_size is not None:
        square = {"height": image_size, "width": image_size}
        shortest = {"shortest_edge": image_size}
        settings |= {"size": shortest if "shortest_edge" in settings["size"] else square, "crop_size": square}
    transform = ImageTransform(type(processor).from_dict(settings), wanted)
    blank = require("PIL.Image", "pillow").new("L", (64, 96))
    if transform.pixels(blank).shape != transform.pixels(blank.rotate(90, expand=True)).shape:
        raise ValueError(f"{type(processor).__name__} makes images of different sizes; set image_size")
    return transform


def decode(cell: Any) -> Any:
    """A Pillow image of an image cell, upright (cameras store how they were held); None where it cannot be read."""
    bomb = require("PIL.Image", "pillow").DecompressionBombError
    try:
        if cell and cell["bytes"] is None and Path(cell["path"]).is_file():
            cell = {**cell, "bytes": Path(cell["path"]).read_bytes()}  # `datasets` leaves a damaged file open
        return require("datasets", "datasets").Image().decode_example(cell) if cell else None
    except (OSError, SyntaxError, ValueError, bomb):  # Pillow's decoders raise all four on damaged files
        return None


def image_name(cell: Any, row: int | None = None) -> str:
    """Class folder and file name of an undecoded image, or its row where it has no file."""
    path = (cell or {}).get("path")
    return "/".join(Path(path).parts[-2:]) if path else "an image" if row is None else f"row {row}"
