"""Every example runs, and shows what its docstring promises."""

from __future__ import annotations

import ast
import importlib.util
import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
FILES = sorted(path.relative_to(EXAMPLES).as_posix() for path in EXAMPLES.rglob("*.py"))
TOOLS = {
    "architecture.py", "compare_with_peft.py", "control.py", "forgetting.py", "forgetting_picture.py", "picture.py",
    "requantize.py", "scaling_plan.py",
}  # fmt: skip
"""What makes a table or a picture; like what makes bases and texts, and the benchmarks, not one idea."""
COMMANDS = [name for name in FILES if "__main__" in (EXAMPLES / name).read_text(encoding="utf-8")]
"""What is run; a benchmark keeps its parts in files beside it."""
IDEAS = [name for name in FILES if name not in TOOLS and not name.startswith(("bases/", "benchmarks/", "text/"))]

pytestmark = [
    # PEFT, of every field that it does not know: ours stand under one key.
    pytest.mark.filterwarnings(r"ignore:Unexpected keyword arguments \['lightning_oft'\]:UserWarning"),
    # PEFT asks transformers 5 by an old name.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]


def load(name: str) -> Any:
    """The example as a module; its main() does not run."""
    spec = importlib.util.spec_from_file_location(f"examples_{Path(name).stem}", EXAMPLES / name)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look themselves up there
    spec.loader.exec_module(module)
    return module


def table(text: str) -> list[list[str]]:
    """The cells of every row of a Markdown table, the line below its head left out."""
    rows = [line for line in text.splitlines() if line.startswith("|") and not line.startswith("|-")]
    return [[cell.strip() for cell in row.strip("| ").split(" | ")] for row in rows]


def check_regression(found: Any) -> None:
    before, after = found
    assert after < before / 5


def check_max_angle(found: Any) -> None:
    assert found[5.0][1] <= 5.0
    assert found[20.0][1] <= 20.0 < found[None][1]
    assert found[None][0] < found[20.0][0] < found[5.0][0]


def check_experts_memory(found: Any) -> None:
    copy = found["all weights of down_proj"]
    assert found["rotated"] - found["frozen"] < copy / 4
    assert found["rotated, eager"] - found["frozen"] > copy
    page = (ROOT / "docs" / "text.md").read_text(encoding="utf-8")
    assert all(f"{name}: {size:.1f} MiB" in page for name, size in found.items())


def check_two_adapters(found: Any) -> None:
    assert found["disabled, to the base"] == 0.0
    assert max(found.values()) < 1e-4


def check_peft_roundtrip(found: Any) -> None:
    assert found["adapter to base"] > 0.05
    assert found["PEFT, from our files"] < 1e-5
    assert found["here, from PEFT's files"] < 1e-5


def check_fabric(found: Any) -> None:
    first, last = found
    assert last < first


SHOWN: dict[str, Callable[[Any], None]] = {
    "callback_in_five_lines.py": check_regression,
    "coft_max_angle.py": check_max_angle,
    "experts_memory.py": check_experts_memory,
    "fabric.py": check_fabric,
    "peft_roundtrip.py": check_peft_roundtrip,
    "two_adapters.py": check_two_adapters,
}


@pytest.mark.parametrize("name", SHOWN)
def test_example_shows_what_it_promises(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    SHOWN[name](load(name).main())
    assert list(tmp_path.iterdir()) == [], "an example leaves nothing behind"


@pytest.mark.parametrize("name", COMMANDS)
def test_example_says_how_to_run_it(name: str) -> None:
    said = ast.get_docstring(ast.parse((EXAMPLES / name).read_text(encoding="utf-8"))) or ""
    assert re.search(rf"^ *(python|torchrun [^\n]*) examples/{re.escape(name)}", said, re.MULTILINE)


@pytest.mark.parametrize("name", IDEAS)
def test_example_is_one_idea(name: str) -> None:
    assert len((EXAMPLES / name).read_text(encoding="utf-8").splitlines()) < 60


def test_every_idea_has_its_check() -> None:
    assert list(SHOWN) == IDEAS


def test_the_documented_comparison_is_what_the_command_prints() -> None:
    page = (ROOT / "docs" / "coming-from-peft.md").read_text(encoding="utf-8")
    documented = table(page.split("Where the numbers differ")[1].split("\n## ")[0])
    pytest.importorskip("peft", "0.21.2")
    printed = [list(row) for row in load("compare_with_peft.py").main()]
    if printed[0] != documented[0]:
        pytest.skip(f"documented for {documented[0][1]}, installed is {printed[0][1]}")
    assert [row[0] for row in printed] == [row[0] for row in documented]
    for ours, theirs in zip(printed, documented, strict=True):
        for now, then in zip(ours, theirs, strict=True):
            if re.fullmatch(r"\d\.\de[+-]\d\d", then) is None:
                assert now == then
            elif float(then) < 1e-5:  # rounding, which another machine does otherwise
                assert float(now) < 1e-4
            else:
                assert float(now) == pytest.approx(float(then), rel=0.1)


def test_the_documented_errors_are_what_the_command_prints() -> None:
    pytest.importorskip("bitsandbytes", reason="the extra `quant`")
    pytest.importorskip("torchao", reason="the extra `quant`")
    page = (ROOT / "docs" / "quantized.md").read_text(encoding="utf-8")
    documented = table(page.split("What requantizing costs")[1].split("##")[0])
    printed = [list(row) for row in load("requantize.py").main()]
    assert [row[0] for row in printed] == [row[0] for row in documented]
    for ours, theirs in zip(printed[1:], documented[1:], strict=True):
        assert [float(now) for now in ours[1:]] == pytest.approx([float(then) for then in theirs[1:]], rel=0.1)


def test_the_files_of_a_base_are_merged_as_in_memory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    benchmark = load("benchmarks/merge_files.py")
    benchmark.write_base(tmp_path, 0.0002, 64)
    most, tensors = benchmark.measure(tmp_path)
    assert most >= 0
    benchmark.compare(tmp_path)
    assert capsys.readouterr().out == f"equal to the bit: {tensors} of {tensors} tensors\n"


def test_the_picture_is_drawn_and_small(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the extra `plot`")
    forgetting = load("forgetting_picture.py")
    for drawn, draw in (
        ("oft.png", load("picture.py").main),
        ("forgetting-digits.png", partial(forgetting.main, "digits")),
        ("forgetting-text.png", partial(forgetting.main, "text")),
        ("forgetting-drawings.png", partial(forgetting.main, "drawings")),
    ):
        draw(target=tmp_path / drawn)
        for picture in (tmp_path / drawn, ROOT / "docs" / drawn):
            assert picture.read_bytes().startswith(b"\x89PNG")
            assert 10_000 < picture.stat().st_size < 150_000


def tiny_digits(forgetting: Any) -> Any:
    study = forgetting.Digits()
    study.train, study.epochs, study.steps, study.points = [column[:64] for column in study.train], 1, 1, [1]
    return study


def tiny_text(forgetting: Any) -> Any:
    study = forgetting.Text()
    row = {name: values[:16] for name, values in study.rows["train"][0].items()}
    study.rows["train"], study.scored, study.steps, study.points = [row] * 4, {"new": [row], "original": [row]}, 1, [1]
    return study


def tiny_drawings(forgetting: Any) -> Any:
    forgetting.Drawings.class_pictures, forgetting.Drawings.counts = 2, {"seen": 1, "unseen": 1, "old": 1}
    study = forgetting.Drawings()
    study.steps, study.points, study.given = 1, [1], study.given | {"sampling": {"num_inference_steps": 1}}
    return study


@pytest.mark.parametrize(("task", "tiny"), [("digits", tiny_digits), ("text", tiny_text), ("drawings", tiny_drawings)])
def test_every_method_that_a_picture_compares_trains_what_it_says(
    task: str, tiny: Callable[[Any], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("peft", "0.21.2")
    example = load("forgetting.py")
    measured = example.read(ROOT / "docs" / f"forgetting-{task}.jsonl")
    study = tiny(example)
    runs = len(study.methods) * (len(study.rates) * study.seeds + study.again)
    assert len(example.done(measured)) == runs
    assert list(example.missing(study, measured)) == []
    study.rates, study.seeds, study.again = [study.rates[-1]], 1, 0
    monkeypatch.setitem(example.STUDIES, task, lambda: study)
    for _ in range(2):  # the second finds every run in the file
        example.main(task, tmp_path / "measured.jsonl")
    found = example.read(tmp_path / "measured.jsonl")
    trained = {point["method"]: point["trained"] for point in measured}
    assert [(point["method"], point["trained"]) for point in found] == list(trained.items())


def test_what_is_said_of_forgetting_is_what_was_measured() -> None:
    pytest.importorskip("matplotlib", reason="the extra `plot`")
    picture = load("forgetting_picture.py")
    page = (ROOT / "docs" / "forgetting.md").read_text(encoding="utf-8")
    for task, look in picture.LOOKS.items():
        found = picture.points(ROOT / "docs" / f"forgetting-{task}.jsonl")
        assert "\n".join(picture.table(found, look)) in page
        assert (
            not look.columns
            or "\n".join(picture.at_best_rates(ROOT / "docs" / f"forgetting-{task}.jsonl", look)) in page
        )


def test_what_the_readme_says_of_forgetting_is_what_was_measured() -> None:
    pytest.importorskip("matplotlib", reason="the extra `plot`")
    picture = load("forgetting_picture.py")
    found = picture.points(ROOT / "docs" / "forgetting-digits.jsonl")
    best = picture.frontier(found, better=(1, 1))
    shown = {}
    for method, lr in (("full finetuning", 2e-4), ("LoRA r=16", 1e-3), ("OFT held at 20°", 2e-3)):
        point = next(point for point in found[method] if point.lr == lr)
        assert point in best
        shown[method] = (round(point.new, 2), round(point.old, 2))
    assert shown == {"full finetuning": (0.91, 0.95), "LoRA r=16": (0.93, 0.92), "OFT held at 20°": (0.94, 0.91)}
    readme = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    assert (
        "0.91 of the new digits and still 0.95 of the old, LoRA 0.93 and 0.92, OFT held at 20 degrees 0.94 and 0.91"
        in readme
    )
    assert "from 4 to 64 times the smallest rate OFT at 20 degrees reads 0.94 and keeps 0.87 or more" in readme
    for point in found["OFT held at 20°"][2:]:
        assert (round(point.new, 2), round(point.old, 2) >= 0.87) == (0.94, True)
    assert max(found[method][-1].old for method in ("full finetuning", "LoRA r=16", "OFT")) < 0.12
    assert not set(best) & set(found["OFT"])


def test_the_shipped_prompts_and_the_subject_are_what_the_script_draws(tmp_path: Path) -> None:
    drawings, bases = load("bases/drawings.py"), EXAMPLES / "bases"
    drawings.write_subject(tmp_path / "drawn-subject")
    drawings.write_prompts(tmp_path / "drawn-prompts")
    for file in (file.relative_to(tmp_path) for file in tmp_path.rglob("*.*")):
        shipped = bases / file
        assert shipped.is_file()
        if file.suffix == ".jsonl":  # another Pillow compresses otherwise
            assert shipped.read_text(encoding="utf-8") == (tmp_path / file).read_text(encoding="utf-8")
