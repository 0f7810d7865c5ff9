from __future__ import annotations

import copy
import logging
import pickle
from typing import Any

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from lightning_oft import OFTConfig, inject, merge, merged, oft_layers, save_merged, unload, unmerge
from lightning_oft.model.fingerprint import layer_fingerprint, same_base
from tests.quantized import KINDS, llama, logits, package, quantize, relative, rotate

BITSANDBYTES = "nf4"


def pair(kind: str) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(quantize(kind, nn.Linear(64, 64)) for _ in range(2)))


@pytest.mark.parametrize("kind", KINDS)
def test_a_requantized_merge_says_its_error_and_is_undone_to_the_bit(
    kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    model, x = pair(kind).train(), torch.randn(256, 64)
    inject(model, OFTConfig(oft_block_size=16))
    rotate(model)
    before = model(x).detach()
    with pytest.raises(ValueError, match=r"0, 1 are quantized or packed.*save_merged.*requantize=True"):
        merge(model)
    assert torch.equal(model(x), before)
    merge(model, requantize=True)
    said = float(caplog.messages[-1].split("off by ")[1].split()[0])
    error = relative(model(x).detach(), before)
    assert said / 3 < error < said * 3  # two layers, and the second one sees the error of the first
    unmerge(model)
    assert torch.equal(model(x), before)


def test_a_format_that_nobody_writes_is_not_requantized() -> None:
    class Codes(nn.Module):
        in_features = out_features = 4

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("codes", torch.ones(4, 4, dtype=torch.int8))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.linear(x, self.codes.float())

    model = nn.Sequential(Codes())
    inject(model, OFTConfig(oft_block_size=4))
    for requantize in (False, True):
        with pytest.raises(ValueError, match=r"quantized or packed; .*: nothing here writes their format; save_merged"):
            merge(model, requantize=requantize)
    with pytest.raises(ValueError, match="quantized or packed"), merged(model):
        pass


@pytest.mark.parametrize("kind", KINDS)
def test_a_fingerprint_tells_quantized_bases_apart_and_not_formats(kind: str) -> None:
    first, second = (layer_fingerprint(layer) for layer in pair(kind))
    assert first is not None
    assert same_base(first, layer_fingerprint(pair(kind)[0]))
    assert not same_base(first, second)
    assert same_base(first, layer_fingerprint(pair("plain")[1])), "of another format nobody can tell"


def test_gradients_reach_a_rotation_after_a_forward_in_eval_mode() -> None:
    """On a CPU with AVX512-BF16 that forward packs the weight anew, unless the layer is told not to."""
    package(BITSANDBYTES)
    model, x = pair("nf4"), torch.randn(4, 64)
    for layer in model:
        layer.support_avx512bf16_for_cpu = True
    inject(model, OFTConfig(oft_block_size=16, target_modules=["0"]))  # a gradient passes through the other one too
    assert [layer.support_avx512bf16_for_cpu for layer in model] == [False, False]
    with torch.no_grad():
        model.eval()(x)
    model.train()(x).square().sum().backward()
    assert bool(model[0].oft_R["default"].weight.grad.any())


def test_a_weight_that_was_packed_for_inference_is_unpacked_at_injection() -> None:
    bnb = package(BITSANDBYTES)
    if not bnb.functional.has_avx512bf16():
        pytest.skip("bitsandbytes packs weights for inference on CPUs with AVX512-BF16 only")
    model, x = pair("nf4"), torch.randn(4, 64)
    before = model.train()(x)
    with torch.no_grad():
        model.eval()(x)
    assert model[0].weight.quant_state.packing_format_for_cpu
    inject(model, OFTConfig(oft_block_size=16))
    assert layer_fingerprint(model[0]) == layer_fingerprint(pair("nf4")[0]), "and it is no other base"
    assert relative(model.train()(x).detach(), before) < 0.01  # scales were rounded to bfloat16
    model(x).square().sum().backward()
    assert all(bool(layer.oft_R["default"].weight.grad.any()) for layer in model)


def test_injection_tries_no_forward_of_a_layer_that_is_known(caplog: pytest.LogCaptureFixture) -> None:
    """Which would say that it is not quantized yet, and settle in which dtype the layer computes."""
    bnb = package(BITSANDBYTES)
    model = nn.Sequential(bnb.nn.Linear4bit(64, 64, quant_type="nf4").requires_grad_(False))
    with caplog.at_level(logging.WARNING):
        inject(model, OFTConfig(oft_block_size=16))
    assert not caplog.messages
    assert not model[0].compute_type_is_set


def test_what_would_lose_the_rotations_of_a_transformers_model_says_so(tmp_path: Any) -> None:
    model = llama("nf4")
    inject(model, OFTConfig(oft_block_size=16))
    rotate(model)
    after = logits(model)
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    for one in (model, *copies):
        with pytest.raises(RuntimeError, match="would replace the layers that carry rotations"):
            one.dequantize()
        with pytest.warns(UserWarning, match=r"save_pretrained: the rotations are not merged.*save_merged"):
            one.save_pretrained(tmp_path / "base")
        assert len(oft_layers(one)) == 7
        assert torch.equal(logits(one), after)
    save_merged(model, tmp_path / "merged")  # without a word
    unload(model)
    assert type(model).dequantize is PreTrainedModel.dequantize


def test_a_quantized_module_is_not_trained_whole() -> None:
    model = llama("nf4")
    model.lm_head = quantize("nf4", model.lm_head)
    with pytest.raises(ValueError, match=r"modules_to_save: lm_head is quantized and would not train: .*skip_modules"):
        inject(model, OFTConfig(oft_block_size=16, target_modules=["q_proj"], modules_to_save=["lm_head"]))
    assert not oft_layers(model)
