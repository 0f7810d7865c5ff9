"""Denoisers of diffusers, convolutions included: exact at the start, every rotation learns, merged models are plain."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusion_models as tiny
import pytest
import torch
from layer_cases import relative
from torch import Tensor, nn

from lightning_oft import OFTConfig, inject, merge, oft_layers

CASES = {
    "unet": tiny.unet,
    "unet of SDXL": lambda: tiny.unet(xl=True),
    "SD3": tiny.sd3,
    "Flux": tiny.flux,
}
LAYERS = {"unet": 83, "unet of SDXL": 85, "SD3": 33, "Flux": 28}
DEAD = {"SD3": ["transformer_blocks.1.attn.add_q_proj"]}
"""Layers whose output the model drops: they get no gradient, adapted or not."""


def answer(model: nn.Module, name: str) -> Tensor:
    drawn = torch.Generator().manual_seed(1)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=drawn)

    times, width = torch.tensor([3.0, 700.0]), tiny.WIDTH
    calls: dict[str, Any] = {
        "unet": lambda: (noise(2, 4, 8, 8), times, noise(2, 5, width)),
        "unet of SDXL": lambda: (noise(2, 4, 8, 8), times, noise(2, 5, 2 * width)),
        "SD3": lambda: (noise(2, 4, 8, 8), noise(2, 5, 2 * width), noise(2, 2 * width), times),
        "Flux": lambda: (
            noise(2, 16, 16),
            noise(2, 5, width),
            noise(2, width),
            times / 1000,
            noise(16, 3),
            noise(5, 3),
        ),
    }
    told: dict[str, Any] = {}
    if name == "unet of SDXL":
        told = {"added_cond_kwargs": {"text_embeds": noise(2, width), "time_ids": torch.ones(2, 6)}}
    given: Tensor = model(*calls[name](), **told).sample
    return given


def adapted(name: str) -> tuple[Any, Tensor]:
    """A denoiser with every linear layer and convolution adapted whose fan-in has blocks of 4, and its base's answer."""
    torch.manual_seed(0)
    model = CASES[name]().train()
    with torch.no_grad():  # SD3 and Flux begin with zeros, which would hide what comes before them
        for parameter in model.parameters():
            parameter.copy_(torch.where(parameter == 0, 0.05 * torch.randn_like(parameter), parameter))
    with torch.no_grad():
        base = answer(model, name)
    kinds = (nn.Linear, nn.Conv2d)
    inject(
        model, OFTConfig(oft_block_size=4, target_modules=[n for n, m in model.named_modules() if isinstance(m, kinds)])
    )
    return model, base


def turn(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if "oft_R" in name:
            nn.init.normal_(parameter, std=0.05)


@pytest.mark.parametrize("name", CASES)
def test_exact_at_the_start_and_every_rotation_gets_a_gradient(name: str) -> None:
    model, base = adapted(name)
    given = answer(model, name)
    assert relative(given, base) < 1e-6
    given.square().sum().backward()
    assert len(oft_layers(model)) == LAYERS[name]
    dead = [
        layer
        for layer, module in oft_layers(model).items()
        if all(p.grad is None or not p.grad.any() for n, p in module.named_parameters() if "oft_R" in n)
    ]
    assert dead == DEAD.get(name, [])


@pytest.mark.parametrize("name", CASES)
def test_merged_saved_and_reloaded_it_is_the_same_function(name: str, tmp_path: Path) -> None:
    model, base = adapted(name)
    turn(model)
    model.eval()
    with torch.no_grad():
        ours = answer(model, name)
    assert relative(ours, base) > 0.01
    merge(model)
    model.save_pretrained(tmp_path)
    plain = type(model).from_pretrained(tmp_path)
    assert not oft_layers(plain)
    with torch.no_grad():
        assert relative(answer(plain, name), ours) < 1e-5


@pytest.mark.parametrize("name", CASES)
def test_projections_that_are_fused_before_or_after_are_refused(name: str) -> None:
    model, _ = adapted(name)
    with pytest.raises(RuntimeError, match=r"fuse_qkv_projections\(\) would make one layer of the base weights"):
        model.fuse_qkv_projections()
    fused = CASES[name]()
    fused.fuse_qkv_projections()
    with pytest.raises(ValueError, match=r"to_qkv.*: a copy of projections that were fused"):
        inject(fused, OFTConfig(oft_block_size=4))
    assert not oft_layers(fused)
