"""Models and adapters that `python examples/benchmarks/speed.py` measures; all weights are random."""

from __future__ import annotations

import copy
import importlib.util
import warnings
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM, ViTConfig, ViTForImageClassification

from lightning_oft import OFTConfig, inject

BASE, LORA, OFT, OFT_EXACT = "frozen base", "PEFT LoRA r=16", "PEFT OFT", "PEFT OFT exact"
OURS, OURS_EXACT = "ours", "ours exact"
BASE_COMPILED, OURS_COMPILED = "frozen base compiled", "ours compiled"
VARIANTS = (BASE, LORA, OFT, OFT_EXACT, OURS, OURS_EXACT, BASE_COMPILED, OURS_COMPILED)
HAS_PEFT = importlib.util.find_spec("peft") is not None
CHOSEN = tuple(name for name in VARIANTS[:6] if HAS_PEFT or not name.startswith("PEFT"))
"""What is measured; the compiled ones only where asked for."""
ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
CONVOLUTIONS = ["conv1", "conv2"]
Targets = str | list[str]


@dataclass
class Case:
    """A model with what a step feeds it; `inputs` ask for a gradient, or the frozen base would have no backward."""

    name: str
    base: nn.Module
    loss: Callable[[nn.Module], Tensor]
    inputs: list[Tensor]
    tokens: int
    targets: Targets = "all-linear"
    models: dict[str, nn.Module] = field(default_factory=dict)

    def step(self, model: nn.Module) -> None:
        """Forward and backward; no optimizer, which is the same for all."""
        self.loss(model).backward()

    def clear(self, model: nn.Module) -> None:
        """Leave no gradient for the next step to add to."""
        for tensor in (*self.inputs, *model.parameters()):
            tensor.grad = None


def adapt(model: nn.Module, variant: str, targets: Targets, block_size: int = 32) -> nn.Module:
    """Put a variant's adapter into a model, in place. It starts at the identity."""
    exact = variant in (OFT_EXACT, OURS_EXACT)
    if variant in (BASE, BASE_COMPILED):
        return model
    if variant in (OURS, OURS_EXACT, OURS_COMPILED):
        config = OFTConfig(oft_block_size=block_size, target_modules=targets, use_cayley_neumann=not exact)
        inject(model, config)
        return model
    import peft

    chosen: Any = peft.LoraConfig(r=16, lora_alpha=16, target_modules=targets)
    if variant != LORA:
        options: Any = {"use_cayley_neumann": not exact, "num_cayley_neumann_terms": 6}
        chosen = peft.OFTConfig(oft_block_size=block_size, target_modules=targets, **options)
    return peft.get_peft_model(model, chosen)  # type: ignore[arg-type]


@torch.no_grad()
def disturb(model: nn.Module) -> nn.Module:
    """Small random adapters stand for trained ones."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter), alpha=0.01)
    return model


def build(
    base: nn.Module, names: Collection[str], targets: Targets, block_size: int, share: bool = True
) -> dict[str, nn.Module]:
    """The base without an adapter and with each. `share`: all use one copy of the frozen weights; never to be merged."""
    models = {}
    for name in names:
        memo = {id(tensor): tensor for tensor in (*base.parameters(), *base.buffers())} if share else {}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PEFT's deprecations
            model = disturb(adapt(copy.deepcopy(base, memo), name, targets, block_size))
        models[name] = _compiled(model) if name.endswith("compiled") else model
    return models  # type: ignore[return-value]


def _compiled(model: nn.Module) -> Any:
    """Compiled with guards on hooks: without, the adapted model runs the code that was compiled for its bare twin."""
    import torch._dynamo

    torch._dynamo.config.skip_nnmodule_hook_guards = False
    return torch.compile(model, dynamic=False)


def adapted_layers(model: nn.Module) -> int:
    return sum(1 for name, _ in model.named_modules() if name.endswith(("oft_R", "lora_A")))


def layers_for(hidden: int) -> int:
    """Eight layers down to one, so that a model fits the memory and the time: 4 at 768, 1 from 2,048 on."""
    return max(1, min(8, 4 * 768**2 // hidden**2))


def llama(hidden: int, layers: int, batch: int, length: int, device: str, dtype: torch.dtype) -> Case:
    """Llama's proportions: 4096/11008, heads of 64; a small vocabulary, as the head is not adapted."""
    torch.manual_seed(0)
    heads = max(hidden // 64, 1)
    sizes: dict[str, Any] = {
        "hidden_size": hidden,
        "intermediate_size": max(hidden * 43 // 16 // 64 * 64, 64),
        "num_hidden_layers": layers,
        "max_position_embeddings": max(length, 2048),
    }
    with torch.device(device):
        config = LlamaConfig(**sizes, num_attention_heads=heads, num_key_value_heads=heads, vocab_size=512)
        base: Any = LlamaForCausalLM(config).to(dtype).requires_grad_(False).train()
        tokens = torch.randint(512, (batch, length))
        embeds = base.get_input_embeddings()(tokens).detach().requires_grad_()

    def loss(model: Any) -> Tensor:
        return model(inputs_embeds=embeds, labels=tokens, use_cache=False).loss  # type: ignore[no-any-return]

    return Case(f"Llama {hidden} x {layers}", base, loss, [embeds], batch * length)


def vit(hidden: int, layers: int, device: str, dtype: torch.dtype, size: int = 256, batch: int = 4) -> Case:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": hidden, "num_hidden_layers": layers, "intermediate_size": 4 * hidden}
    with torch.device(device):
        config = ViTConfig(**sizes, num_attention_heads=max(hidden // 64, 1), image_size=size, patch_size=16)
        base: Any = ViTForImageClassification(config).to(dtype).requires_grad_(False).train()
        pixels = torch.randn(batch, 3, size, size, dtype=dtype, requires_grad=True)
    names = [name for name, layer in base.named_modules() if isinstance(layer, nn.Linear) and name != "classifier"]

    def loss(model: Any) -> Tensor:
        return model(pixel_values=pixels).logits.square().mean()  # type: ignore[no-any-return]

    return Case(f"ViT {hidden} x {layers}", base, loss, [pixels], batch * (size // 16) ** 2, names)


def unet(channels: int, device: str, dtype: torch.dtype, convolutions: bool, size: int = 32, batch: int = 2) -> Case:
    """Of Stable Diffusion's kind: diffusers' own where it is installed, else a small one with the same names."""
    torch.manual_seed(0)
    has_diffusers = importlib.util.find_spec("diffusers") is not None
    with torch.device(device):
        base = (_diffusers_unet if has_diffusers else SmallUNet)(channels)
        base.to(dtype).requires_grad_(False).train()
        sample = torch.randn(batch, 4, size, size, dtype=dtype, requires_grad=True)
        text = torch.randn(batch, 77, 256, dtype=dtype)
        time = torch.full((batch,), 10)

    def loss(model: nn.Module) -> Tensor:
        return model(sample, time, text)[0].square().mean()  # type: ignore[no-any-return]

    made = "diffusers" if has_diffusers else "own"
    name = f"UNet {channels} ({made}), attention" + (" and convolutions" if convolutions else "")
    targets = ATTENTION + CONVOLUTIONS if convolutions else ATTENTION
    return Case(name, base, loss, [sample], batch * size * size, targets)


def _diffusers_unet(channels: int) -> nn.Module:
    from diffusers import UNet2DConditionModel

    model: nn.Module = UNet2DConditionModel(
        block_out_channels=(channels, 2 * channels),
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=256,
        attention_head_dim=channels // 32,
        layers_per_block=1,
    )
    return model


class Attention(nn.Module):
    """Attention of pixels to themselves, or to a text."""

    def __init__(self, width: int, context: int) -> None:
        super().__init__()
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_k = nn.Linear(context, width, bias=False)
        self.to_v = nn.Linear(context, width, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(width, width)])

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """x: (batch, pixels, width), context: (batch, tokens, context) -> like x."""
        q, k, v = (
            part.unflatten(-1, (-1, 32)).transpose(1, 2)
            for part in (self.to_q(x), self.to_k(context), self.to_v(context))
        )
        out: Tensor = self.to_out[0](F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return out


class Level(nn.Module):
    """Two convolutions with a residual, then a transformer block."""

    def __init__(self, fan_in: int, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(32, fan_in), nn.GroupNorm(32, width)
        self.conv1 = nn.Conv2d(fan_in, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(fan_in, width, 1)
        self.time = nn.Linear(64, width)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3))
        self.attn1, self.attn2 = Attention(width, width), Attention(width, 256)
        self.ff = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor, time: Tensor, text: Tensor) -> Tensor:
        """x: (batch, channels, height, width) -> the same with this level's channels."""
        hidden = self.conv1(F.silu(self.norm1(x))) + self.time(time)[..., None, None]
        x = self.conv_shortcut(x) + self.conv2(F.silu(self.norm2(hidden)))
        pixels = x.flatten(2).transpose(1, 2)
        normed = self.norms[0](pixels)
        pixels = pixels + self.attn1(normed, normed)
        pixels = pixels + self.attn2(self.norms[1](pixels), text)
        pixels = pixels + self.ff(self.norms[2](pixels))
        return pixels.transpose(1, 2).reshape(x.shape)


class SmallUNet(nn.Module):
    """Two resolutions, one level each way and one in the middle."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(4, channels, 3, padding=1)
        self.down = nn.ModuleList([Level(channels, channels), Level(channels, 2 * channels)])
        self.mid = Level(2 * channels, 2 * channels)
        self.up = nn.ModuleList([Level(4 * channels, 2 * channels), Level(3 * channels, channels)])
        self.conv_out = nn.Conv2d(channels, 4, 3, padding=1)

    def forward(self, x: Tensor, time: Tensor, text: Tensor) -> tuple[Tensor]:
        """x: (batch, 4, height, width) -> the noise in it, as diffusers returns it: first of a tuple."""
        angles = time[:, None] * torch.logspace(0, -4, 32, device=x.device)
        time = torch.cat([angles.sin(), angles.cos()], -1).to(x.dtype)
        first = self.down[0](self.conv_in(x), time, text)
        second = self.down[1](F.avg_pool2d(first, 2), time, text)
        x = self.up[0](torch.cat([self.mid(second, time, text), second], 1), time, text)
        x = self.up[1](torch.cat([F.interpolate(x, scale_factor=2.0), first], 1), time, text)
        return (self.conv_out(x),)
