import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lightning_oft.data.vision.pixels import Augmentation, PixelFormat, centre_box, jitter, pixel_format, to_tensor

GREY = PixelFormat(8, 8, 1, (0.5,), (0.5,))


def picture(width: int = 12, height: int = 8, mode: str = "RGB") -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def checkpoint(folder: Path, **processor: object) -> str:
    (folder / "config.json").write_text('{"model_type": "vit", "image_size": 32, "num_channels": 3}')
    if processor:
        (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return str(folder)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "CMYK", "I", "F"])
def test_every_mode_becomes_the_models_channels(mode: str, channels: int) -> None:
    pixels = to_tensor(picture(mode=mode), PixelFormat(6, 5, channels))  # type: ignore[arg-type]
    assert pixels.shape == (channels, 6, 5)
    assert pixels.dtype == torch.float32
    assert 0 <= float(pixels.min()) <= float(pixels.max()) <= 1


def test_sixteen_bit_grey_keeps_its_shades() -> None:
    image = Image.fromarray(np.full((8, 8), 0x8000, dtype=np.uint16))
    torch.testing.assert_close(to_tensor(image, GREY), torch.full((1, 8, 8), 128 / 255))


def test_values_and_orientation_are_the_images() -> None:
    pixels_hwc = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    expected = torch.tensor(pixels_hwc).permute(2, 0, 1) / 255
    torch.testing.assert_close(to_tensor(Image.fromarray(pixels_hwc), PixelFormat(8, 8)), expected)


@pytest.mark.parametrize(
    ("processor", "expected"),
    [
        ({"size": 16}, (16, 16, None)),
        ({"size": {"height": 16, "width": 24}}, (16, 24, None)),
        ({"size": 16, "do_center_crop": True, "crop_size": 12}, (12, 12, 0.75)),
        (
            {"size": {"shortest_edge": 16}, "do_center_crop": True, "crop_size": {"height": 12, "width": 12}},
            (12, 12, 0.75),
        ),
        ({"size": {"shortest_edge": 16}}, (16, 16, 1.0)),
        ({"size": {"shortest_edge": 16}, "crop_pct": 0.875}, (16, 16, 0.875)),
        ({"size": {"shortest_edge": 384}, "crop_pct": 0.875}, (384, 384, 1.0)),
        ({}, (32, 32, None)),
    ],
)
def test_size_is_read_in_every_spelling(
    tmp_path: Path, processor: dict[str, object], expected: tuple[int, int, float | None]
) -> None:
    form = pixel_format(checkpoint(tmp_path, **processor))
    assert (form.height, form.width, form.crop) == expected


def test_normalisation_is_the_models(tmp_path: Path) -> None:
    path = checkpoint(tmp_path, size=8, image_mean=[0.1, 0.2, 0.3], image_std=[0.5, 0.25, 0.2])
    normal = pixel_format(path).normalize(torch.ones(3, 8, 8))
    torch.testing.assert_close(normal[:, 0, 0], torch.tensor([1.8, 3.2, 3.5]))
    assert pixel_format(path, channels=1).mean == pytest.approx((0.2,))


def test_what_is_given_by_hand_goes_first(tmp_path: Path) -> None:
    form = pixel_format(checkpoint(tmp_path, size=16), image_size=20, channels=1)
    assert (form.height, form.width, form.channels) == (20, 20, 1)


def test_missing_checkpoint_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"^[^\n]*no config.json there[^\n]*$"):
        pixel_format(str(tmp_path))


def test_centre_box_keeps_the_aspect_ratio() -> None:
    assert centre_box(40, 20, PixelFormat(8, 8, crop=0.5)) == (15.0, 5.0, 25.0, 15.0)
    assert centre_box(40, 20, PixelFormat(8, 8)) == (0.0, 0.0, 40.0, 20.0)


def test_augmentation_repeats_with_its_generator() -> None:
    augment = Augmentation(0.5, 0.3, 0.4)
    first = [augment(picture(), PixelFormat(8, 8), g) for g in [generator()] for _ in range(4)]
    again = [augment(picture(), PixelFormat(8, 8), g) for g in [generator()] for _ in range(4)]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], first[1])


def test_augmentation_turned_off_is_evaluation() -> None:
    plain = to_tensor(picture(), PixelFormat(8, 8))
    assert torch.equal(Augmentation(0.0, 1.0, 0.0)(picture(), PixelFormat(8, 8), generator()), plain)
    assert torch.equal(Augmentation(1.0, 1.0, 0.0)(picture(), PixelFormat(8, 8), generator()), plain.flip(-1))


def test_jitter_by_one_changes_nothing_and_stays_in_range() -> None:
    pixels = to_tensor(picture(), PixelFormat(8, 8))
    torch.testing.assert_close(jitter(pixels, 1, 1, 1), pixels)
    strong = jitter(pixels, 1.9, 1.9, 1.9)
    assert 0 <= float(strong.min()) <= float(strong.max()) <= 1
    torch.testing.assert_close(jitter(pixels, 1, 1, 0).std(0), torch.zeros(8, 8))


@pytest.mark.parametrize("values", [(1.5, 0.6, 0.0), (0.5, 0.0, 0.0), (0.5, 0.6, 1.0)])
def test_augmentation_out_of_range_is_refused(values: tuple[float, float, float]) -> None:
    with pytest.raises(ValueError, match="need horizontal_flip in"):
        Augmentation(*values)
