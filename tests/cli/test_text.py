"""configs/text.yaml, a quarter of it: what a person who runs it sees, and what is left on disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from lightning_oft.cli import main
from lightning_oft.cli.tables import sample_table

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
# PEFT, of every field that it does not know: ours stand under one key.
@pytest.mark.filterwarnings(r"ignore:Unexpected keyword arguments \['lightning_oft'\]:UserWarning")
# PEFT asks transformers 5 by an old name.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_the_offline_run_learns_says_so_and_leaves_what_plain_libraries_load(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    options = {"limit_train_batches": 50, "enable_progress_bar": "false", "limit_val_batches": 1, "accelerator": "cpu"}
    words = [word for key, value in options.items() for word in (f"--trainer.{key}", str(value))]
    assert main(["fit", "--config", str(ROOT / "configs" / "text.yaml"), *words]) == 0
    lines = capsys.readouterr().out.splitlines()
    lines = lines[next(i for i, line in enumerate(lines) if "new/perplexity" in line) :]
    heads, before, after = (line.split() for line in lines[:3])
    assert heads == ["new/perplexity", "original/perplexity"]
    assert float(after[1]) < float(before[1]) / 2
    samples = lines[3:9]
    assert [line.split()[0] for line in samples] == ["before", "after"] * 3
    prompts = [prompt for prompt in ("In the beginning", "When the", "And it") for _ in range(2)]
    assert all(line[8:].startswith(prompt) for line, prompt in zip(samples, prompts, strict=True))
    assert 'AutoModelForCausalLM.from_pretrained("runs/text/merged")' in lines[-1]
    merged = AutoModelForCausalLM.from_pretrained("runs/text/merged").eval()
    base = AutoModelForCausalLM.from_pretrained("examples/bases/docs-llama", dtype=torch.float32)
    adapted = PeftModel.from_pretrained(base, "runs/text/adapter").eval()
    ids = AutoTokenizer.from_pretrained("runs/text/merged")("And it came to pass", return_tensors="pt").input_ids
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, adapted(ids).logits, atol=1e-4, rtol=1e-4)


ROWS: dict[str, dict[str, Any]] = {
    "sft": {"prompt": "Say it", "completion": " yes"},
    "chat-sft": {"messages": [{"role": "user", "content": "Say"}, {"role": "assistant", "content": "yes"}]},
    "grpo": {"prompt": "Two and two are", "answer": "4"},
}
OPTIONS = {
    "sft": {"max_length": "64"},
    # The template's path is that of a checkout, where the recipes lie too.
    "chat-sft": {"max_length": "200", "chat_template": str(ROOT / "configs/recipes/llama-3-chat.jinja")},
    "grpo": {"max_length": "64"},
}


@pytest.mark.parametrize("recipe", ROWS)
def test_the_recipe_runs_with_a_small_base(recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    (tmp_path / "rows.jsonl").write_text((json.dumps(ROWS[recipe]) + "\n") * 10)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    model, data, trainer = "--model.init_args", "--data.init_args", "--trainer"
    words = ["fit", "--config", str(ROOT / f"configs/recipes/text-{recipe}.yaml"), f"{data}.data", "rows.jsonl"]
    words += [word for name, value in OPTIONS[recipe].items() for word in (f"{data}.{name}", value)]
    words += [f"{data}.val_fraction", "0.2", f"{trainer}.precision", "32-true", f"{trainer}.max_steps", "1"]
    words += [f"{model}.pretrained", "examples/bases/docs-llama", f"{model}.dtype", "float32"]
    words += [f"{model}.generation", "{max_new_tokens: 2}", f"{trainer}.accelerator", "cpu"]
    words += [f"{trainer}.enable_progress_bar", "false", f"{trainer}.logger", "false"]
    words += [f"{model}.max_completion_length", "4"] if recipe == "grpo" else []
    assert main(words) == 0
    assert {path.name for path in (tmp_path / "runs" / f"text-{recipe}").iterdir()} >= {"adapter", "merged"}


@pytest.mark.parametrize("command", ["validate", "test", "predict"])
def test_a_run_on_a_set_that_is_not_there_says_so(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps(ROWS["sft"]) + "\n")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)
    words = [command, "--model", "lightning_oft.tasks.CausalLM", "--data", "lightning_oft.data.TextDataModule"]
    words += [
        "--model.pretrained",
        str(ROOT / "examples/bases/docs-llama"),
        "--data.data",
        str(tmp_path / "rows.jsonl"),
    ]
    words += ["--trainer.accelerator", "cpu", "--trainer.logger", "false", "--trainer.enable_progress_bar", "false"]
    assert main(words) == 2
    assert f"{command}: the data has no " in capsys.readouterr().err
    # Told to run nothing, it does.
    assert main([*words, f"--trainer.limit_{'val' if command == 'validate' else command}_batches", "0"]) == 0


def test_samples_stand_below_each_other() -> None:
    table = sample_table({"One": " two\nthree"}, {"One": "s"})
    assert table.splitlines() == ["before  One two three", "after   Ones"]
