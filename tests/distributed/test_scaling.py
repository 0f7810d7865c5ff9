"""The formulas of docs/scaling.md against measured bytes: equal, not near."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from launch import Runs
from transformers import LlamaConfig, LlamaForCausalLM

from lightning_oft import OFTConfig, inject

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "examples"))
import scaling_plan as plan  # noqa: E402 - an example is a file, not a package

SMALL = plan.Llama(hidden=64, ffn=192, layers=3, heads=4, kv_heads=2, vocab=128, block=8)
"""The model of tests/distributed/tasks_worker.py."""


def small_llama(m: plan.Llama, checkpointing: bool = False) -> LlamaForCausalLM:
    model = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=m.hidden,
            intermediate_size=m.ffn,
            num_hidden_layers=m.layers,
            num_attention_heads=m.heads,
            num_key_value_heads=m.kv_heads,
            vocab_size=m.vocab,
            tie_word_embeddings=False,
            use_cache=False,
        )
    ).to(torch.bfloat16)
    inject(model, OFTConfig(oft_block_size=m.block, target_modules="all-linear"))
    if checkpointing:
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable()
        model.enable_input_require_grads()
    return model.train()


def saved_for_backward(model: LlamaForCausalLM, tokens: int) -> int:
    """Bytes of the storages that autograd keeps from a forward, the model's own left out."""
    own = {tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), *model.buffers()]}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    batch = torch.zeros(1, tokens, dtype=torch.long)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(input_ids=batch, labels=batch)
    return sum(tensor.untyped_storage().nbytes() for key, tensor in kept.items() if key not in own)


@pytest.mark.parametrize("tokens", [16, 48])
@pytest.mark.parametrize(
    "m",
    [
        SMALL,
        plan.Llama(hidden=32, ffn=64, layers=2, heads=4, kv_heads=4, vocab=64, block=16),
        plan.Llama(hidden=64, ffn=128, layers=4, heads=8, kv_heads=1, vocab=96, block=32),
    ],
    ids=["small", "all heads", "one kv head"],
)
def test_activations_are_what_autograd_saves(m: plan.Llama, tokens: int) -> None:
    deeper = plan.Llama(**{**vars(m), "layers": m.layers + 1})
    shallow, deep = (saved_for_backward(small_llama(model), tokens) for model in (m, deeper))
    assert deep - shallow == plan.layer_activations(m, tokens)
    assert shallow == plan.activations(m, tokens, checkpointing=False)
    assert saved_for_backward(small_llama(m, checkpointing=True), tokens) == plan.activations(
        m, tokens, checkpointing=True
    )


@pytest.mark.distributed
@pytest.mark.subprocess
@pytest.mark.slow
@pytest.mark.parametrize("scenario", ["bytes", "bytes-checkpointing"])
def test_bytes_held_and_moved_are_the_formulas(runs: Runs, scenario: str) -> None:
    moved = plan.traffic(SMALL)
    for result in (rank[f"task:{scenario}"] for rank in runs.two):
        assert "error" not in result, result.get("trace")
        assert result["held"] == plan.held(SMALL, gpus=2)
        assert result["bytes"] == {
            "_allgather_base_": moved["gathered"],
            "_reduce_scatter_base_": moved["reduced"],
            "allreduce_": moved["norms"],
        }
        assert result["calls"] == {
            "_allgather_base_": moved["gathers"],
            "_reduce_scatter_base_": moved["reductions"],
            "allreduce_": 1,
        }


def test_plan_counts_the_parameters_of_llama_3_70b() -> None:
    m = plan.Llama()
    assert m.layers * m.layer + m.rest == 70_553_706_496
    with torch.device("meta"):
        small = small_llama(SMALL)
    base = [p.numel() for name, p in small.named_parameters() if ".oft_R." not in name]
    assert sum(base) == SMALL.layers * SMALL.layer + SMALL.rest
    assert sum(p.numel() for p in small.parameters()) - sum(base) == SMALL.generators


def test_page_shows_what_the_script_prints(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["scaling_plan.py"])
    plan.main()
    assert capsys.readouterr().out.strip() in (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
