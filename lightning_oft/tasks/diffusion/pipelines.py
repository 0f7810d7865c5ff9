"""The parts of diffusers' pipelines that training calls: loading, prompts and pictures encoded, noise predicted."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from os.path import isdir
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from lightning_oft.formats.pretrained import stored_dtype
from lightning_oft.tasks.loading import local_path

Family = Literal["sd", "sdxl", "sd3", "flux"]
FAMILIES: dict[str, Family] = {
    "UNet2DConditionModel": "sd",
    "SD3Transformer2DModel": "sd3",
    "FluxTransformer2DModel": "flux",
}
"""How a denoiser is called, by the name of its class; a UNet that is told sizes is "sdxl"."""


def load_pipeline(pretrained: str, dtype: str = "float32") -> tuple[Any, Family]:
    """A text-to-image pipeline from a folder or a hub id, in eval mode, and how its denoiser is called.

    Raises ModuleNotFoundError without diffusers, OSError, one line, where there is no such pipeline, and ValueError where
    its denoiser is of another kind.
    """
    try:
        import diffusers
    except ImportError as error:
        raise ModuleNotFoundError(
            "diffusers is not installed; TextToImage needs it: pip install 'lightning_oft[diffusion]'"
        ) from error
    path = local_path(pretrained)
    try:
        with quiet():
            wanted = _stored_dtypes(path) if dtype == "auto" else getattr(torch, dtype)
            pipeline = diffusers.DiffusionPipeline.from_pretrained(path, dtype=wanted)
    except Exception as error:  # diffusers raises OSError, ValueError, AttributeError and others for the same mistakes
        reason = str(error).strip().split("\n")[0][:300]
        raise OSError(
            f"{pretrained}: no pipeline could be loaded ({reason}); give a folder with a model_index.json, or a hub id"
        ) from error
    pipeline.set_progress_bar_config(disable=True)
    denoiser: Any = getattr(pipeline, denoiser_name(pipeline), None)
    kind = type(denoiser).__name__
    if kind not in FAMILIES:
        raise ValueError(f"{pretrained}: a {kind} is not known to TextToImage; there are {', '.join(FAMILIES)}")
    is_told_sizes = kind == "UNet2DConditionModel" and denoiser.config.addition_embed_type == "text_time"
    rank_zero_info(f"{pretrained}: {type(pipeline).__name__} with a {kind}")
    return pipeline, "sdxl" if is_told_sizes else FAMILIES[kind]


def _stored_dtypes(path: str) -> dict[str, torch.dtype]:
    """By part, the dtype that a pipeline was saved in."""
    from diffusers import DiffusionPipeline

    folder = Path(path) if isdir(path) else Path(DiffusionPipeline.download(path))
    return {file.parent.name: stored_dtype(file.parent) for file in folder.glob("*/config.json")}


@contextmanager
def quiet(is_wanted: bool = True) -> Iterator[None]:
    """Without remarks about parts that are of another class than expected, packages that need not be there, and words that
    are cut off."""
    if not is_wanted:
        yield
        return
    from diffusers.utils import logging as ours
    from transformers.utils import logging as theirs

    levels = [(library, library.get_verbosity()) for library in (ours, theirs)]
    for library, _ in levels:
        library.set_verbosity(logging.ERROR)
    ours.disable_progress_bar()
    try:
        yield
    finally:
        for library, level in levels:
            library.set_verbosity(level)
        ours.enable_progress_bar()


def denoiser_name(pipeline: Any) -> str:
    """The component that predicts noise: "unet", or "transformer"."""
    return "unet" if "unet" in pipeline.components else "transformer"


def training_scheduler(pipeline: Any, family: Family) -> Any:
    """A scheduler of its own, that adds noise as the pipeline's takes it away: PNDM, for one, knows no velocity."""
    from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler

    kind = DDPMScheduler if family in ("sd", "sdxl") else FlowMatchEulerDiscreteScheduler
    return kind.from_config(pipeline.scheduler.config)


def module_names(pipeline: Any) -> list[str]:
    """The names of the components that are models."""
    return [name for name, part in pipeline.components.items() if isinstance(part, nn.Module)]


def tokenizers(pipeline: Any) -> list[Any]:
    """In the order of the text encoders."""
    found = sorted(name for name in pipeline.components if name.startswith("tokenizer"))
    return [part for name in found if (part := getattr(pipeline, name)) is not None]


def picture_multiple(pipeline: Any, family: Family) -> int:
    """What the sides of pictures are multiples of: pixels of a latent, times the side of a transformer's patch."""
    patch = {"flux": 2, "sd3": getattr(getattr(pipeline, denoiser_name(pipeline)).config, "patch_size", 1)}
    return int(pipeline.vae_scale_factor * patch.get(family, 1))


def encode_pictures(vae: nn.Module, pixels: Tensor) -> Tensor:
    """pixels: (B, 3, H, W) in [-1, 1] -> what `drawn_latents` takes: mean and log variance (B, 2 C, h, w) of an
    AutoencoderKL, latents (B, C, h, w) of an AutoencoderTiny."""
    encoded = vae.encode(pixels.to(next(vae.parameters()).dtype))  # type: ignore[operator]
    answer: Tensor = encoded.latents if hasattr(encoded, "latents") else encoded.latent_dist.parameters
    return answer


def drawn_latents(vae: nn.Module, encoded: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Latents (B, C, h, w) as the denoiser takes them, shifted and scaled; of a distribution they are drawn."""
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

    config: Any = vae.config
    is_distribution = encoded.shape[1] == 2 * config.latent_channels
    latents = DiagonalGaussianDistribution(encoded).sample(generator) if is_distribution else encoded
    scaled: Tensor = (latents - (getattr(config, "shift_factor", None) or 0.0)) * config.scaling_factor
    return scaled


def encode_prompts(pipeline: Any, family: Family, prompts: list[str], device: torch.device) -> dict[str, Tensor]:
    """What the text encoders make of prompts: "words" (B, L, D) and, but for SD 1.5, "pooled" (B, P)."""
    if family == "sd":
        return {"words": pipeline.encode_prompt(prompts, device, 1, False)[0]}
    if family == "sdxl":
        words, _, pooled, _ = pipeline.encode_prompt(prompts, device=device, do_classifier_free_guidance=False)
    elif family == "sd3":
        words, _, pooled, _ = pipeline.encode_prompt(
            prompts, prompts, prompts, device=device, do_classifier_free_guidance=False
        )
    else:
        words, pooled, _ = pipeline.encode_prompt(prompts, device=device)
    return {"words": words, "pooled": pooled}


def conditions(family: Family, encoded: dict[str, Tensor], pixels: tuple[int, ...]) -> dict[str, Any]:
    """The denoiser's keyword arguments, of what `encode_prompts` made, for pictures of `pixels` (height, width)."""
    words = encoded["words"]
    if family == "sd":
        return {"encoder_hidden_states": words}
    if family == "sdxl":
        # Original size, crop and wanted size: the pictures as they are, uncropped.
        sizes = words.new_tensor([[*pixels, 0, 0, *pixels]]).expand(len(words), -1)
        return {
            "encoder_hidden_states": words,
            "added_cond_kwargs": {"text_embeds": encoded["pooled"], "time_ids": sizes},
        }
    told = {"encoder_hidden_states": words, "pooled_projections": encoded["pooled"]}
    return told if family == "sd3" else {**told, "txt_ids": words.new_zeros(words.shape[1], 3)}


def predict(
    pipeline: Any, family: Family, noisy: Tensor, timesteps: Tensor, told: dict[str, Any], guidance: float
) -> Tensor:
    """The denoiser's answer. noisy: (B, C, h, w); timesteps: (B,) -> (B, C, h, w). `guidance` is what a Flux that was
    distilled with it is told."""
    denoiser = getattr(pipeline, denoiser_name(pipeline))
    noisy = noisy.to(denoiser.dtype)
    answer: Tensor
    if family != "flux":
        answer = denoiser(noisy, timestep=timesteps, **told).sample
        return answer
    count, channels, height, width = noisy.shape
    packed = pipeline._pack_latents(noisy, count, channels, height, width)
    ids = pipeline._prepare_latent_image_ids(count, height // 2, width // 2, noisy.device, noisy.dtype)
    strength = noisy.new_full((count,), guidance) if denoiser.config.guidance_embeds else None
    answer = denoiser(packed, timestep=timesteps / 1000, guidance=strength, img_ids=ids, **told).sample
    pixels = (side * pipeline.vae_scale_factor for side in (height, width))
    unpacked: Tensor = pipeline._unpack_latents(answer, *pixels, pipeline.vae_scale_factor)
    return unpacked
