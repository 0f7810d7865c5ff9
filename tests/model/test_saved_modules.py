"""Biases and modules trained whole: every adapter has its own values, and the base keeps its."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from layer_cases import config, randomize, relative
from norm_net import batch, flags, net, same, snapshot, train
from torch import Tensor, nn

from lightning_oft import OFTConfig, disable_adapters, inject, merge, set_adapter, unload
from lightning_oft.model.saved_modules import saved_tensors
from lightning_oft.model.traversal import walk

pytestmark = pytest.mark.filterwarnings("ignore:adapter .* is not active", "ignore:block sizes adjusted")
WHOLE: dict[str, Any] = {"oft_block_size": 4, "target_modules": ["fc"], "bias": "all", "modules_to_save": ["head"]}


def _values(model: nn.Module, name: str) -> dict[str, Tensor]:
    return {one.name: one.value(name) for one in saved_tensors(walk(model)) if name in one.slot.owners}


def _trained(**options: Any) -> nn.Module:
    model = net()
    inject(model, OFTConfig(**{**WHOLE, **options}))
    train(model)
    return model.eval()


@pytest.mark.parametrize(
    "options",
    [{"bias": "none", "modules_to_save": None}, {"bias": "oft_only"}, {"modules_to_save": ["head", "norm"]}],
    ids=["rotations", "own biases", "norms"],
)
@pytest.mark.parametrize("mode", [False, True], ids=["eval", "train"])
def test_disabled_is_the_base_to_the_bit_and_afterwards_nothing_has_changed(
    options: dict[str, Any], mode: bool
) -> None:
    model, x = net().eval(), batch(4)
    base = snapshot(model)
    expected = model(x)
    inject(model, OFTConfig(**{**WHOLE, "target_modules": ["conv", "fc"], **options}))
    train(model)
    model.train(mode)
    state, were = snapshot(model), flags(model)
    identities = {name: id(parameter) for name, parameter in model.named_parameters()}
    for _ in range(2):
        with disable_adapters(model), torch.no_grad():
            # a frozen base is always in eval where its statistics are concerned
            assert torch.equal(model(x), expected)
            assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in base.items())
        assert same(model, state)
        assert flags(model) == were
        assert {name: id(parameter) for name, parameter in model.named_parameters()} == identities
        assert model.head.training == mode
        assert model.head[1].training == (mode and "head" in str(WHOLE | options))


def test_each_adapter_keeps_its_own_values() -> None:
    model, x = net().eval(), batch(4)
    base = model(x)
    outputs, values = {}, {}
    for name in ("one", "two"):
        inject(model, OFTConfig(**WHOLE), name)
        set_adapter(model, name)
        train(model)
        outputs[name] = model.eval()(x)
        values[name] = {key: tensor.clone() for key, tensor in _values(model, name).items()}
        assert {"head.0.weight", "head.1.running_mean", "conv.bias", "fc.bias"} <= set(values[name])
    for name in ("one", "two", "one"):
        set_adapter(model, name)
        assert torch.equal(model(x), outputs[name])
        with disable_adapters(model):
            assert torch.equal(model(x), base)
            for other in ("one", "two"):  # also inside, values are those of the adapter
                now = _values(model, other)
                assert all(torch.equal(now[key], tensor) for key, tensor in values[other].items())
    with pytest.raises(ValueError, match=r"'one' and 'two' both train conv.bias: only one of them can be active"):
        set_adapter(model, ["one", "two"])
    assert torch.equal(model(x), outputs["one"])
    unload(model)
    assert torch.equal(model(x), base)


def test_trained_biases_and_modules_stay_in_a_merged_model() -> None:
    model, x = _trained(), batch()
    output = model(x)
    merge(model)
    assert relative(model(x), output) < 1e-5
    unload(model)
    assert relative(model(x), output) < 1e-5


def test_a_backward_in_flight_survives_disabling() -> None:
    model, x = _trained(), batch(4)

    def gradients(meanwhile: Callable[[], None]) -> list[Tensor]:
        model.zero_grad()
        loss = model(x).square().sum()
        meanwhile()
        loss.backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    def reference_pass() -> None:
        with disable_adapters(model), torch.no_grad():
            model(x)

    plain, crossed = gradients(lambda: None), gradients(reference_pass)
    assert len(plain) > 5
    assert all(torch.equal(a, b) for a, b in zip(plain, crossed, strict=True))


def test_a_backward_in_flight_raises_where_another_adapter_took_its_weights() -> None:
    model = _trained()
    inject(model, OFTConfig(oft_block_size=4, target_modules=["fc"]), "two")
    loss = model(batch(4)).square().sum()
    set_adapter(model, "two")
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_tied_modules_to_save_are_trained_and_switched_as_one() -> None:
    sizes: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**sizes, intermediate_size=24, vocab_size=32, tie_word_embeddings=True)
    )
    ids = torch.randint(0, 32, (2, 5))
    base = model.eval()(ids).logits
    inject(model, config(target_modules=["q_proj"], modules_to_save=["lm_head", "embed_tokens"]))
    randomize(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    with torch.no_grad():
        model.lm_head.weight.add_(torch.randn_like(model.lm_head.weight) * 0.1)
    trained = model(ids).logits
    assert relative(trained, base) > 1e-2
    for _ in range(2):
        with disable_adapters(model):
            assert torch.equal(model(ids).logits, base)
        assert torch.equal(model(ids).logits, trained)
    unload(model)
    assert torch.equal(model(ids).logits, base)
