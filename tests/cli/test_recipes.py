"""Recipes, with a tiny model in the place of the real one and a few rows in the place of the data."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BertConfig, BertModel

from lightning_oft.cli import main

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "configs" / "recipes" / "text-classification.yaml"


def test_text_classification(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = BertConfig(
        vocab_size=1024, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=128, pad_token_id=2,
    )  # fmt: skip
    BertModel(config).save_pretrained(tmp_path / "base")
    AutoTokenizer.from_pretrained(ROOT / "examples" / "bases" / "docs-llama").save_pretrained(tmp_path / "base")
    for split, count in (("train", 40), ("test", 4)):
        rows = [{"text": f"number {i}", "label": i % 4} for i in range(count)]
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    data = json.dumps({split: str(tmp_path / f"{split}.jsonl") for split in ("train", "test")})
    changes = {
        "model.init_args.pretrained": tmp_path / "base",
        "data.init_args.data": data,
        "trainer.accelerator": "cpu",
        "trainer.logger": "false",
        "trainer.enable_progress_bar": "false",
        "trainer.default_root_dir": tmp_path,
        "oft.export_dir": tmp_path / "out",
    }
    words = [word for name, value in changes.items() for word in (f"--{name}", str(value))]
    assert RECIPE.read_text(encoding="utf-8").startswith(f"# lightning-oft fit --config {RECIPE.relative_to(ROOT)}\n")
    assert main(["fit", "--config", str(RECIPE), *words]) == 0
    said = capsys.readouterr().out
    assert [line.split()[0] for line in said.splitlines() if line.startswith(("before", "after"))] == [
        "before",
        "after",
    ]
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out" / "merged")
    assert merged.config.num_labels == 4
    assert AutoTokenizer.from_pretrained(tmp_path / "out" / "merged")("number").input_ids
