"""The README's two commands are the ones that CI runs, and there is one way to read them."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def reader() -> ModuleType:
    spec = importlib.util.spec_from_file_location("readme_commands", ROOT / ".ci" / "readme_commands.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_readme_trains_and_then_tests(reader: ModuleType) -> None:
    train, test = reader.readme_commands(ROOT / "README.md")[:2]
    for command in (train, test):
        assert re.search(r"python3? -m venv (\S+) && \. \1/bin/activate", command), (
            "each command brings its own environment"
        )
        assert "pip install" in command
    config = re.search(r"lightning-oft fit --config (\S+)", train)
    assert config is not None
    assert (ROOT / config[1]).is_file()
    assert re.search(r"\bpytest\b", test)


def test_blocks_of_other_languages_do_not_count(reader: ModuleType, tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(
        "```python\nx\n```\n```bash\na \\\n  && b\n```\n\n```console\nc\n```\n```bash\nd\n```\n", encoding="utf-8"
    )
    assert reader.readme_commands(readme) == ["a \\\n  && b", "d"]


def test_a_readme_without_both_commands_is_refused(reader: ModuleType, tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text("```bash\na\n```\n", encoding="utf-8")
    with pytest.raises(SystemExit, match="found 1"):
        reader.readme_commands(readme)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="a bash script")
@pytest.mark.parametrize(
    ("commands", "code", "last"),
    [
        (
            ['test -n "$PIP_CONSTRAINT" && test -n "$VIRTUAL_ENV"', "echo '= 7 passed in 0.01s ='"],
            0,
            "= 7 passed in 0.01s =",
        ),
        (["read -r line", "echo '= 7 passed in 0.01s ='"], 1, None),
        (["true", "echo '= 1 failed in 0.01s =' && exit 1"], 1, None),
    ],
    ids=["passes", "first fails", "second fails"],
)
def test_the_script_fails_when_either_command_does(
    commands: list[str], code: int, last: str | None, tmp_path: Path
) -> None:
    for name in ("run", "readme_commands.py", "constraints.txt"):
        (tmp_path / "clone" / ".ci").mkdir(parents=True, exist_ok=True)
        (tmp_path / "clone" / ".ci" / name).write_bytes((ROOT / ".ci" / name).read_bytes())
    text = "".join(f"```bash\n{command}\n```\n" for command in commands)
    (tmp_path / "clone" / "README.md").write_text(text, encoding="utf-8")
    (tmp_path / "scratch").mkdir()
    run = subprocess.run(
        ["bash", ".ci/run"],
        cwd=tmp_path / "clone",
        env={**os.environ, "TMPDIR": str(tmp_path / "scratch")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == code, run.stdout + run.stderr
    assert last is None or run.stdout.splitlines()[-1] == last
    assert list((tmp_path / "scratch").iterdir()) == [], "nothing is left behind"
