"""From an image file to the tensor a model wants: size, channels, normalisation, and augmentation without torchvision.

Shapes: c channels, h height, w width; an image is (c, h, w) float32.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from PIL.Image import Image

Box = tuple[float, float, float, float]
"""Left, upper, right, lower, in pixels of the source image."""


@dataclass(frozen=True)
class PixelFormat:
    """What a model expects of its pixels."""

    height: int = 224
    """Pixels."""
    width: int = 224
    """Pixels."""
    channels: int = 3
    """1 (grayscale) or 3 (RGB)."""
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    """Subtracted from each channel, whose values lie in [0, 1]."""
    std: tuple[float, ...] = (0.5, 0.5, 0.5)
    """What each channel is divided by after that."""
    crop: float | None = None
    """The centre crop's side as a share of the image's short side; None squashes the whole image into the size."""
    resample: int = 2
    """Pillow's resampling filter; 2 is bilinear."""

    def normalize(self, image_chw: Tensor) -> Tensor:
        """(x - mean) / std by channel. image_chw: (..., c, h, w) in [0, 1] -> the same shape, float32."""
        mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (self.mean, self.std))
        return (image_chw - mean) / std


def pixel_format(pretrained: str | None, image_size: int | None = None, channels: int | None = None) -> PixelFormat:
    """Read a checkpoint's preprocessor_config.json and config.json; what is given by hand goes before both.

    Args:
        pretrained: A folder or a hub id; None gives 224 pixels, RGB, mean and std 0.5.
        image_size: Side of the square image in pixels.
        channels: 1 or 3.

    Raises:
        OSError: When there is no model at `pretrained`.
        ValueError: When its preprocessor describes something else than 1 or 3 channels.
    """
    processor, model = ({}, {}) if pretrained is None else read_configs(pretrained)
    height, width, crop = _size(processor, model)
    if image_size is not None:
        height = width = image_size
    wanted = channels or int(model.get("num_channels", 3))
    if wanted not in (1, 3):
        raise ValueError(f"{pretrained}: {wanted} channels; images have 1 (grayscale) or 3 (RGB): set channels")
    keep = processor.get("do_normalize", True)
    return PixelFormat(
        height,
        width,
        wanted,
        _per_channel(processor.get("image_mean", 0.5) if keep else 0.0, wanted),
        _per_channel(processor.get("image_std", 0.5) if keep else 1.0, wanted),
        crop,
        int(processor.get("resample", 2)),
    )


def read_configs(pretrained: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The image processor's configuration ({} where there is none) and the model's, as they stand in the files."""
    # Imported here: reading digits without a checkpoint needs no transformers, whose import takes seconds.
    from transformers import ImageProcessingMixin, PreTrainedConfig

    # A typing error should not go and ask the hub, which takes a while without a connection.
    if (looks_local(pretrained) or Path(pretrained).is_dir()) and not (Path(pretrained) / "config.json").is_file():
        raise OSError(
            f"{pretrained}: no config.json there; pretrained is a folder written by save_pretrained or a hub id"
        )
    try:
        model: dict[str, Any] = PreTrainedConfig.get_config_dict(pretrained)[0]
    except (OSError, ValueError) as error:
        raise OSError(
            f"{pretrained}: no image model found ({_first_line(error)}); give a folder or a hub id"
        ) from error
    try:
        processor: dict[str, Any] = ImageProcessingMixin.get_image_processor_dict(pretrained)[0]
    except OSError:
        processor = {}
    return processor, model


def looks_local(name: str) -> bool:
    """Whether a name can only be a path: a hub id is `name` or `owner/name`."""
    return name.startswith(("/", ".", "~")) or name.count("/") > 1 or "\\" in name


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]


def _per_channel(values: float | list[float], channels: int) -> tuple[float, ...]:
    """One value a channel: a single one is repeated, three are averaged for grayscale."""
    given = [values] if isinstance(values, int | float) else list(values)
    if len(given) == channels:
        return tuple(given)
    return (sum(given) / len(given),) * channels


def _size(processor: Mapping[str, Any], model: Mapping[str, Any]) -> tuple[int, int, float | None]:
    """Height, width and `PixelFormat.crop` from a processor's `size`, `crop_size` and `crop_pct` in any of their spellings."""
    fallback = model.get("image_size", 224)
    size = processor.get("size", fallback if isinstance(fallback, int) else fallback[0])
    cropped = processor.get("do_center_crop", False)
    if isinstance(size, int):  # before transformers 4.2x a number, which meant the short side wherever a crop followed
        size = {"shortest_edge": size} if cropped or "crop_pct" in processor else {"height": size, "width": size}
    if "shortest_edge" not in size and not cropped:
        return int(size["height"]), int(size["width"]), None
    short = int(size.get("shortest_edge") or min(size["height"], size["width"]))
    target = processor.get("crop_size", short) if cropped else short
    height, width = (target, target) if isinstance(target, int) else (target["height"], target["width"])
    # ConvNeXt states the share instead of a second size, and from 384 pixels on it does not crop.
    share = processor.get("crop_pct") if short < 384 else None
    return int(height), int(width), float(share) if share else min(height, width) / short


def centre_box(width: int, height: int, form: PixelFormat) -> Box:
    """The part of a (width, height) image that evaluation looks at."""
    if form.crop is None:
        return 0.0, 0.0, float(width), float(height)
    unit = form.crop * min(width, height) / min(form.width, form.height)
    w, h = min(unit * form.width, width), min(unit * form.height, height)
    left, upper = (width - w) / 2, (height - h) / 2
    return left, upper, left + w, upper + h


def to_tensor(image: "Image", form: PixelFormat, box: Box | None = None) -> Tensor:
    """Cut `box` (the centre box by default) out of an image and resize it. -> (c, h, w) float32 in [0, 1]."""
    import numpy as np
    from PIL.Image import fromarray

    if image.mode.startswith("I"):  # 16-bit grey, which Pillow's own conversion clips at 255, that is, to white
        image = fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8))
    image = image.convert("L" if form.channels == 1 else "RGB")
    image = image.resize(
        (form.width, form.height), form.resample, box=box or centre_box(image.width, image.height, form)
    )
    pixels_hwc = torch.from_numpy(np.array(image, dtype=np.float32)).view(form.height, form.width, form.channels)
    return pixels_hwc.permute(2, 0, 1).contiguous() / 255


@dataclass(frozen=True)
class Augmentation:
    """What training does to an image at random. The defaults are mild; zero (one for the crop) turns a part off."""

    horizontal_flip: float = 0.5
    """Probability of mirroring left and right."""
    min_crop: float = 0.6
    """The least share of the image's area that a random crop keeps; 1 looks at what evaluation looks at."""
    color_jitter: float = 0.0
    """Brightness, contrast and saturation are each scaled by a factor from [1 - j, 1 + j]."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        if not (0 <= self.horizontal_flip <= 1 and 0 < self.min_crop <= 1 and 0 <= self.color_jitter < 1):
            raise ValueError(f"{self}: need horizontal_flip in [0, 1], min_crop in (0, 1] and color_jitter in [0, 1)")

    def __call__(self, image: "Image", form: PixelFormat, generator: torch.Generator) -> Tensor:
        """A random crop, mirrored and recoloured. -> (c, h, w) float32 in [0, 1]; the same for the same generator state."""
        # Five numbers whatever is turned on, so that one setting changed leaves the others' draws as they were.
        u = torch.rand(5, generator=generator).tolist()
        box = None if self.min_crop == 1 else random_box(image.width, image.height, self.min_crop, u[:4])
        pixels = to_tensor(image, form, box)
        if u[4] < self.horizontal_flip:
            pixels = pixels.flip(-1)
        if self.color_jitter:
            factors = 1 + self.color_jitter * (2 * torch.rand(3, generator=generator) - 1)
            pixels = jitter(pixels, *factors.tolist())
        return pixels


def random_box(width: int, height: int, min_area: float, u: list[float]) -> Box:
    """A box of area share in [min_area, 1] and aspect ratio in [3/4, 4/3]. u: four numbers in [0, 1)."""
    area = width * height * (min_area + (1 - min_area) * u[0])
    ratio = math.exp(math.log(3 / 4) + u[1] * math.log(16 / 9))
    w, h = min(math.sqrt(area * ratio), width), min(math.sqrt(area / ratio), height)
    left, upper = u[2] * (width - w), u[3] * (height - h)
    return left, upper, left + w, upper + h


def jitter(pixels_chw: Tensor, brightness: float, contrast: float, saturation: float) -> Tensor:
    """Scale brightness, then contrast about the mean grey, then saturation about each pixel's grey; stays in [0, 1]."""
    pixels_chw = (pixels_chw * brightness).clamp(0, 1)
    grey = pixels_chw.mean(0, keepdim=True)
    pixels_chw = (grey.mean() + contrast * (pixels_chw - grey.mean())).clamp(0, 1)
    grey = pixels_chw.mean(0, keepdim=True)
    return (grey + saturation * (pixels_chw - grey)).clamp(0, 1)
