"""OFTConfig: what it takes, and what it refuses by name."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from peft import OFTConfig as PeftConfig

from lightning_oft import OFTConfig

OWN = {"side", "max_angle", "magnitude", "series_guard", "coft_radius", "neumann_series"}


def test_the_default_is_blocks_of_32_on_every_linear_layer() -> None:
    config = OFTConfig()
    assert (config.oft_block_size, config.r, config.target_modules) == (32, 0, "all-linear")
    assert not config.constrained


def test_r_takes_the_place_of_the_default_block_size() -> None:
    assert (OFTConfig(r=8).r, OFTConfig(r=8).oft_block_size) == (8, 0)
    assert OFTConfig(r=0, oft_block_size=16).oft_block_size == 16


def test_field_names_are_pefts_but_for_our_own() -> None:
    theirs = {field.name for field in dataclasses.fields(PeftConfig)}
    assert {field.name for field in dataclasses.fields(OFTConfig)} - theirs == OWN


def test_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        OFTConfig().r = 3  # type: ignore[misc]


def test_a_constraint_is_either_of_the_two() -> None:
    assert OFTConfig(coft=True).constrained
    assert OFTConfig(max_angle=10).constrained


def test_tuples_and_sets_become_lists() -> None:
    config = OFTConfig(target_modules=("b", "a"), modules_to_save={"d", "c"}, layers_to_transform=(1, 0))  # type: ignore[arg-type]
    assert (config.target_modules, config.modules_to_save) == (["b", "a"], ["c", "d"])
    assert config.layers_to_transform == [1, 0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r": 4, "oft_block_size": 8}, "r=4 and oft_block_size=8 exclude each other"),
        ({"r": 0, "oft_block_size": 0}, "r=0 and oft_block_size=0"),
        ({"r": -2}, "r=-2: must be positive"),
        ({"oft_block_size": 1}, "oft_block_size=1: a block of size 1 cannot rotate"),
        ({"oft_block_size": 8.0}, "oft_block_size=8.0: must be a whole number or null"),
        ({"oft_block_size": True}, "oft_block_size=True: must be a whole number"),
        ({"module_dropout": 1.0}, r"module_dropout=1.0: must be in \[0, 1\)"),
        ({"eps": float("nan")}, "eps=nan: must be a positive number"),
        ({"eps": "6e-5"}, "eps='6e-5': must be a number"),
        ({"max_angle": 0}, "max_angle=0: must be in degrees between 0 and 180"),
        ({"num_cayley_neumann_terms": 1}, "num_cayley_neumann_terms=1: fewer than 2 terms never leave the identity"),
        ({"layers_pattern": "layers", "target_modules": ["q"]}, "layers_pattern='layers' needs layers_to_transform"),
        (
            {"layers_to_transform": 0, "target_modules": ".*q_proj"},
            "layers_to_transform=0 needs target_modules as a list of names, or null, got '.*q_proj': list the names",
        ),
        ({"target_modules": []}, "target_modules is empty"),
        ({"target_modules": ["q", 3]}, r"target_modules=\['q', 3\]: must be a string or a list of strings or null"),
        ({"modules_to_save": "head"}, "modules_to_save='head': must be a list of strings or null"),
        ({"layers_to_transform": ["0"], "target_modules": ["q"]}, r"layers_to_transform=\['0'\]: must be a whole"),
        ({"bias": "some"}, "bias='some': must be 'none' or 'all' or 'oft_only'"),
        ({"coft": 1}, "coft=1: must be true or false"),
    ],
)
def test_a_wrong_value_is_refused_by_name(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OFTConfig(**options)


def test_these_are_fine() -> None:
    for options in (
        {"eps": 1, "max_angle": 179, "target_modules": None},
        {"num_cayley_neumann_terms": 0, "use_cayley_neumann": False},
        {"layers_to_transform": 0, "target_modules": ["q"], "layers_pattern": ["h", "layers"]},
        {"exclude_modules": ".*head", "task_type": "SEQ_CLS"},
    ):
        config = OFTConfig(**options)  # type: ignore[arg-type]
        assert all(getattr(config, name) == value for name, value in options.items())
        assert dataclasses.replace(config) == config
