from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaForCausalLM

from lightning_oft import OFTConfig, inject, load_adapter, merge, save_adapter
from lightning_oft.cli import main
from tests.quantized import llama, logits, package, relative, rotate


@pytest.fixture
def quantized(tmp_path: Path) -> Any:
    """A Llama in nf4 as transformers saves it, in `tmp_path / "base"`, and an adapter of it beside."""
    package("nf4")
    plain: LlamaForCausalLM = llama("plain")
    plain.save_pretrained(tmp_path / "plain")
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", quantization_config=config)
    model.save_pretrained(tmp_path / "base")
    inject(model, OFTConfig(oft_block_size=16))
    rotate(model)
    save_adapter(model, tmp_path / "adapter")
    return model.train()


def merged(tmp_path: Path, *options: str, base: str = "base") -> int:
    places = ["--base", str(tmp_path / base), "--adapter", str(tmp_path / "adapter"), "--output", str(tmp_path / "out")]
    return main(["merge", *places, *options])


def test_a_quantized_base_is_merged_dequantized(quantized: Any, tmp_path: Path) -> None:
    assert merged(tmp_path) == 0
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    assert relative(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out")), logits(quantized)) < 1e-5


@pytest.mark.parametrize("base", ["base", "plain"])
def test_the_dtype_asked_for_is_written(quantized: Any, tmp_path: Path, base: str) -> None:
    assert merged(tmp_path, "--dtype", "bfloat16", base=base) == 0
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}


def test_a_requantized_model_is_saved_and_loaded_in_the_format_of_its_base(
    quantized: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    wanted = logits(quantized)
    merge(quantized, requantize=True)
    assert "7 layers are requantized (nf4): on random inputs their outputs are off by 0.09" in caplog.text
    after = logits(quantized)
    quantized.save_pretrained(tmp_path / "requantized")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "requantized").train()
    assert torch.equal(logits(loaded), after)
    assert 0.02 < relative(after, wanted) < 0.2


def test_an_adapter_of_a_quantized_base_goes_onto_the_plain_one(quantized: Any, tmp_path: Path) -> None:
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    load_adapter(plain, tmp_path / "adapter")  # without a warning of another base: that cannot be told
    assert relative(logits(plain), logits(quantized)) < 0.3
