"""Tied weights: merged apart, said so to transformers, and tied again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from layer_cases import config, randomize, relative
from torch import nn

from lightning_oft import inject, merge, unload, unmerge
from lightning_oft.layers import state_of


def _tied() -> Any:
    sizes: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    options = transformers.LlamaConfig(**sizes, intermediate_size=24, vocab_size=32, tie_word_embeddings=True)
    return transformers.LlamaForCausalLM(options).eval()


@pytest.mark.parametrize(
    ("targets", "keep_base"),
    [
        (["lm_head"], "never"),
        (["embed_tokens"], "always"),
        (["lm_head", "embed_tokens"], "never"),
        (["q_proj"], "never"),
    ],
)
def test_tied_weights_are_merged_apart_and_tied_again(targets: list[str], keep_base: Any, tmp_path: Path) -> None:
    model, ids = _tied(), torch.randint(0, 32, (2, 5))
    base = model(ids).logits
    inject(model, config(target_modules=targets))
    randomize(model, 0.3)
    adapted = model(ids).logits
    assert relative(adapted, base) > 1e-4
    merge(model, keep_base=keep_base)
    assert relative(model(ids).logits, adapted) < 1e-5
    tied = targets == ["q_proj"]
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    assert model.config.tie_word_embeddings == tied
    model.save_pretrained(tmp_path)
    again = transformers.LlamaForCausalLM.from_pretrained(tmp_path).eval()
    assert relative(again(ids).logits, adapted) < 1e-5
    unmerge(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.config.tie_word_embeddings
    assert relative(model(ids).logits, adapted) < 1e-6
    unload(model)
    assert relative(model(ids).logits, base) < 1e-6


def test_a_failure_unties_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = _tied(), torch.randint(0, 32, (2, 5))
    inject(model, config(target_modules=["embed_tokens", "lm_head"]))
    randomize(model, 0.3)
    adapted = model(ids).logits
    layer_type = type(state_of(model.lm_head).layer_type)  # type: ignore[union-attr]
    monkeypatch.setattr(layer_type, "fold", lambda *_: (_ for _ in ()).throw(MemoryError("none left")))
    with pytest.raises(MemoryError):
        merge(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.config.tie_word_embeddings
    assert torch.equal(model(ids).logits, adapted)


def test_plain_modules_that_share_a_weight_are_merged_apart(caplog: pytest.LogCaptureFixture) -> None:
    model, x = nn.ModuleDict({"a": nn.Linear(8, 8), "b": nn.Linear(8, 8)}), torch.randn(3, 8)
    model["b"].weight = model["a"].weight
    untouched = model["b"](x)
    inject(model, config(target_modules=["a"]))
    randomize(model, 0.3)
    adapted = model["a"](x)
    merge(model)
    assert "merge: a shared a weight with another module" in caplog.text
    assert relative(model["a"](x), adapted) < 1e-5
    assert torch.equal(model["b"](x), untouched)
    unmerge(model)
    assert model["b"].weight is model["a"].weight
