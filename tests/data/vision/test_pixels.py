import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor

from lightning_oft.data.vision.pixels import ImageTransform, image_transform, model_files


def picture(width: int = 48, height: int = 36, mode: str = "RGB") -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def checkpoint(folder: Path, model_type: str = "vit", **processor: object) -> str:
    config = {"model_type": model_type, "image_size": 32, "num_channels": 3}
    (folder / "config.json").write_text(json.dumps(config))
    if processor:
        (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return str(folder)


VIT = {"image_processor_type": "ViTImageProcessor", "image_mean": [0.1, 0.2, 0.3], "image_std": [0.5, 0.25, 0.2]}
CLIP = {
    "image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 20}, "do_center_crop": True,
    "crop_size": {"height": 16, "width": 16},
}  # fmt: skip
CONVNEXT = {"image_processor_type": "ConvNextImageProcessor", "size": {"shortest_edge": 16}, "crop_pct": 0.875}


@pytest.mark.parametrize("settings", [{**VIT, "size": {"height": 16, "width": 24}}, CLIP, CONVNEXT])
def test_pixels_are_the_models_processors(tmp_path: Path, settings: dict[str, Any]) -> None:
    path = checkpoint(tmp_path, **settings)
    processor: Any = AutoImageProcessor.from_pretrained(path)  # type: ignore[no-untyped-call]
    expected = processor(picture(), return_tensors="pt")["pixel_values"][0]
    pixels = image_transform(*model_files(path)).pixels(picture())
    assert pixels.dtype == torch.float32
    torch.testing.assert_close(pixels, expected)


@pytest.mark.parametrize("settings", [{**VIT, "size": {"height": 16, "width": 24}}, CLIP, CONVNEXT])
def test_what_is_given_by_hand_goes_first(tmp_path: Path, settings: dict[str, Any]) -> None:
    transform = image_transform(*model_files(checkpoint(tmp_path, **settings)), image_size=20, channels=1)
    assert transform.pixels(picture()).shape == (1, 20, 20)


def test_model_without_a_processor_is_one_line(tmp_path: Path) -> None:
    path = checkpoint(tmp_path)
    with pytest.raises(OSError, match=r"^[^\n]*no image model with a processor found \([^\n]*\); give a folder[^\n]*$"):
        model_files(path)


def test_without_a_model_values_lie_around_zero() -> None:
    transform = image_transform(*model_files(None), 8, 1)
    black_and_white = [float(transform.pixels(Image.new("L", (8, 8), value)).mean()) for value in (0, 255)]
    assert black_and_white == pytest.approx([-1, 1])


def test_normalisation_of_three_channels_is_averaged_for_grayscale(tmp_path: Path) -> None:
    processor = image_transform(*model_files(checkpoint(tmp_path, **VIT)), channels=1).processor
    assert list(processor.image_mean) == pytest.approx([0.2])


def test_processor_of_images_of_different_sizes_is_refused(tmp_path: Path) -> None:
    path = checkpoint(tmp_path, **{**CLIP, "do_center_crop": False})
    with pytest.raises(ValueError, match="makes images of different sizes; set image_size"):
        image_transform(*model_files(path))


def test_missing_model_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(
        OSError, match=r"^[^\n]*no image model with a processor found \([^\n]*\); give a folder or a hub id$"
    ):
        model_files(str(tmp_path))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("mode", ["1", "L", "P", "RGBA", "CMYK", "I", "F"])
def test_every_mode_becomes_the_models_channels(mode: str, channels: int) -> None:
    assert image_transform(*model_files(None), 6, channels).pixels(picture(mode=mode)).shape == (channels, 6, 6)


def test_sixteen_bit_grayscale_keeps_its_shades() -> None:
    image = Image.fromarray(np.full((8, 8), 0x8000, dtype=np.uint16))
    assert torch.allclose(
        image_transform(*model_files(None), 8, 1).pixels(image), torch.tensor((128 / 255 - 0.5) / 0.5), atol=1e-6
    )


def test_flip_and_crop_happen_at_their_probability() -> None:
    plain = image_transform(*model_files(None), 8)
    image = picture(8, 8)
    flipped = ImageTransform(plain.processor, horizontal_flip=1.0).pixels(image)
    torch.testing.assert_close(flipped, plain.pixels(image).flip(-1))
    random = ImageTransform(plain.processor, horizontal_flip=0.5, min_crop=0.5)
    assert len({float(random.pixels(image).sum()) for _ in range(5)}) > 1
    state = torch.get_rng_state()
    plain.pixels(image)
    assert torch.equal(state, torch.get_rng_state())  # evaluation draws nothing


@pytest.mark.parametrize(("width", "height"), [(40, 20), (1, 3)])
def test_random_crop_keeps_its_share_of_the_image(width: int, height: int) -> None:
    sizes: list[tuple[int, int]] = []

    def processor(image: Image.Image, return_tensors: str) -> dict[str, torch.Tensor]:
        assert np.asarray(image).min() == 255  # what lies outside of the image would be black
        sizes.append(image.size)
        return {"pixel_values": torch.zeros(1, 3, 1, 1)}

    transform = ImageTransform(processor, min_crop=0.3)
    for _ in range(50):
        transform.pixels(Image.new("RGB", (width, height), (255, 255, 255)))
    assert all(0.3 <= w * h / (width * height) <= 1 for w, h in sizes)
    assert len(set(sizes)) > 1


@pytest.mark.parametrize("arguments", [{"horizontal_flip": 1.5}, {"min_crop": 0.0}, {"channels": 2}])
def test_impossible_arguments_are_refused(arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="must lie in"):
        ImageTransform(None, **arguments)
