"""Random models, configurations and orders of operations: whatever is done, the base stays, and names and outputs agree.

Fifty examples in an ordinary run, the same ones each time. Five hundred fresh ones, as every night:

    LIGHTNING_OFT_EXAMPLES=nightly python -m pytest tests/test_properties.py
"""

from __future__ import annotations

import copy
import io
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from random_nets import RandomNet, configs, ids, nets
from torch import Tensor, nn

from lightning_oft import (
    delete_adapter,
    disable_adapters,
    inject,
    load_adapter,
    merge,
    oft_layers,
    project,
    save_adapter,
    set_adapter,
    unload,
    unmerge,
)
from lightning_oft.config import OFTConfig
from lightning_oft.formats.checkpoint import is_rotation_key
from lightning_oft.layers import Rotation, state_of
from lightning_oft.model import saved_modules as trained
from lightning_oft.model.traversal import merged_layers, walk

_PROFILES: dict[str, dict[str, Any]] = {
    "ordinary": {"max_examples": 50, "derandomize": True},
    "nightly": {"max_examples": 500, "print_blob": True},
}
_CHOSEN = settings(
    deadline=None,
    suppress_health_check=list(HealthCheck),
    **_PROFILES[os.environ.get("LIGHTNING_OFT_EXAMPLES", "ordinary")],
)
pytestmark = [
    pytest.mark.filterwarnings("ignore:adapter .* is not active"),
    pytest.mark.filterwarnings("ignore:block sizes adjusted"),
    pytest.mark.filterwarnings("ignore:PEFT cannot represent"),
    pytest.mark.filterwarnings("ignore:this adapter uses the series of PEFT before 0.18"),
]


class World:
    """A model under test, what it was before any adapter, and which adapters it should have and apply."""

    def __init__(self, net: RandomNet) -> None:
        self.net: nn.Module = net
        self.base = copy.deepcopy(net)
        self.trainable = [name for name, p in net.named_parameters() if p.requires_grad]
        self.configs: dict[str, OFTConfig] = {}
        self.active: list[str] = []
        self.exact = True
        self.seen: list[int] = []

    @property
    def merged(self) -> bool:
        return bool(merged_layers(walk(self.net)))

    def output(self, net: nn.Module | None = None) -> Tensor:
        """What a model says in eval mode; its mode is as before afterwards."""
        net = self.net if net is None else net
        mode = net.training
        with torch.no_grad():
            answer: Tensor = net.eval()(ids())
        net.train(mode)
        return answer

    def owned(self) -> set[str]:
        """Names of the tensors that have another owner than the base now, by all their names."""
        live = {id(tensor) for _, tensor, slot in trained.saved_tensors(walk(self.net)) if slot.live != trained.BASE}
        state = {
            **dict(self.net.named_parameters(remove_duplicate=False)),
            **dict(self.net.named_buffers(remove_duplicate=False)),
        }
        return {name for name, tensor in state.items() if id(tensor) in live}

    def check(self) -> None:
        """What holds at any time."""
        state, base = self.net.state_dict(), self.base.state_dict()
        assert [name for name in state if not is_rotation_key(name)] == list(base)
        assert not self.merged or list(state) == list(base)
        named = {
            **dict(self.net.named_parameters(remove_duplicate=False)),
            **dict(self.net.named_buffers(remove_duplicate=False)),
        }
        turned = {id(parameter) for layer in oft_layers(self.net).values() for parameter in layer.parameters()}
        owned = self.owned()
        for name, value in base.items():
            if name in owned or (self.merged and id(named[name]) in turned):
                continue
            if self.exact:
                assert torch.equal(state[name], value), name
            else:
                torch.testing.assert_close(state[name], value, rtol=1e-4, atol=1e-4)
        if self.configs:
            parameters = dict(self.net.named_parameters())
            assert not [
                n for n, p in parameters.items() if p.requires_grad and not is_rotation_key(n) and n not in owned
            ]
        assert all(bool(tensor.isfinite().all()) for tensor in state.values())
        assert [type(module) for module in self._modules(self.net)] == [
            type(m) for m in self._modules(self.base)
        ] or not self.merged

    @staticmethod
    def _modules(net: nn.Module) -> Iterator[nn.Module]:
        return (module for name, module in net.named_modules() if "oft_R" not in name.split("."))


def _close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-5)


def _refusal(call: Callable[[], object]) -> str | None:
    try:
        call()
    except ValueError as error:
        return str(error)
    return None


# ---- operations: each leaves the world as it should be, or does nothing where it does not apply -----------------------


def add_adapter(world: World, draw: st.DrawFn) -> None:
    name = draw(st.sampled_from(["one", "two"]))
    if world.merged or name in world.configs:
        return
    config = draw(configs())
    before, first = world.output(), not world.configs
    state = {key: value.clone() for key, value in world.net.state_dict().items()}
    if (refusal := _refusal(lambda: inject(world.net, config, name))) is not None:
        assert refusal.isprintable()
        assert all(torch.equal(value, state[key]) for key, value in world.net.state_dict().items())
        return
    world.configs[name] = config
    if first:
        world.active = [name]
    else:
        set_adapter(world.net, world.active)
    if config.init_weights or not first:
        _close(world.output(), before)


def choose(world: World, draw: st.DrawFn) -> None:
    if world.merged or not world.configs:
        return
    names = draw(st.permutations(sorted(world.configs)))[: draw(st.integers(1, len(world.configs)))]
    before = world.output()
    if (refusal := _refusal(lambda: set_adapter(world.net, names, trainable=names[:1]))) is not None:
        assert "both train" in refusal
        assert torch.equal(world.output(), before)
        return
    world.active = names


def train(world: World, draw: st.DrawFn) -> None:
    parameters = [p for p in world.net.parameters() if p.requires_grad]
    if world.merged or not parameters or not world.configs:
        return
    torch.manual_seed(0)
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    for step in range(draw(st.integers(1, 3))):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(world.net(ids(step)).flatten(0, 1), ids(step).flatten())
        if loss.requires_grad:
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            project(world.net)


def turn_mode(world: World, draw: st.DrawFn) -> None:
    world.net.train(draw(st.booleans()))


def save_and_load(world: World, draw: st.DrawFn) -> None:
    """An adapter's files, put on a fresh copy of the base, compute what the adapter alone computes here."""
    if not world.configs:
        return
    name = draw(st.sampled_from(sorted(world.configs)))
    other = copy.deepcopy(world.base)
    with tempfile.TemporaryDirectory() as directory:
        save_adapter(world.net, directory, name)
        assert load_adapter(other, directory) == [n for n, layer in oft_layers(world.net).items() if _has(layer, name)]
    if world.merged:
        return
    set_adapter(world.net, name)
    _close(world.output(other), world.output())
    set_adapter(world.net, world.active)
    unload(other)
    assert all(torch.equal(value, world.base.state_dict()[key]) for key, value in other.state_dict().items())


def _has(layer: nn.Module, name: str) -> bool:
    state = state_of(layer)
    return state is not None and name in state.configs


def fold(world: World, draw: st.DrawFn) -> None:
    if not world.configs or world.merged:
        return
    before = world.output()
    keep = draw(st.sampled_from(["always", "auto", "never"]))
    merge(world.net, keep_base=keep)
    world.exact = world.exact and keep != "never"
    _close(world.output(), before)


def unfold(world: World, draw: st.DrawFn) -> None:
    if world.merged:
        before = world.output()
        unmerge(world.net)
        _close(world.output(), before)


def ask_the_base(world: World, draw: st.DrawFn) -> None:
    if world.merged:
        return
    before = world.output()
    with disable_adapters(world.net):
        # Not to the bit: torch folds a batched product or not by requires_grad of its operands, which is off here.
        tolerance = 1e-6 if world.exact else 1e-4
        torch.testing.assert_close(world.output(), world.output(world.base), rtol=tolerance, atol=tolerance)
    assert torch.equal(world.output(), before)


def copy_it(world: World, draw: st.DrawFn) -> None:
    before = world.output()
    if draw(st.booleans()):
        world.net = copy.deepcopy(world.net)
    else:
        buffer = io.BytesIO()
        torch.save(world.net, buffer)
        buffer.seek(0)
        world.net = torch.load(buffer, weights_only=False)
    assert torch.equal(world.output(), before)


def reload_state(world: World, draw: st.DrawFn) -> None:
    before = world.output()
    state = {name: value.clone() for name, value in world.net.state_dict().items()}
    world.net.load_state_dict(state)
    assert torch.equal(world.output(), before)


def project_again(world: World, draw: st.DrawFn) -> None:
    def weights() -> list[torch.Tensor]:
        return [m.weight.clone() for m in world.net.modules() if isinstance(m, Rotation)]

    before = weights()
    free = [m.ball is None and m.reach is None for m in world.net.modules() if isinstance(m, Rotation)]
    project(world.net)
    once = weights()
    assert all(torch.equal(a, b) for a, b, is_free in zip(once, before, free, strict=True) if is_free)
    project(world.net)
    assert all(torch.equal(a, b) for a, b in zip(weights(), once, strict=True))


def delete_one(world: World, draw: st.DrawFn) -> None:
    if world.merged or not world.configs:
        return
    name = draw(st.sampled_from(sorted(world.configs)))
    before = world.output()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="adapter .* was active and is deleted")
        delete_adapter(world.net, name)
    del world.configs[name]
    was_silent = name not in world.active
    world.active = [other for other in world.active if other != name] or list(world.configs)[:1]
    if was_silent:
        _close(world.output(), before)
    if not world.configs:
        assert list(world.net.state_dict()) == list(world.base.state_dict())
        assert [name for name, p in world.net.named_parameters() if p.requires_grad] == world.trainable


def take_out(world: World, draw: st.DrawFn) -> None:
    """Unload: the base returns, or after a merge a plain model that computes the same."""
    merged, before = world.merged, world.output()
    unload(world.net)
    assert not oft_layers(world.net)
    assert list(world.net.state_dict()) == list(world.base.state_dict())
    if merged:
        _close(world.output(), before)
        world.base = copy.deepcopy(world.net)  # type: ignore[assignment]
        world.exact = True
    else:
        assert [name for name, p in world.net.named_parameters() if p.requires_grad] == world.trainable
        if world.exact:
            assert torch.equal(world.output(), world.output(world.base))
    world.configs, world.active = {}, []


OPERATIONS: list[Callable[[World, st.DrawFn], None]] = [
    add_adapter, choose, train, turn_mode, save_and_load, fold, unfold, ask_the_base, copy_it, reload_state, project_again, delete_one, take_out,
]  # fmt: skip


@_CHOSEN
@given(st.data())
def test_any_order_of_operations_keeps_the_base_and_the_names(data: st.DataObject) -> None:
    world = World(data.draw(nets()))
    add_adapter(world, data.draw)
    for operation in data.draw(st.lists(st.sampled_from(OPERATIONS), min_size=1, max_size=10)):
        operation(world, data.draw)
        world.check()


@_CHOSEN
@given(st.data())
def test_the_whole_life_of_an_adapter(data: st.DataObject) -> None:
    world = World(data.draw(nets()))
    add_adapter(world, data.draw)
    assume(world.configs)
    for operation in (train, save_and_load, ask_the_base, fold, copy_it, unfold, train, ask_the_base, take_out):
        operation(world, data.draw)
        world.check()
