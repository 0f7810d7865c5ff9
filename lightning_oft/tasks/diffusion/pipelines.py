"""The parts of diffusers' pipelines that training calls: loading, prompts and pictures encoded, noise predicted."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

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
    options = {} if dtype == "auto" else {"dtype": getattr(torch, dtype)}
    try:
        with _quiet():
            pipeline = diffusers.DiffusionPipeline.from_pretrained(path, **options)
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


@contextmanager
def _quiet() -> Iterator[None]:
    """Without remarks about parts that are of another class than expected, and about packages that need not be there."""
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


def encode_pictures(vae: nn.Module, pixels: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """pixels: (B, 3, H, W) in [-1, 1] -> latents (B, C, h, w) as the denoiser takes them, shifted and scaled."""
    encoded = vae.encode(pixels.to(next(vae.parameters()).dtype))  # type: ignore[operator]
    # An AutoencoderTiny gives the latents themselves, an AutoencoderKL a distribution.
    latents = encoded.latents if hasattr(encoded, "latents") else encoded.latent_dist.sample(generator)
    config: Any = vae.config
    scaled: Tensor = (latents - (getattr(config, "shift_factor", None) or 0.0)) * config.scaling_factor
    return scaled


def encode_prompts(pipeline: Any, family: Family, prompts: list[str], pixels: tuple[int, ...]) -> dict[str, Any]:
    """What the denoiser is told: its keyword arguments for these prompts and pictures of `pixels` (height, width)."""
    device = pipeline.device
    if family == "sd":
        return {"encoder_hidden_states": pipeline.encode_prompt(prompts, device, 1, False)[0]}
    if family == "sdxl":
        told, _, pooled, _ = pipeline.encode_prompt(prompts, device=device, do_classifier_free_guidance=False)
        # Original size, crop and wanted size: the pictures as they are, uncropped.
        sizes = torch.tensor([[*pixels, 0, 0, *pixels]], device=device, dtype=told.dtype).expand(len(prompts), -1)
        return {"encoder_hidden_states": told, "added_cond_kwargs": {"text_embeds": pooled, "time_ids": sizes}}
    if family == "sd3":
        told, _, pooled, _ = pipeline.encode_prompt(
            prompts, prompts, prompts, device=device, do_classifier_free_guidance=False
        )
        return {"encoder_hidden_states": told, "pooled_projections": pooled}
    told, pooled, ids = pipeline.encode_prompt(prompts, device=device)
    return {"encoder_hidden_states": told, "pooled_projections": pooled, "txt_ids": ids}


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
