"""A short run of the fuzzer; `python tools/fuzz/readers.py` is the long one."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))
from fuzz import mutations, readers


@pytest.fixture(scope="module")
def kinds() -> list[mutations.Files]:
    return readers.originals()


def test_damaged_adapters_load_or_are_refused_in_one_line() -> None:
    report = readers.Report()
    readers.fuzz_adapters(200, 1, report)
    assert report.findings == []
    assert min(report.outcomes["refused"], report.outcomes["loaded"]) > 20


def test_damaged_configurations_are_read_or_refused_in_one_line() -> None:
    report = readers.Report()
    readers.fuzz_yaml(20, 0, report)
    assert report.findings == []
    assert min(report.outcomes["refused"], report.outcomes["read"]) > 0


def test_undamaged_directories_load(kinds: list[mutations.Files], tmp_path: Path) -> None:
    for files in kinds:
        readers._place(files, tmp_path)
        assert readers.load(tmp_path) == "loaded"


def test_equal_seeds_damage_alike_and_every_mutation_damages(kinds: list[mutations.Files]) -> None:
    for seed in range(20):
        first, second = (mutations.mutated(kinds[0], random.Random(seed)) for _ in range(2))
        assert first == second
    for change in mutations.MUTATIONS:
        results = []
        for seed in range(10):
            files = dict(kinds[0])
            change(files, random.Random(seed))
            results.append(files)
        assert any(files != kinds[0] for files in results), change.__name__


def test_a_reader_that_breaks_its_promise_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise KeyError("shape")

    monkeypatch.setattr(readers, "load_adapter", broken)
    report = readers.Report()
    readers.fuzz_adapters(3, 0, report)
    assert report.outcomes == {"FINDING KeyError": 3}
    assert "KeyError: \"'shape'\"" in report.findings[0]
