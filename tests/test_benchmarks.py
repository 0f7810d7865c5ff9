"""The benchmark runs at tiny sizes; its counts do not depend on a clock, and its bounds are not rounded in our favour."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parents[1] / "examples" / "benchmarks"
PARTS = ("measuring", "models", "report", "bounds", "suites", "speed")
SMALL = "--hidden 64 --layers 1 --tokens 1x8 --linear 64 --count 3 3 --unet 32 --vit 64 --image 64"
QUICK = "--rounds 1 1 --seconds 0.01 --threads 1 --devices cpu"
COLUMNS = ["frozen base", "PEFT LoRA r=16", "PEFT OFT", "PEFT OFT exact", "ours", "ours exact"]

pytestmark = [
    # PEFT, of a base that transformers did not load from a hub.
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
    # PEFT asks transformers 5 by an old name.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The benchmark's files as modules, found as the command finds them: in its own folder."""
    pytest.importorskip("peft")
    monkeypatch.syspath_prepend(FOLDER)
    for name in PARTS:
        monkeypatch.delitem(sys.modules, name, raising=False)
    loaded = {name: importlib.import_module(name) for name in PARTS}
    yield loaded
    for name in PARTS:
        sys.modules.pop(name, None)


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("| ").split(" | ")]


def test_every_suite_has_its_rows_and_columns(parts: Any, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    target, picture = tmp_path / "speed.json", tmp_path / "speed.png"
    arguments = f"{SMALL} {QUICK} --output {target} --plot {picture}".split()
    rows = parts["speed"].main(arguments)
    printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert cells(printed[0]) == ["model", "measured", "read as", *COLUMNS]
    assert len(printed) == 1 + len(rows)
    measured = {row.what.split(",")[0] for row in rows}
    assert measured >= {"training step", "kept for backward", "generated token", "merge", "unmerge", "inject", "save"}
    timed = [row for row in rows if row.unit == "ms"]
    assert {row.clock for row in timed} == {"CPU, 1 thread", "wall, 1 threads"}
    assert all(sample >= 0 for row in timed for samples in row.values.values() for sample in samples)
    saved = json.loads(target.read_text(encoding="utf-8"))
    assert saved["environment"]["cpu"]
    assert [row["values"] for row in saved["rows"]] == [row.values for row in rows]
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_saved_run_is_held_to_the_bounds(parts: Any, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    target = str(tmp_path / "speed.json")
    parts["report"].save(target, {"cpu": "none"}, [row(parts, "ours", 1.12001)])
    parts["speed"].main(["--read", target, "--list"])
    lines = [cells(line) for line in capsys.readouterr().out.splitlines() if line.startswith("| 2")]
    assert ["ours / limit: 1.121", "", "<= 1.12", "NO"] in [line[4:] for line in lines]
    assert {line[-1] for line in lines} == {"NO", "not measured"}


@pytest.mark.parametrize(("value", "shown", "holds"), [(1.12, "1.12", "yes"), (1.1200001, "1.121", "NO")])
def test_a_figure_is_rounded_against_us(parts: Any, value: float, shown: str, holds: str) -> None:
    bound = next(bound for bound in parts["bounds"].BOUNDS if bound.limit == 1.12)
    (line,) = parts["bounds"]._lines(bound, [row(parts, "ours", value)])
    assert line[4].endswith(f": {shown}")
    assert line[-1] == holds


def row(parts: Any, name: str, value: float) -> Any:
    return parts["report"].Row(
        "Llama 768 x 4", "training step, 2 x 512", "any", "ms", {"frozen base": [1.0], name: [value]}
    )


def test_counts_and_bytes_are_the_same_in_every_run(parts: Any) -> None:
    arguments = f"{SMALL} {QUICK} --only operators kept".split()
    first, second = (parts["speed"].main(arguments) for _ in range(2))
    assert {row.clock for row in first} == {"count", "saved tensors", "live tensors"}
    assert [row.values for row in first] == [row.values for row in second]


def test_views_and_bare_allocation_are_not_counted(parts: Any) -> None:
    import torch

    x = torch.ones(4, 4)
    count = parts["measuring"].count_operators
    assert count(lambda: torch.empty_like(x.detach().t().reshape(2, 8))[0]) == 1  # the copy, as no view can do that
    assert count(lambda: x.view(16).unsqueeze(0).t()) == 0
    assert count(lambda: (x @ x).add_(1)) == 2


def test_live_bytes_follow_tensors_as_they_come_and_go(parts: Any) -> None:
    import torch

    before = torch.ones(1000)
    with parts["measuring"].LiveBytes() as live:
        first = before + 1
        second = first.view(10, 100)[0]
        assert live.now == 4000
        del first
        assert live.now == 4000
        del second
        assert (live.now, live.peak) == (0, 4000)
    with parts["measuring"].LiveBytes([before]) as live:
        before = before + 1  # as a merged weight takes its base's place
        assert (live.now, live.peak) == (0, 4000)
