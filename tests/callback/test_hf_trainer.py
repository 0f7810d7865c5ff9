"""Hugging Face's Trainer and TRL's train an injected model, plain and quantized, and lose nothing of it."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from lightning_oft import OFTConfig, OFTTrainerCallback, inject, load_adapter, merge, oft_layers, save_adapter
from lightning_oft.functional import angle_radius
from tests.quantized import package
from tests.text_models import IDS, TOKENIZER

TEXTS = ["A rotation is the identity until it is trained.", "A block is a small matrix.", "Rotations keep norms."] * 2
MAX_ANGLE = 5
OPTIONS: dict[str, Any] = {
    "max_steps": 2, "per_device_train_batch_size": 2, "learning_rate": 0.1, "save_strategy": "steps", "save_steps": 1,
    "report_to": [], "use_cpu": True, "bf16": False, "disable_tqdm": True, "dataloader_pin_memory": False,
    "gradient_checkpointing": False,
}  # fmt: skip

pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # of these trainers and of bitsandbytes; ours are asked for by name
]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=128,
        initializer_range=0.2, **IDS,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(TOKENIZER).save_pretrained(folder)
    return folder


def load(base: Path, kind: str) -> Any:
    options: dict[str, Any] = {}
    if kind != "plain":
        package(kind)
        from transformers import BitsAndBytesConfig

        options["quantization_config"] = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    return AutoModelForCausalLM.from_pretrained(base, **options)


def adapted(base: Path, kind: str = "plain", **config: Any) -> Any:
    model = load(base, kind)
    inject(model, OFTConfig(oft_block_size=8, **{"max_angle": MAX_ANGLE, **config}))
    return model


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(torch.arange(12)[None]).logits


def rotations(model: Any) -> dict[str, Any]:
    return {name: layer.oft_R["default"] for name, layer in oft_layers(model).items()}


def hf(model: Any, tokenizer: Any, out: Path, **options: Any) -> Trainer:
    rows = [dict(ids, labels=ids["input_ids"]) for ids in (tokenizer(text[:24]) for text in TEXTS)]
    rows = [{key: value[:6] for key, value in row.items()} for row in rows]
    arguments = TrainingArguments(str(out), **{**OPTIONS, **options})
    return Trainer(model, arguments, train_dataset=rows, eval_dataset=rows, callbacks=[OFTTrainerCallback()])


def sft(model: Any, tokenizer: Any, out: Path) -> Any:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    data = Dataset.from_list([{"text": text} for text in TEXTS])
    return SFTTrainer(model, SFTConfig(str(out), **OPTIONS), train_dataset=data, processing_class=tokenizer,
                      callbacks=[OFTTrainerCallback()])  # fmt: skip


def dpo(model: Any, tokenizer: Any, out: Path) -> Any:
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    data = Dataset.from_list([{"prompt": text, "chosen": " Yes.", "rejected": " No, it is not."} for text in TEXTS])
    arguments = DPOConfig(str(out), precompute_ref_log_probs=True, **OPTIONS)
    return DPOTrainer(model, args=arguments, train_dataset=data, processing_class=tokenizer,
                      callbacks=[OFTTrainerCallback()])  # fmt: skip


def grpo(model: Any, tokenizer: Any, out: Path) -> Any:
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    def reward(completions: list[str], **_: Any) -> list[float]:
        return [float(number) for number, _ in enumerate(completions)]

    data = Dataset.from_list([{"prompt": text} for text in TEXTS])
    arguments = GRPOConfig(str(out), num_generations=2, max_completion_length=4, **OPTIONS)
    return GRPOTrainer(model, reward_funcs=reward, args=arguments, train_dataset=data, processing_class=tokenizer,
                       callbacks=[OFTTrainerCallback()])  # fmt: skip


@pytest.mark.parametrize("kind", ["plain", "nf4"])
@pytest.mark.parametrize("make", [hf, sft, dpo, grpo])
def test_it_trains_holds_its_radius_and_loses_nothing(make: Any, kind: str, base: Path, tmp_path: Path) -> None:
    if make is not hf:
        pytest.importorskip("trl", reason="the extra `test`")
    model = adapted(base, kind)
    make(model, AutoTokenizer.from_pretrained(base), tmp_path / "run").train()
    norms = [(2**0.5 * one.weight.detach()).norm(dim=1).amax().item() for one in rotations(model).values()]
    assert {one.weight.dtype for one in rotations(model).values()} == {torch.float32}
    assert min(norms) > 0
    assert max(norms) == pytest.approx(angle_radius(MAX_ANGLE), rel=1e-4)
    for place in ("adapter", "checkpoint-2/adapter"):
        fresh = load(base, kind)
        load_adapter(fresh, tmp_path / "run" / place)
        assert torch.equal(logits(fresh), logits(model))


@pytest.mark.parametrize("kind", ["plain", "nf4"])
def test_a_resume_ends_with_the_same_rotations(kind: str, base: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"max_angle": None, "num_cayley_neumann_terms": 3}  # a series that is left at once
    tokenizer, whole, resumed = (
        AutoTokenizer.from_pretrained(base),
        adapted(base, kind, **options),
        adapted(base, kind, **options),
    )
    hf(whole, tokenizer, tmp_path / "run", max_steps=3).train()
    hf(resumed, tokenizer, tmp_path / "again", max_steps=3).train(str(tmp_path / "run" / "checkpoint-1"))
    assert any(one.terms is None for one in rotations(whole).values())
    for name, one in rotations(resumed).items():
        assert torch.equal(one.weight, rotations(whole)[name].weight)
        assert one.terms == rotations(whole)[name].terms


def test_the_best_checkpoint_is_loaded_with_its_own_map(base: Path, tmp_path: Path, monkeypatch: Any) -> None:
    model = adapted(base, max_angle=None, num_cayley_neumann_terms=3)
    trainer = hf(
        model, AutoTokenizer.from_pretrained(base), tmp_path, max_steps=3, eval_strategy="steps", eval_steps=1,
        load_best_model_at_end=True, metric_for_best_model="eval_worse", greater_is_better=False, learning_rate=0.012,
        lr_scheduler_type="constant",
    )  # fmt: skip
    worse = itertools.count()
    monkeypatch.setattr(trainer, "_evaluate", lambda *_, **__: {"eval_worse": float(next(worse))})
    trainer.train()
    first, last = (json.loads((tmp_path / f"checkpoint-{n}/adapter/adapter_config.json").read_text()) for n in (1, 3))
    assert (first["use_cayley_neumann"], last["use_cayley_neumann"]) == (True, False)
    best = load(base, "plain")
    load_adapter(best, tmp_path / "checkpoint-1" / "adapter")
    assert torch.equal(logits(best), logits(model))


def test_what_is_saved_without_the_callback_says_what_it_lacks(base: Path, tmp_path: Path) -> None:
    trainer = hf(adapted(base, "nf4"), AutoTokenizer.from_pretrained(base), tmp_path, max_steps=1)
    trainer.train()
    with pytest.warns(UserWarning, match="the rotations are not merged"):
        trainer.save_model(str(tmp_path / "model"))


@pytest.mark.parametrize("state", ["plain", "merged", "another adapter"])
def test_nothing_to_train_is_refused(state: str, base: Path, tmp_path: Path) -> None:
    model = load(base, "plain")
    if state != "plain":
        inject(model, OFTConfig(oft_block_size=8), "default" if state == "merged" else "other")
    if state == "merged":
        merge(model)
        model.lm_head.requires_grad_(True)
    with pytest.raises(ValueError, match="no rotation of adapter 'default' trains"):
        hf(model, AutoTokenizer.from_pretrained(base), tmp_path).train()


def test_an_optimizer_without_the_rotations_is_refused_and_decay_is_said(base: Path, tmp_path: Path) -> None:
    tokenizer, model = AutoTokenizer.from_pretrained(base), adapted(base)
    other = torch.optim.SGD([model.lm_head.weight])
    trainer = hf(model, tokenizer, tmp_path)
    trainer.optimizer = other
    with pytest.raises(ValueError, match="are in no group of the optimizer"):
        trainer.train()
    with pytest.warns(UserWarning, match="weight decay pulls the rotations"):
        hf(adapted(base), tokenizer, tmp_path, weight_decay=0.1, max_steps=1).train()


def test_generators_that_a_trainer_rounded_are_float32_again(base: Path, tmp_path: Path) -> None:
    model = adapted(base, init_weights=False)
    save_adapter(model, tmp_path / "adapter")
    before = logits(model)
    for one in rotations(model).values():
        one.weight.data = one.weight.data.bfloat16()
    with pytest.warns(UserWarning, match=r"has rounded the generators .* call load_adapter"):
        hf(model, AutoTokenizer.from_pretrained(base), tmp_path)
    assert {one.weight.dtype for one in rotations(model).values()} == {torch.float32}
    load_adapter(model, tmp_path / "adapter")
    assert torch.equal(logits(model), before)


def test_checkpoints_that_would_fail_are_refused_before_the_first_step(base: Path, tmp_path: Path) -> None:
    tokenizer, model = AutoTokenizer.from_pretrained(base), adapted(base, "nf4")
    model.hf_quantizer.is_serializable = lambda *_: False  # as quanto's
    with pytest.raises(ValueError, match="cannot write a checkpoint of a bitsandbytes model: give save_strategy='no'"):
        hf(model, tokenizer, tmp_path).train()
    hf(model, tokenizer, tmp_path, save_strategy="no", max_steps=1).train()
    assert (tmp_path / "adapter" / "adapter_config.json").is_file()
