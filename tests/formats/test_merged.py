from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from lightning_oft import OFTConfig, disable_adapters, inject, merge, oft_layers, save_merged
from tests.quantized import KINDS, llama, logits, quantize, relative, rotate
from tests.small import state

ALL, WITH_HEAD = "all-linear", r".*(proj|lm_head)"


@pytest.mark.parametrize("kind", KINDS)
def test_a_quantized_base_is_written_plain_and_computes_the_same(tmp_path: Path, kind: str) -> None:
    model = llama(kind)
    inject(model, OFTConfig(oft_block_size=16, target_modules=["q_proj", "down_proj"]))  # the others are packed too
    before = logits(model)
    rotate(model)
    after = logits(model)
    save_merged(model, tmp_path / "merged")
    assert relative(after, before) > 0.05
    assert torch.equal(logits(model), after), "the model is as it was"
    assert len(oft_layers(model)) == 2
    assert "quantization_config" not in json.loads((tmp_path / "merged" / "config.json").read_text())
    assert relative(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")), after) < 1e-5


@pytest.mark.parametrize("kind", ["nf4", "ao-int8"])
def test_a_transposed_layer_that_was_packed_as_a_linear_one_is_written_as_its_class_has_it(
    tmp_path: Path, kind: str
) -> None:
    torch.manual_seed(0)
    model: Any = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=16, n_embd=64, n_layer=1, n_head=2)).eval()
    for name in ("c_attn", "c_proj"):  # as transformers does; the second is square
        old = model.get_submodule(f"transformer.h.0.attn.{name}")
        linear = nn.Linear(*old.weight.shape)
        linear.load_state_dict({"weight": old.weight.T, "bias": old.bias})
        model.set_submodule(f"transformer.h.0.attn.{name}", quantize(kind, linear))
    inject(model, OFTConfig(oft_block_size=16, target_modules="all-linear"))
    rotate(model)
    save_merged(model, tmp_path)
    assert relative(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(model)) < 1e-5


@pytest.mark.parametrize(("tied", "targets"), [(True, ALL), (True, WITH_HEAD), (False, WITH_HEAD)])
def test_tied_weights_stay_tied_unless_one_is_rotated(tmp_path: Path, tied: bool, targets: str) -> None:
    model = llama("nf4", tied)
    inject(model, OFTConfig(oft_block_size=16, target_modules=targets))
    rotate(model)
    save_merged(model, tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert relative(logits(loaded), logits(model)) < 1e-5
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == (tied and targets == ALL)
    assert model.config.tie_word_embeddings == tied


@pytest.mark.parametrize("dtype", ["bfloat16", torch.float16, None])
def test_the_dtype_is_that_asked_for_else_that_of_the_base(tmp_path: Path, dtype: torch.dtype | str | None) -> None:
    model = llama("nf4", dtype=torch.float32 if dtype else torch.bfloat16)
    inject(model, OFTConfig(oft_block_size=16))
    rotate(model)
    save_merged(model, tmp_path, dtype=dtype)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    wanted = {"bfloat16": torch.bfloat16, None: torch.bfloat16}.get(dtype, dtype)  # type: ignore[call-overload]
    assert {parameter.dtype for parameter in loaded.parameters()} == {wanted}
    assert relative(logits(loaded), logits(model)) < 2e-2


def test_files_are_cut_to_the_size_asked_for(tmp_path: Path) -> None:
    model = llama("int8")
    inject(model, OFTConfig(oft_block_size=16))
    save_merged(model, tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert relative(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(model)) < 1e-5


@pytest.mark.parametrize("merged", [True, False])
def test_a_plain_model_is_written_merged_and_stays_as_it_is(tmp_path: Path, merged: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 4))
    inject(model, OFTConfig(oft_block_size=4, modules_to_save=["2"], target_modules=["0"]))
    rotate(model)
    if merged:
        merge(model)
    before = state(model.eval())
    save_merged(model, tmp_path)
    from safetensors.torch import load_file

    plain = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 4)).eval()
    plain.load_state_dict(load_file(tmp_path / "model.safetensors"))
    x = torch.randn(3, 8)
    assert torch.allclose(plain(x), model(x), atol=1e-6)
    assert all(torch.equal(value, before[name]) for name, value in state(model).items())


def test_the_tokenizer_of_the_base_stands_beside_the_weights(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "tokenizer_config.json").write_text("{}")
    model = llama("nf4")
    model.config._name_or_path = str(tmp_path / "base")
    model.generation_config.max_length = 17
    inject(model, OFTConfig(oft_block_size=16))
    save_merged(model, tmp_path / "merged")
    assert (tmp_path / "merged" / "tokenizer_config.json").is_file()
    assert json.loads((tmp_path / "merged" / "generation_config.json").read_text())["max_length"] == 17


def test_what_cannot_be_written_is_refused_and_nothing_is_there(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(ValueError, match="nothing to merge"):
        save_merged(model, tmp_path / "merged")
    inject(model, OFTConfig(oft_block_size=4))
    with pytest.raises(ValueError, match="dtype='int8': must be a floating-point dtype"):
        save_merged(model, tmp_path / "merged", dtype="int8")
    with disable_adapters(model), pytest.raises(RuntimeError, match="inside disable_adapters"):
        save_merged(model, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_a_model_of_compressed_tensors_is_written_plain(tmp_path: Path) -> None:
    """Its layers are packed until their first forward unpacks all of them, and keep their scales beside plain weights."""
    quantization = pytest.importorskip("compressed_tensors.quantization")
    from compressed_tensors.compressors import ModelCompressor

    model = llama("plain")
    weights = quantization.QuantizationArgs(num_bits=8, strategy="channel")
    groups = {"all": quantization.QuantizationScheme(targets=["Linear"], weights=weights)}
    config = quantization.QuantizationConfig(config_groups=groups, ignore=["lm_head"], format="pack-quantized")
    quantization.apply_quantization_config(model, config)
    for layer in model.modules():
        if hasattr(layer, "weight_scale"):
            layer.weight_scale.data = layer.weight.detach().abs().amax(1, keepdim=True) / 127
    ModelCompressor(quantization_config=config).compress_model(model)
    inject(model, OFTConfig(oft_block_size=16))
    rotate(model)
    after = logits(model)
    save_merged(model, tmp_path)
    assert relative(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), after) < 1e-5
