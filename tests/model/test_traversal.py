"""Walking a model: every module once, what lies below another one, and names without wrappers."""

from __future__ import annotations

import torch
from torch import nn

from lightning_oft.model.traversal import some, walk


def _model() -> nn.Module:
    shared = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    return nn.ModuleDict(
        {"a": nn.Sequential(shared), "ab": nn.Linear(2, 2), "b": nn.Sequential(nn.Linear(2, 2), shared)}
    )


def test_every_module_comes_once_under_its_first_name() -> None:
    modules = walk(_model())
    assert list(modules) == ["", "a", "a.0", "a.0.0", "a.0.1", "ab", "b", "b.0"]
    assert modules.aliases == {"b.1": "a.0"}


def test_what_lies_below_a_module_includes_what_has_its_name_elsewhere() -> None:
    modules = walk(_model())
    for name in modules:
        assert set(map(id, modules.below(name).values())) == set(map(id, modules[name].modules()))
    assert list(modules.below("ab", "a.0")) == ["a.0", "a.0.0", "a.0.1", "ab"]
    assert modules.below() == {}


def test_wrappers_are_no_part_of_a_name() -> None:
    model = _model()
    names = list(walk(model))
    model["a"] = torch.compile(model["a"], backend="eager")  # type: ignore[index, operator]
    for wrapped in (model, nn.DataParallel(model), torch.compile(model, backend="eager")):
        assert list(walk(wrapped)) == names  # type: ignore[arg-type]


def test_some_names_in_a_readable_line() -> None:
    assert some(["", *"bcdef"]) == "the model itself, b, c, d and 2 more"
