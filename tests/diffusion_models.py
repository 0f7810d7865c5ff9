"""Tiny pipelines of diffusers, made of random parts: no download, milliseconds to build."""

from __future__ import annotations

import string
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

diffusers = pytest.importorskip(
    "diffusers", reason="diffusers is not installed: pip install 'lightning_oft[diffusion]'"
)

FAMILIES = ("sd", "sdxl", "sd3", "flux")
WIDTH, SIZE = 32, 16
"""Of text embeddings; in pixels, of pictures."""


def clip_tokenizer() -> CLIPTokenizer:
    letters = [*string.ascii_lowercase, *(letter + "</w>" for letter in string.ascii_lowercase)]
    tokens = [*letters, "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=[], model_max_length=16)


def t5_tokenizer() -> T5TokenizerFast:
    pieces = ["<pad>", "</s>", "<unk>", "▁", *string.ascii_lowercase]
    return T5TokenizerFast(vocab=[(piece, -float(i)) for i, piece in enumerate(pieces)], extra_ids=0)


def text_encoder(projects: bool = False) -> Any:
    config = CLIPTextConfig(
        vocab_size=54, hidden_size=WIDTH, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=16, bos_token_id=52, eos_token_id=53, pad_token_id=53, projection_dim=WIDTH,
    )  # fmt: skip
    return (CLIPTextModelWithProjection if projects else CLIPTextModel)(config).eval()


def t5_encoder(width: int = WIDTH) -> Any:
    config = T5Config(vocab_size=30, d_model=width, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    return T5EncoderModel(config).eval()


def vae(channels: int = 4) -> Any:
    return diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8), latent_channels=channels, norm_num_groups=4, sample_size=SIZE, shift_factor=0.1,
        use_quant_conv=False, use_post_quant_conv=False,
    ).eval()  # fmt: skip


def unet(xl: bool = False) -> Any:
    told_sizes = {
        "addition_embed_type": "text_time", "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 6 * 8 + WIDTH, "use_linear_projection": True,
    } if xl else {}  # fmt: skip
    return diffusers.UNet2DConditionModel(
        sample_size=SIZE // 2, block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=WIDTH * (2 if xl else 1), attention_head_dim=2, **told_sizes,
    )  # fmt: skip


def sd3() -> Any:
    return diffusers.SD3Transformer2DModel(
        sample_size=SIZE // 2, patch_size=1, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=2 * WIDTH, caption_projection_dim=16, pooled_projection_dim=2 * WIDTH, out_channels=4,
    )  # fmt: skip


def flux() -> Any:
    return diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=WIDTH, pooled_projection_dim=WIDTH, axes_dims_rope=(4, 4, 8),
    )  # fmt: skip


def pipeline(family: str, prediction_type: str = "epsilon") -> Any:
    """A tiny pipeline of one of FAMILIES."""
    torch.manual_seed(0)
    if family == "sd":
        scheduler = diffusers.PNDMScheduler(skip_prk_steps=True, steps_offset=1, prediction_type=prediction_type)
        parts = (vae(), text_encoder(), clip_tokenizer(), unet(), scheduler, None, None)
        return diffusers.StableDiffusionPipeline(*parts, requires_safety_checker=False)
    if family == "sdxl":
        words = (text_encoder(), text_encoder(True), clip_tokenizer(), clip_tokenizer())
        scheduler = diffusers.DDIMScheduler(steps_offset=1, clip_sample=False, prediction_type=prediction_type)
        return diffusers.StableDiffusionXLPipeline(vae(), *words, unet(True), scheduler)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    if family == "sd3":
        words = (text_encoder(True), clip_tokenizer(), text_encoder(True), clip_tokenizer())
        long = (t5_encoder(2 * WIDTH), t5_tokenizer())
        return diffusers.StableDiffusion3Pipeline(sd3(), scheduler, vae(), *words, *long)
    return diffusers.FluxPipeline(
        scheduler, vae(), text_encoder(), clip_tokenizer(), t5_encoder(), t5_tokenizer(), flux()
    )


def save(family: str, folder: Path, **options: Any) -> str:
    pipeline(family, **options).save_pretrained(folder)
    return str(folder)
