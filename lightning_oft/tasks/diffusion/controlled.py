"""ControlledTextToImage: a picture that is drawn along a control image, such as an outline or a pose."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from typing_extensions import override

from lightning_oft.tasks.diffusion.text_to_image import Batch, TextToImage

HINT = "hint"
"""The name of the hint encoder in the UNet, and of its weights in an export."""
_CHANNELS = (16, 32, 96, 256)
"""Of the hint encoder at each resolution, the last one that of the latents; as ControlNet's."""


def add_hint_encoder(pipeline: Any) -> nn.Module:
    """Give the UNet of a pipeline a hint encoder, `unet.hint`: that of an export which has one, else a new one, whose
    output is zero. Controls (B, 3, H, W) in [0, 1] -> (B, C, h, w), as the UNet's first convolution."""
    from diffusers.models.controlnets.controlnet import ControlNetConditioningEmbedding

    unet = pipeline.unet
    halvings = int(pipeline.vae_scale_factor).bit_length() - 1
    encoder: nn.Module = ControlNetConditioningEmbedding(
        unet.config.block_out_channels[0], 3, (*_CHANNELS, *[_CHANNELS[-1]] * halvings)[: halvings + 1]
    )
    if stored := _stored(Path(str(unet.config.get("_name_or_path") or ""))):
        encoder.load_state_dict(stored)
    setattr(unet, HINT, encoder.to(unet.device, unet.dtype))
    return encoder


def _stored(folder: Path) -> dict[str, Tensor]:
    """The weights of a hint encoder among those of a UNet in a folder; none where there are none."""
    found: dict[str, Tensor] = {}
    for file in folder.glob("*.safetensors") if folder.is_dir() else ():
        with safe_open(file, "pt") as opened:
            names = [name for name in opened.keys() if name.startswith(f"{HINT}.")]  # noqa: SIM118 - no dictionary
            found |= {name.removeprefix(f"{HINT}."): opened.get_tensor(name) for name in names}
    return found


@contextmanager
def drawn_along(unet: nn.Module, controls: Tensor) -> Iterator[None]:
    """Within this context the UNet draws along control images, (B, 3, H, W) in [0, 1]: what `unet.hint` makes of them is
    added to the output of its first convolution. Of a batch of several times B, each B examples get all of them.

    Raises ValueError where they are not of the size of the pictures.
    """
    own: Any = unet

    def add(layer: nn.Module, args: Any, output: Tensor) -> Tensor:
        hint: Tensor = own.hint(controls.to(output.device, own.dtype))
        if hint.shape[-2:] != output.shape[-2:]:
            height, width = controls.shape[-2:]
            pixels = [side * height // hint.shape[-2] for side in output.shape[-2:]]
            raise ValueError(
                f"control: is of {height} x {width} pixels and the picture of {pixels[0]} x {pixels[1]}; make them alike"
            )
        return output + hint.repeat(len(output) // len(hint), 1, 1, 1)

    handle = own.conv_in.register_forward_hook(add)
    try:
        yield
    finally:
        handle.remove()


class ControlledTextToImage(TextToImage):
    """Text to image along control images (outlines, poses, depth) with Stable Diffusion 1.5 or XL, as the paper of OFT does
    it: a light hint encoder, `self.unet.hint`, whose output is added once, after the UNet's first convolution. OFT
    trains it whole beside the rotations, and saves it with them.

    Batches are TextToImage's with "control", (B, 3, H, W) float32 in [0, 1], beside each "pixel_values", and so are
    those of a test. ControlledTextToImage(folder) also loads the `merged/` of an export, and `sample` draws with it. A plain
    DiffusionPipeline loads the same folder without the hint encoder.

    Args:
        pretrained: The pipeline to start from: a folder written by save_pretrained, an export, or a hub id.
        controls: Files of control images, one for each of `prompts`.
        text_to_image: Arguments of TextToImage.

    Raises:
        OSError: When one of `controls` cannot be read; else as TextToImage.
        ValueError: When the pipeline has no UNet, or there are not as many controls as prompts; else as TextToImage.
    """

    loader = "lightning_oft.tasks.ControlledTextToImage"

    def __init__(self, pretrained: str, controls: list[str] | None = None, **text_to_image: Any) -> None:
        super().__init__(pretrained, **text_to_image)
        controls = controls or []
        if len(controls) != len(self.prompts):
            raise ValueError(f"controls: has {len(controls)} files, prompts {len(self.prompts)}; give one for each")
        self.controls = [_opened(path) for path in controls]
        self.new_head = [HINT]

    @override
    def _load(self, pretrained: str, gradient_checkpointing: bool, offload: Sequence[str]) -> None:
        super()._load(pretrained, gradient_checkpointing, offload)
        if self.family not in ("sd", "sdxl"):
            kind = type(self.library_model).__name__
            raise ValueError(f"{pretrained}: has a {kind}, and control needs a UNet; take Stable Diffusion 1.5 or XL")
        add_hint_encoder(self.pipeline).train()

    @override
    def denoising_errors(self, batch: Batch, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """As TextToImage's, drawn along the control images of the batch, and of its prior where it has one."""
        parts = [batch, batch["prior"]] if "prior" in batch else [batch]
        with drawn_along(self.library_model, torch.cat([part["control"] for part in parts])):
            return super().denoising_errors(batch, generator)

    @override
    def sample(self, prompts: Sequence[str], seeds: Sequence[int], controls: Any = None) -> list[Any]:
        """Pillow images, each from its prompt, its own seed and its control image: (B, 3, H, W) in [0, 1], or Pillow
        images, which get the size of the pictures. Raises ValueError without control images."""
        if controls is None:
            raise ValueError("controls: needs a control image for each prompt; TextToImage samples without")
        if not isinstance(controls, Tensor):
            controls = self._pixels(controls)
        with drawn_along(self.library_model, controls):
            return super().sample(prompts, seeds)

    def _pixels(self, controls: Sequence[Any]) -> Tensor:
        """Pillow images -> (B, 3, H, W) float32 in [0, 1], of the size that is sampled."""
        from diffusers.image_processor import VaeImageProcessor

        side = self.pipeline.unet.config.sample_size * self.pipeline.vae_scale_factor
        sizes = {name: self.sampling.get(name, side) for name in ("height", "width")}
        prepare = VaeImageProcessor(self.pipeline.vae_scale_factor, do_convert_rgb=True, do_normalize=False)
        pixels: Tensor = prepare.preprocess(list(controls), **sizes)
        return pixels

    @override
    def sample_batch(self, batch: Batch) -> list[Any]:
        return self.sample(batch["prompt"], batch["seed"].tolist(), batch["control"])

    @override
    def samples(self) -> dict[str, Any]:
        """By prompt, a control image with the picture that is drawn along it now on its right; prompts that come again
        are numbered."""
        made: dict[str, Any] = {}
        for number, (prompt, control) in enumerate(zip(self.prompts, self.controls, strict=True)):
            picture = self.sample([prompt], [number], [control])[0]
            made[prompt if self.prompts.count(prompt) == 1 else f"{prompt} ({number + 1})"] = _beside(control, picture)
        return made


def _opened(path: str) -> Any:
    """A Pillow image of a file. Raises OSError, one line, where it cannot be read."""
    from PIL import Image

    try:
        return Image.open(Path(path).expanduser()).convert("RGB")
    except OSError as error:
        raise OSError(f"controls: {path} is no picture that can be read; give a png, jpg or webp file") from error


def _beside(control: Any, picture: Any) -> Any:
    """Two Pillow images side by side, the first in the size of the second."""
    from PIL import Image

    made = Image.new("RGB", (2 * picture.width, picture.height))
    made.paste(control.resize(picture.size), (0, 0))
    made.paste(picture, (picture.width, 0))
    return made
