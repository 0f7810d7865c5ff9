"""What the callback does with DeepSpeed's engine, on one that stands in for it; the real one is run by
tests/distributed/test_strategies.py where deepspeed is installed."""

from __future__ import annotations

import sys
import types
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_oft import OFTConfig, inject
from lightning_oft.callback import checks, optimizers
from lightning_oft.callback.strategies.deepspeed import DeepSpeedAdapter
from lightning_oft.layers import Rotation
from lightning_oft.model.traversal import walk


class Engine:
    """Trains a float32 copy and writes the parameters from it, every second call, as with two accumulated batches."""

    def __init__(self, rotation: Rotation) -> None:
        self.rotation, self.copy = rotation, rotation.weight.detach().clone()
        self.global_steps = self.calls = 0

    def step(self) -> None:
        self.calls += 1
        if self.calls % 2 == 0:
            self.global_steps += 1
            self.copy += 1.0
            self.rotation.weight.data.copy_(self.copy)


class Optimizer:
    """DeepSpeed's: what it trains are parts of the copy; the parameters stand beside them."""

    def __init__(self, parameters: list[Tensor]) -> None:
        self.param_groups = [{"params": [torch.zeros(3)]}]
        self.bit16_groups = [parameters]


@pytest.fixture
def model() -> nn.Sequential:
    model = nn.Sequential(nn.Linear(8, 8))
    inject(model, OFTConfig(oft_block_size=4, max_angle=10.0))
    return model


@pytest.fixture
def engine(model: nn.Sequential, monkeypatch: pytest.MonkeyPatch) -> Engine:
    rotation = model[0].oft_R["default"]
    engine = Engine(rotation)
    utils = types.ModuleType("deepspeed.utils")
    utils.safe_get_full_fp32_param = lambda weight: engine.copy.clone()  # type: ignore[attr-defined]
    utils.safe_set_full_fp32_param = lambda weight, value: engine.copy.copy_(value)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "deepspeed", types.ModuleType("deepspeed"))
    monkeypatch.setitem(sys.modules, "deepspeed.utils", utils)
    return engine


def _trainer(engine: Engine, model: nn.Module) -> Any:
    strategy = types.SimpleNamespace(model=engine, zero_stage_3=False)
    return types.SimpleNamespace(strategy=strategy, optimizers=[Optimizer(list(model.parameters()))])


def _watch(engine: Engine, model: nn.Module) -> ExitStack:
    undo = ExitStack()
    DeepSpeedAdapter(_trainer(engine, model)).watch_steps(checks.trainable_rotations(walk(model), "default"), undo)
    return undo


def test_real_steps_end_in_the_ball_with_the_copy_that_trains(model: nn.Sequential, engine: Engine) -> None:
    undo = _watch(engine, model)
    rotation = model[0].oft_R["default"]
    model(torch.randn(2, 8)).sum().backward()
    for call in range(1, 5):
        engine.step()  # type: ignore[no-untyped-call]
        assert engine.global_steps == call // 2
        norms = 2**0.5 * torch.linalg.vector_norm(rotation.weight.detach(), dim=1)
        assert bool((norms <= rotation.radius * (1 + 1e-6)).all())
        assert torch.equal(rotation.weight.detach(), engine.copy)
    assert float(norms.max()) > 0.99 * rotation.radius  # it was pulled back, and not left at rest
    undo.close()
    engine.step(), engine.step()
    assert float(rotation.weight.detach().max()) > 1.0


def test_a_rotation_without_gradient_is_refused_at_the_first_real_step(model: nn.Sequential, engine: Engine) -> None:
    _watch(engine, model)
    engine.step()
    with pytest.raises(RuntimeError, match="the rotations of 0 got no gradient"):
        engine.step()


def test_rotations_are_looked_for_where_deepspeed_holds_them(model: nn.Sequential, engine: Engine) -> None:
    trainer, rotations = _trainer(engine, model), checks.trainable_rotations(walk(model), "default")
    optimizers.check_rotations(DeepSpeedAdapter(trainer).optimized(), rotations, model)
    trainer.optimizers = [Optimizer([])]
    with pytest.raises(RuntimeError, match="the rotations of 0 are in no optimizer"):
        optimizers.check_rotations(DeepSpeedAdapter(trainer).optimized(), rotations, model)


def test_a_rotation_outside_its_ball_is_pulled_in_before_the_first_step(model: nn.Sequential, engine: Engine) -> None:
    rotation = model[0].oft_R["default"]
    engine.copy += 2.0
    rotation.weight.data.copy_(engine.copy)
    _watch(engine, model)
    assert torch.equal(rotation.weight.detach(), engine.copy)
    assert float(engine.copy.max()) < 0.2
