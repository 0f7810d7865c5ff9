"""FSDP1's wrap policies: whatever the user's makes a unit, every rotation is one too; tests/distributed runs it."""

from __future__ import annotations

import functools
from typing import Any

import pytest
from torch import nn
from torch.distributed.fsdp.wrap import ModuleWrapPolicy, size_based_auto_wrap_policy

from lightning_oft import OFTConfig, inject
from lightning_oft.callback.strategies.fsdp1 import with_rotations
from lightning_oft.layers import Rotation

MIXED = {"mixed_precision": "bf16"}


@pytest.fixture
def model() -> nn.Sequential:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    inject(model, OFTConfig(oft_block_size=4))
    return model


@pytest.mark.parametrize("inner", [None, ModuleWrapPolicy({nn.ReLU})])
def test_rotations_are_units_in_float32(model: nn.Sequential, inner: Any) -> None:
    policy = with_rotations(with_rotations(inner))  # of a second run with the same strategy
    units = policy._run_policy(model, set(), MIXED)
    kinds = {module: kwargs["mixed_precision"] for module, kwargs in units.items()}
    assert sum(isinstance(module, Rotation) for module in kinds) == 2
    assert {kind for module, kind in kinds.items() if isinstance(module, Rotation)} == {None}
    others = [kind for module, kind in kinds.items() if not isinstance(module, Rotation)]
    assert others == ([] if inner is None else ["bf16"])


def test_a_function_policy_is_asked_too(model: nn.Sequential) -> None:
    policy = with_rotations(functools.partial(size_based_auto_wrap_policy, min_num_params=1000))
    rotation = next(module for module in model.modules() if isinstance(module, Rotation))
    assert policy(module=rotation, recurse=False, nonwrapped_numel=1)
    assert policy(module=rotation, recurse=True, nonwrapped_numel=1)
    assert not policy(module=model[1], recurse=False, nonwrapped_numel=1)
    assert policy(module=model[0], recurse=False, nonwrapped_numel=2000)
