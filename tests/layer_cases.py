"""The table of layer kinds that many tests run over: a builder and an input for each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from transformers import GptOssConfig, MixtralConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.mixtral.modeling_mixtral import MixtralExperts
from transformers.pytorch_utils import Conv1D

from lightning_oft import OFTConfig, functional, oft_layers
from lightning_oft.layers import Rotation


class Case(NamedTuple):
    """A layer inside a model, under the name `layer`."""

    build: Callable[[], nn.Module]
    inputs: Callable[[], tuple[Tensor, ...]]


def _floats(*shape: int) -> Callable[[], tuple[Tensor, ...]]:
    return lambda: (torch.randn(*shape),)


def _ids(*shape: int) -> Callable[[], tuple[Tensor, ...]]:
    return lambda: (torch.randint(0, 11, shape),)


class SelfAttention(nn.Module):
    """One nn.MultiheadAttention over one, or over three different, inputs."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.layer = nn.MultiheadAttention(8, 2, **options)

    def forward(self, query: Tensor, key: Tensor | None = None, value: Tensor | None = None) -> Tensor:
        key = query if key is None else key
        attended: Tensor = self.layer(query, key, key if value is None else value)[0]
        return attended


class Holder(nn.Module):
    """A model with one layer."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, *inputs: Tensor) -> Tensor:
        output: Tensor = self.layer(*inputs)
        return output


class Mixture(nn.Module):
    """The experts of a mixture, each hit, with a choice of them that no rotation changes."""

    def __init__(self, experts: type[nn.Module], options: Any, implementation: str) -> None:
        super().__init__()
        options._experts_implementation = implementation
        self.layer = experts(options)  # type: ignore[call-arg]
        for parameter in self.layer.parameters():
            nn.init.normal_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        chosen = torch.arange(2 * len(x)).view(-1, 2) % 4
        mixed: Tensor = self.layer(x, chosen, torch.linspace(0.1, 1, 2 * len(x), dtype=x.dtype).view(-1, 2))
        return mixed


def _held(build: Callable[..., nn.Module], *args: Any, **options: Any) -> Callable[[], nn.Module]:
    return lambda: Holder(build(*args, **options))


EXPERTS: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 24, "num_local_experts": 4}
KINDS: dict[str, Case] = {
    "linear_2d": Case(_held(nn.Linear, 12, 6), _floats(3, 12)),
    "linear_3d": Case(_held(nn.Linear, 12, 6, bias=False), _floats(3, 5, 12)),
    "conv1d_hf": Case(_held(Conv1D, 6, 12), _floats(3, 5, 12)),
    "embedding_1d": Case(_held(nn.Embedding, 11, 8, padding_idx=0), _ids(5)),
    "conv2d_1x1": Case(_held(nn.Conv2d, 8, 6, 1), _floats(2, 8, 5, 5)),
    "conv2d_3x3": Case(_held(nn.Conv2d, 4, 6, 3, padding="same"), _floats(2, 4, 6, 6)),
    "conv2d_1x3": Case(_held(nn.Conv2d, 4, 6, (1, 3), stride=2, dilation=(1, 2)), _floats(2, 4, 7, 7)),
    "conv2d_groups": Case(_held(nn.Conv2d, 8, 6, 3, groups=2), _floats(2, 8, 6, 6)),
    "conv2d_depthwise": Case(_held(nn.Conv2d, 6, 6, 3, groups=6), _floats(2, 6, 6, 6)),
    "conv2d_reflect": Case(_held(nn.Conv2d, 4, 6, 3, padding=1, padding_mode="reflect"), _floats(4, 6, 6)),
    "conv1d": Case(_held(nn.Conv1d, 4, 6, 3), _floats(2, 4, 9)),
    "conv3d": Case(_held(nn.Conv3d, 4, 6, (1, 3, 3)), _floats(2, 4, 3, 5, 5)),
    "conv_transpose1d": Case(_held(nn.ConvTranspose1d, 4, 6, 3, stride=2, output_padding=1), _floats(2, 4, 5)),
    "conv_transpose2d_groups": Case(_held(nn.ConvTranspose2d, 8, 6, 3, groups=2), _floats(2, 8, 5, 5)),
    "conv_transpose3d": Case(_held(nn.ConvTranspose3d, 4, 2, 2, dilation=2), _floats(1, 4, 3, 3, 3)),
    "attention": Case(lambda: SelfAttention(batch_first=True), _floats(2, 5, 8)),
    "attention_no_bias": Case(lambda: SelfAttention(bias=False, add_zero_attn=True), _floats(5, 2, 8)),
    "attention_bias_kv": Case(lambda: SelfAttention(add_bias_kv=True), _floats(5, 2, 8)),
    "attention_kdim_vdim": Case(
        lambda: SelfAttention(batch_first=True, kdim=12, vdim=6),
        lambda: (torch.randn(2, 5, 8), torch.randn(2, 4, 12), torch.randn(2, 4, 6)),
    ),
    "experts": Case(lambda: Mixture(MixtralExperts, MixtralConfig(**EXPERTS), "batched_mm"), _floats(6, 16)),
    "experts_transposed": Case(lambda: Mixture(GptOssExperts, GptOssConfig(**EXPERTS), "eager"), _floats(6, 16)),
}


def config(**options: Any) -> OFTConfig:
    """A configuration that adapts the layer of any case; block size 3 for fan-ins like 9, 4 for the rest."""
    return OFTConfig(**{"oft_block_size": 4, "target_modules": ["layer"], **options})


def randomize(model: nn.Module, std: float = 0.1, adapter_name: str = "default", seed: int = 0) -> None:
    """Random generators for one adapter of every layer."""
    generator = torch.Generator().manual_seed(seed)
    for layer in oft_layers(model).values():
        for module in layer.oft_R[adapter_name].modules():  # type: ignore[index, operator, union-attr]
            if isinstance(module, Rotation):
                noise = torch.randn(module.weight.shape, generator=generator)
                module.weight.data.copy_(noise * std)


def rotations(model: nn.Module) -> dict[str, Rotation]:
    """The rotation of each layer, by its name."""
    return {name: layer.oft_R["default"] for name, layer in oft_layers(model).items()}  # type: ignore[index, misc]


def gradients(model: nn.Module) -> dict[str, Tensor | None]:
    """The gradient of each layer's generators, by its name."""
    return {name: rotation.weight.grad for name, rotation in rotations(model).items()}


def computed_maps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many generators each map was computed for, from now on."""
    sizes: list[int] = []
    plain = functional.rotations_of

    def counted(generators: Any, *args: Any, **options: Any) -> Any:
        sizes.append(len(generators))
        return plain(generators, *args, **options)

    for place in (functional, functional.maps):
        monkeypatch.setattr(place, "rotations_of", counted)
    return sizes


def relative(a: Tensor, b: Tensor) -> float:
    """||a - b|| / ||b|| in float64."""
    return float((a.detach().double() - b.detach().double()).norm() / b.detach().double().norm())
