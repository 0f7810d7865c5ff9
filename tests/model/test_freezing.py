"""Frozen means frozen: no gradient, no statistic that drifts, and all of it as before in the end."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from norm_net import changed, flags, net, snapshot, train, trainable
from torch import nn

from lightning_oft import OFTConfig, inject, merge, set_adapter, unload, unmerge
from lightning_oft.model.freezing import freeze, unfreeze_merged
from lightning_oft.model.traversal import walk

pytestmark = pytest.mark.filterwarnings("ignore:block sizes adjusted")
ROTATIONS = {"fc.oft_R.default.weight", "head.0.oft_R.default.weight"}
BODY = {"oft_block_size": 4, "exclude_modules": r"head\..*"}


def test_only_rotations_train_and_no_statistic_drifts() -> None:
    model = net()
    inject(model, OFTConfig(oft_block_size=4))
    before = snapshot(model)
    assert trainable(model) == ROTATIONS
    train(model)
    assert changed(model, before) == ROTATIONS
    assert model.training
    assert not model.norm.training


@pytest.mark.parametrize("bias", ["all", "oft_only"])
def test_trained_biases_do_not_set_the_statistics_free(bias: str) -> None:
    model = net()
    inject(model, OFTConfig(bias=bias, **BODY))  # type: ignore[arg-type]
    before = snapshot(model)
    train(model)
    every = {"conv.bias", "norm.bias", "head.0.bias", "head.1.bias"} if bias == "all" else set()
    # conv.bias stands before a batch norm in eval, so it has a gradient
    assert changed(model, before) == {"fc.oft_R.default.weight", "fc.bias", *every}


def test_statistics_belong_to_the_adapter_that_trains_them() -> None:
    model: Any = net()
    base = snapshot(model)
    inject(model, OFTConfig(oft_block_size=4, modules_to_save=["head"]))
    with pytest.warns(UserWarning, match="'plain' is not active"):
        inject(model, OFTConfig(**BODY), "plain")  # type: ignore[arg-type]
    train(model)
    own = model.head[1].running_mean.clone()
    assert not torch.equal(own, base["head.1.running_mean"])
    assert int(model.head[1].num_batches_tracked) == int(base["head.1.num_batches_tracked"]) + 3
    assert torch.equal(model.norm.running_mean, base["norm.running_mean"])
    set_adapter(model, "plain")
    assert not model.head[1].training
    train(model)
    assert torch.equal(model.head[1].running_mean, base["head.1.running_mean"])
    set_adapter(model, "default")
    assert model.head[1].training
    assert torch.equal(model.head[1].running_mean, own)


def test_freeze_alone_is_undone_by_unload_and_idempotent() -> None:
    model = net()
    for _ in range(2):
        freeze(walk(model))
    assert not trainable(model)
    assert not model.train().norm.training
    unload(model)
    assert all(flags(model).values())
    assert model.norm.training
    assert type(model.norm) is nn.BatchNorm2d


def test_a_frozen_norm_copies_and_prints_as_what_it_was() -> None:
    model = net()
    inject(model, OFTConfig(oft_block_size=4))
    twin = copy.deepcopy(model).train()
    assert repr(twin.norm) == repr(net().norm)
    assert not twin.norm.training
    unload(twin)
    assert type(twin.norm) is nn.BatchNorm2d
    assert twin.norm.training
    assert not model.train().norm.training


def test_a_merged_model_trains_like_any_other_and_freezes_again() -> None:
    model = net()
    model.conv.weight.requires_grad_(False)
    were = flags(model)
    inject(model, OFTConfig(oft_block_size=4, modules_to_save=["head"], bias="all"))
    adapted = flags(model)
    merge(model)
    for _ in range(2):
        unfreeze_merged(walk(model))
    assert flags(model) == were
    assert model.train().norm.training
    unmerge(model)
    assert flags(model) == adapted
    assert not model.norm.training
    unload(model)
    assert flags(model) == were


def test_flags_come_back_also_where_another_adapter_was_chosen_last() -> None:
    model: Any = net()
    model.head[0].bias.requires_grad_(False)
    were = flags(model)
    inject(model, OFTConfig(bias="all", **BODY))  # type: ignore[arg-type]
    with pytest.warns(UserWarning, match="'plain' is not active"):
        inject(model, OFTConfig(**BODY), "plain")  # type: ignore[arg-type]
    assert model.head[0].bias.requires_grad
    set_adapter(model, "plain")
    assert not model.head[0].bias.requires_grad
    unload(model)
    assert flags(model) == were
