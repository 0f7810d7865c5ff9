"""The comparison on MiniLM: what the page shows is what the file holds, and every method trains what the file says."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def minilm(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The benchmark as a module, found as the command finds it."""
    pytest.importorskip("peft", "0.21.2")
    monkeypatch.syspath_prepend(ROOT / "examples" / "benchmarks")
    monkeypatch.delitem(sys.modules, "minilm", raising=False)
    yield importlib.import_module("minilm")
    sys.modules.pop("minilm")


def test_the_page_shows_every_run_of_the_file(minilm: Any, capsys: pytest.CaptureFixture[str]) -> None:
    measured = ROOT / "docs" / "minilm.jsonl"
    before = measured.read_bytes()
    minilm.main(measured)
    assert measured.read_bytes() == before, "no run is missing"
    assert len(before.splitlines()) == len(minilm.METHODS) * (3 + 5)
    assert capsys.readouterr().out in (ROOT / "docs" / "minilm.md").read_text(encoding="utf-8")


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_every_method_trains_what_the_file_says(minilm: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("docstrings-train.csv", "docstrings-val.csv", "sentences.csv"):
        lines = (minilm.TEXT / name).read_text(encoding="utf-8").splitlines(keepends=True)
        few = lines[:3] if name == "sentences.csv" else lines[:1] + lines[1 :: (len(lines) - 1) // 4]  # one of a class
        (tmp_path / name).write_text("".join(few), encoding="utf-8")
    monkeypatch.setattr(minilm, "TEXT", tmp_path)
    recorded = minilm.read(ROOT / "docs" / "minilm.jsonl")
    for method, (adapter, rates) in minilm.METHODS.items():
        found = minilm.run(adapter, rates[0], 0, "val", steps=1)
        assert {found["trained"]} == {run["trained"] for run in recorded if run["method"] == method}
        assert 0 <= found["accuracy"] <= 1
        assert -1 <= found["similarity"] <= 1


def test_the_texts_share_no_row(minilm: Any) -> None:
    files = [minilm.TEXT / f"docstrings-{split}.csv" for split in ("train", "val", "test")]
    texts = [line for file in files for line in file.read_text(encoding="utf-8").splitlines()[1:]]
    assert len(texts) == len(set(texts)) == 1440
