"""Random small models that mix every kind of layer, and random configurations for them, as hypothesis strategies."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lightning_oft import OFTConfig

WIDTH, WORDS = 8, 11
BLOCKS = (
    "linear",
    "conv",
    "grouped conv",
    "transposed conv",
    "attention",
    "batch norm",
    "layer norm",
    "Conv1D",
    "conv2d",
    "again",
)


class Channels(nn.Module):
    """A layer over (batch, channels, positions), in a model whose activations are (batch, positions, channels)."""

    def __init__(self, layer: nn.Module, image: bool = False) -> None:
        super().__init__()
        self.layer, self.image = layer, image

    def forward(self, x: Tensor) -> Tensor:
        x = x.mT.unsqueeze(-1) if self.image else x.mT
        y: Tensor = self.layer(x.contiguous())
        return (y.squeeze(-1) if self.image else y).mT


class SelfAttention(nn.Module):
    """Attention to oneself, with the projections packed or apart."""

    def __init__(self, packed: bool) -> None:
        super().__init__()
        sizes: dict[str, int] = {} if packed else {"kdim": WIDTH, "vdim": WIDTH}
        self.mha = nn.MultiheadAttention(WIDTH, 2, batch_first=True, **sizes)
        if not packed:
            self.mha = nn.MultiheadAttention(WIDTH, 2, batch_first=True, kdim=WIDTH, vdim=WIDTH // 2)

    def forward(self, x: Tensor) -> Tensor:
        value = x if self.mha.vdim == WIDTH else x[..., : WIDTH // 2]
        attended: Tensor = self.mha(x, x, value, need_weights=False)[0]
        return attended


def _block(kind: str, packed: bool) -> nn.Module:
    made: dict[str, Any] = {
        "linear": lambda: nn.Linear(WIDTH, WIDTH, bias=packed),
        "conv": lambda: Channels(nn.Conv1d(WIDTH, WIDTH, 3, padding=1)),
        "grouped conv": lambda: Channels(nn.Conv1d(WIDTH, WIDTH, 3, padding=1, groups=2)),
        "transposed conv": lambda: Channels(nn.ConvTranspose1d(WIDTH, WIDTH, 3, padding=1, groups=2 if packed else 1)),
        "conv2d": lambda: Channels(nn.Conv2d(WIDTH, WIDTH, (3, 1), padding=(1, 0)), image=True),
        "attention": lambda: SelfAttention(packed),
        "batch norm": lambda: Channels(nn.BatchNorm1d(WIDTH)),
        "layer norm": lambda: nn.LayerNorm(WIDTH),
        "Conv1D": lambda: Conv1D(WIDTH, WIDTH),
    }
    module: nn.Module = made[kind]()
    return module


class RandomNet(nn.Module):
    """Word ids (batch, positions) -> scores; `again` calls an earlier block a second time, the head may be tied."""

    def __init__(self, kinds: list[str], packed: bool, tied: bool) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, WIDTH)
        made: list[nn.Module] = []
        for kind in kinds:
            if kind != "again":
                made.append(_block(kind, packed))
            elif made:
                made.append(made[0])
        self.blocks = nn.ModuleList(made)
        self.head = nn.Linear(WIDTH, WORDS)
        if tied:
            self.head.weight = self.words.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.words(ids)
        for block in self.blocks:
            x = x + torch.tanh(block(x))
        scores: Tensor = self.head(x)
        return scores


@st.composite
def nets(draw: st.DrawFn) -> RandomNet:
    """A model with random weights, in train or eval mode; norms have seen data, some parameters are frozen already."""
    torch.manual_seed(draw(st.integers(0, 1000)))
    kinds = draw(st.lists(st.sampled_from(BLOCKS), min_size=1, max_size=5))
    net = RandomNet(kinds, packed=draw(st.booleans()), tied=draw(st.booleans()))
    net.train()(ids())
    if draw(st.booleans()):
        net.head.requires_grad_(False)
    if draw(st.booleans()):  # somebody's hooks, which change what layers take and give
        net.words.register_forward_hook(_shift_output)
        for module in net.modules():
            if isinstance(module, nn.Linear):
                module.register_forward_pre_hook(_shift_input)
    return net.train(draw(st.booleans()))


def _shift_input(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (args[0] + 0.1, *args[1:])


def _shift_output(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
    return output + 0.1


def ids(seed: int = 0) -> Tensor:
    """A batch of word ids."""
    return torch.randint(0, WORDS, (4, 6), generator=torch.Generator().manual_seed(seed))


NAMES = ["words", "head", "mha", "mha.out_proj", "layer", "blocks.0", "blocks.1", "blocks.2"]


@st.composite
def configs(draw: st.DrawFn) -> OFTConfig:
    """A valid configuration; what it selects may still not be there."""
    size = draw(
        st.sampled_from(
            [{"oft_block_size": 2}, {"oft_block_size": 4}, {"oft_block_size": 32}, {"r": 1}, {"r": 2}, {"r": 3}]
        )
    )
    targets = st.one_of(
        st.just("all-linear"),
        st.just(r".*(words|head|mha|layer|blocks\.\d)"),
        st.lists(st.sampled_from(NAMES), min_size=1, unique=True),
    )
    series = draw(st.booleans())
    options: dict[str, Any] = {
        "target_modules": draw(targets),
        "exclude_modules": draw(st.sampled_from([None, None, ["head"], r"blocks\.0.*"])),
        "modules_to_save": draw(st.sampled_from([None, None, ["head"], ["blocks.1"], ["words", "head"]])),
        "bias": draw(st.sampled_from(["none", "none", "oft_only", "all"])),
        "use_cayley_neumann": series,
        "num_cayley_neumann_terms": draw(st.integers(2, 9)) if series else 6,
        "neumann_series": draw(st.sampled_from(["halved", "halved", "unhalved"])),
        "block_share": draw(st.booleans()),
        "module_dropout": draw(st.sampled_from([0.0, 0.0, 0.5])),
        "init_weights": draw(st.sampled_from([True, True, False])),
        **draw(
            st.sampled_from(
                [
                    {},
                    {},
                    {"coft": True, "eps": 1e-3},
                    {"max_angle": 10.0},
                    {"coft": True, "coft_radius": "peft", "eps": 0.1},
                ]
            )
        ),
    }
    return OFTConfig(**size, **options)
