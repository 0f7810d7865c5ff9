"""One walk over the model per public call, however it is walked: `walk`, `modules()`, `parameters()`, `train()` ..."""

from __future__ import annotations

from collections.abc import Callable, ItemsView, Iterator, ValuesView
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_oft import (
    OFTConfig,
    delete_adapter,
    disable_adapters,
    inject,
    load_adapter,
    merge,
    merged,
    oft_layers,
    project,
    save_adapter,
    set_adapter,
    unload,
    unmerge,
)
from lightning_oft.model import put, take


class Counted(dict[str, Any]):
    """The children of a module, counting how often they are gone through."""

    walks = 0

    def items(self) -> ItemsView[str, Any]:
        self.walks += 1
        return super().items()

    def values(self) -> ValuesView[Any]:
        self.walks += 1
        return super().values()

    def __iter__(self) -> Iterator[str]:
        self.walks += 1
        return super().__iter__()


class Net(nn.Module):
    """What the surgery treats in its own way: norms, a packed attention, an encoder, a shared module, tied weights."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(5), nn.Linear(8, 8))
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2)
        self.head = nn.ModuleDict({"out": nn.Sequential(nn.Linear(8, 4)), "again": self.body})
        self.body[2].weight = self.body[0].weight

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.head["out"](self.encoder(self.body(x)))
        return output


def _counters(model: nn.Module) -> list[Counted]:
    """A counter at every module that holds others but is no adapted layer: those are asked one by one."""
    adapted = set(map(id, oft_layers(model).values()))
    holders = [m for m in model.modules() if m._modules and id(m) not in adapted and "oft_R" not in m._modules]
    holders = [m for m in holders if not isinstance(m, nn.MultiheadAttention)]
    inside = {id(m) for layer in oft_layers(model).values() for m in layer.modules()}
    for module in holders:
        if id(module) not in inside:
            module.__dict__["_modules"] = Counted(module._modules)
    return [m._modules for m in holders if isinstance(m._modules, Counted)]


def _net(*adapters: str) -> nn.Module:
    torch.manual_seed(0)
    model = Net().eval()
    for name in adapters:
        config = OFTConfig(oft_block_size=4, target_modules="all-linear", modules_to_save=["out"], bias="all")
        inject(model, config, name)
    return model


def _no_op(model: nn.Module, tmp_path: Path) -> None:
    return None


def _within(context: Callable[[nn.Module], AbstractContextManager[None]], model: nn.Module) -> None:
    with context(model):
        pass


CALLS: dict[str, tuple[list[str], Callable[[nn.Module, Path], object], Callable[[nn.Module, Path], object]]] = {
    "inject": ([], _no_op, lambda m, _: inject(m, OFTConfig(oft_block_size=4, modules_to_save=["out"], bias="all"))),
    "set_adapter": (["a", "b"], _no_op, lambda m, _: set_adapter(m, "b")),
    "disable_adapters": (["a"], _no_op, lambda m, _: _within(disable_adapters, m)),
    "merge": (["a"], _no_op, lambda m, _: merge(m)),
    "merge_named": (["a", "b"], _no_op, lambda m, _: merge(m, "b")),
    "merged": (["a"], _no_op, lambda m, _: _within(merged, m)),
    "unmerge": (["a"], lambda m, _: merge(m), lambda m, _: unmerge(m)),
    "project": (["a"], _no_op, lambda m, _: project(m)),
    "oft_layers": (["a"], _no_op, lambda m, _: oft_layers(m)),
    "delete_adapter": (["a", "b"], _no_op, lambda m, _: delete_adapter(m, "b")),
    "delete_last": (["a"], _no_op, lambda m, _: delete_adapter(m, "a")),
    "unload": (["a"], _no_op, lambda m, _: unload(m)),
    "unload_merged": (["a"], lambda m, _: merge(m), lambda m, _: unload(m)),
    "take": (["a"], _no_op, lambda m, _: take(m, "a")),
    "put": ([], _no_op, lambda m, _: put(m, take(_net("a"), "a"))),
    "put_again": (["a"], _no_op, lambda m, _: put(m, take(_net("a"), "a"))),
    "save_adapter": (["default"], _no_op, lambda m, path: save_adapter(m, path)),
    "load_adapter": ([], lambda _, path: save_adapter(_net("default"), path), lambda m, path: load_adapter(m, path)),
}
TWICE = {"load_adapter"}
"""It refuses a merged model before it reads a file of gigabytes, and `put` asks again when it has read it."""


@pytest.mark.filterwarnings("ignore:adapter .* is not active", "ignore:enable_nested_tensor is True")
@pytest.mark.filterwarnings("ignore:block sizes adjusted", "ignore:PEFT cannot represent")
@pytest.mark.parametrize("name", CALLS)
def test_a_public_call_walks_the_model_once(name: str, tmp_path: Path) -> None:
    adapters, before, call = CALLS[name]
    model = _net(*adapters)
    before(model, tmp_path)
    counters = _counters(model)
    for counter in counters:
        counter.walks = 0
    call(model, tmp_path)
    walks = [counter.walks for counter in counters]
    assert len(walks) >= 5
    assert 1 <= max(walks) <= (2 if name in TWICE else 1), walks


def test_the_counter_sees_every_way_of_walking() -> None:
    model = _net()
    counters = _counters(model)
    for walk in (lambda: list(model.modules()), lambda: list(model.parameters()), model.train, model.state_dict):
        seen = [counter.walks for counter in counters]
        walk()
        assert all(counter.walks > before for counter, before in zip(counters, seen, strict=True))
    assert torch.is_tensor(model(torch.randn(2, 5, 8)))
