"""Adapters that PEFT 0.16, 0.17, 0.18 and 0.21 wrote give the logits that each of them computed."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

from lightning_oft import load_adapter

HERE = Path(__file__).parent / "fixtures" / "peft"
BASE = Path(__file__).parents[2] / "examples" / "bases" / "docs-llama"
PLACES = sorted(path.parent for path in HERE.glob("*/adapter_config.json"))


@pytest.fixture(scope="module")
def base() -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32).eval()


@pytest.mark.parametrize("place", PLACES, ids=lambda place: place.name)
def test_an_adapter_of_every_version_gives_pefts_logits(place: Path, base: nn.Module) -> None:
    model, kept = copy.deepcopy(base), load_file(place / "logits.safetensors")["logits"]
    load_adapter(model, place)
    with torch.no_grad():
        logits = model(torch.arange(12)[None]).logits[0, -1]
    assert float((logits - kept).norm() / kept.norm()) < 1e-6


def test_the_versions_are_those_that_differ() -> None:
    assert {place.name for place in PLACES} == {
        f"{version}-{case}"
        for version in ("0.16", "0.17", "0.18", "0.21")
        for case in ("series", "exact", "share", "coft")
    }
    old, new = (load_file(HERE / f"{version}-series" / "logits.safetensors")["logits"] for version in ("0.17", "0.18"))
    assert float((old - new).norm() / new.norm()) > 1e-3  # PEFT 0.18 changed its series
