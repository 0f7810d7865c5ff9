"""configs/recipes/text-qoft-nf4.yaml with a small base: trained, stopped, resumed, tested and exported from YAML alone."""

from __future__ import annotations

import json
from pathlib import Path

import datasets
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from lightning_oft.cli import main
from tests.quantized import package

ROOT = Path(__file__).parents[2]


def run(*options: str) -> int:
    model, data, trainer = "--model.init_args", "--data.init_args", "--trainer"
    words = ["--config", str(ROOT / "configs/recipes/text-qoft-nf4.yaml"), f"{data}.max_length", "64"]
    words += [f"{data}.data", "{train: rows.jsonl, val: rows.jsonl, test: rows.jsonl}", f"{data}.val_fraction", "0.0"]
    words += [f"{trainer}.precision", "32-true", f"{trainer}.accelerator", "cpu", f"{trainer}.logger", "false"]
    words += [f"{trainer}.enable_progress_bar", "false", f"{trainer}.accumulate_grad_batches", "1"]
    words += [f"{model}.pretrained", str(ROOT / "examples/bases/docs-llama"), f"{model}.dtype", "float32"]
    words += [f"{model}.generation", "{max_new_tokens: 2}", "--oft.merged_dtype", "float32"]
    return main([options[0], *words, *options[1:]])


def adapter() -> dict[str, torch.Tensor]:
    return load_file("runs/text-qoft-nf4/adapter/adapter_model.safetensors")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning:bitsandbytes")
def test_the_recipe_is_stopped_resumed_tested_and_exported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    package("nf4")
    rows = [{"prompt": f"Say {i}", "completion": " yes" * (i + 1)} for i in range(8)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    last = "runs/text-qoft-nf4/checkpoints/last.ckpt"

    assert run("fit", "--trainer.max_epochs", "2") == 0
    whole = adapter()
    Path(last).unlink()
    assert run("fit") == 0
    stopped = adapter()
    assert run("fit", "--trainer.max_epochs", "2", "--ckpt_path", last) == 0
    resumed = adapter()
    assert all(torch.equal(resumed[name], tensor) for name, tensor in whole.items())
    assert not any(torch.equal(resumed[name], tensor) for name, tensor in stopped.items())
    kept = torch.load(last, weights_only=True)["state_dict"]
    assert all(".oft_R." in name for name in kept if "proj." in name)  # nothing of the packed base

    capsys.readouterr()
    assert run("test", "--ckpt_path", last) == 0
    assert "perplexity" in capsys.readouterr().out
    merged = "runs/text-qoft-nf4/merged"
    assert "quantization_config" not in json.loads(Path(merged, "config.json").read_text())
    assert AutoModelForCausalLM.from_pretrained(merged).dtype == torch.float32
