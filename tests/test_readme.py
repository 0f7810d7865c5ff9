"""What the README and the pages in docs/ show is what the library does: snippets run, commands parse, paths exist."""

from __future__ import annotations

import argparse
import ast
import dataclasses
import re
import shlex
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from lightning_oft import OFTConfig, OFTFinetuning
from lightning_oft.cli import FILE_COMMANDS, main
from lightning_oft.cli.application import Application

ROOT = Path(__file__).parents[1]
PAGES = ["README.md", *sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```[ \t]*$", re.MULTILINE | re.DOTALL)
QUICK = {
    "LIMIT_TRAIN_BATCHES": "1",
    "LIMIT_VAL_BATCHES": "1",
    "NUM_SANITY_VAL_STEPS": "0",
    "ACCELERATOR": "cpu",
    "ENABLE_PROGRESS_BAR": "False",
    "ENABLE_MODEL_SUMMARY": "False",
    "LOGGER": "False",
}
"""Given to every Trainer of a snippet through Lightning's own environment variables."""

pytestmark = [
    # PEFT, of every field that it does not know: ours stand under one key.
    pytest.mark.filterwarnings(r"ignore:Unexpected keyword arguments \['lightning_oft'\]:UserWarning"),
    # The README's convolution, which PEFT cannot rotate.
    pytest.mark.filterwarnings("ignore:PEFT cannot represent the rotations of conv:UserWarning"),
    # PEFT asks transformers 5 by an old name.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]


def read(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(page: str, language: str) -> list[str]:
    return [code for kind, code in FENCE.findall(read(page)) if kind == language]


def commands() -> Iterator[tuple[str, list[str]]]:
    """(page, words) of every `lightning-oft ...` in a fenced block: what follows the program's name."""
    for page in PAGES:
        for language, block in FENCE.findall(read(page)):
            if language in ("bash", "sh", "console"):
                for line in block.replace("\\\n", " ").splitlines():
                    for piece in re.split(r"&&|\|", line):
                        words = shlex.split(piece, comments=True)
                        starts = [i for i, word in enumerate(words) if word in ("lightning-oft", "lightning_oft.cli")]
                        if starts and words[starts[0] + 1 :]:
                            yield page, words[starts[0] + 1 :]


@pytest.fixture
def clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty directory that looks like a clone to what a reader types, and keeps what is written."""
    for name in ("configs", "examples", "docs"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")])
def test_snippets_run_in_their_order(page: str, clone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if page == "docs/quantized.md":
        pytest.importorskip("bitsandbytes", reason="the extra `quant`")
    for name, value in QUICK.items():
        monkeypatch.setenv(f"PL_TRAINER_{name}", value)
    names: dict[str, Any] = {"__name__": page}
    for number, code in enumerate(blocks(page, "python"), 1):
        exec(compile(code, f"{page}, snippet {number}", "exec"), names)


@pytest.mark.parametrize(
    ("page", "words"), list(commands()), ids=lambda value: value if isinstance(value, str) else " ".join(value)
)
def test_commands_parse(page: str, words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    if words[0] in FILE_COMMANDS:
        parser: argparse.ArgumentParser = import_module(f"lightning_oft.cli.{words[0]}")._parser()
        parser.parse_args(words[1:])
        return
    monkeypatch.setattr(Application, "_set_seed", lambda self: None)
    monkeypatch.setattr(Application, "instantiate_classes", lambda self: None)
    monkeypatch.setattr(Application, "_run_subcommand", lambda self, _: None)
    assert main(words) == 0


def test_every_command_of_the_program_has_an_example() -> None:
    from lightning_oft.cli import COMMANDS

    assert {words[0] for page, words in commands() if page == "docs/command-line.md"} == set(COMMANDS)


def test_the_readme_is_short() -> None:
    assert len(read("README.md").split()) <= 700


def test_the_readmes_rows_of_speed_are_those_of_the_page() -> None:
    short, whole = (
        [line for line in read(page).splitlines() if "x |" in line] for page in ("README.md", "docs/speed.md")
    )
    assert short
    assert set(short) < set(whole)
    assert blocks("README.md", "bash")[-1] == blocks("docs/speed.md", "bash")[0]


@pytest.mark.parametrize("page", PAGES)
def test_paths_exist(page: str) -> None:
    text = read(page)
    mentioned = set(re.findall(r"(?<![\w/.-])(?:configs|examples|docs|tests|lightning_oft|\.ci)/[\w./-]*[\w]", text))
    links = {link.split("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link}
    here = (ROOT / page).parent
    assert [path for path in sorted(mentioned) if not (ROOT / path).exists()] == []
    assert [link for link in sorted(links) if link and not (here / link).exists()] == []


def test_every_page_is_reached_from_the_readme() -> None:
    reached, ahead = set(), [ROOT / "README.md"]
    while ahead:
        page = ahead.pop().resolve()
        if page.suffix == ".md" and page.is_file() and page not in reached:
            reached.add(page)
            links = re.findall(r"\]\(([^)\s#]+)", page.read_text(encoding="utf-8"))
            ahead += [page.parent / link for link in links]
    assert [page for page in PAGES if ROOT / page not in reached] == []


@pytest.mark.parametrize("page", PAGES)
def test_links_into_a_page_find_their_heading(page: str) -> None:
    text = FENCE.sub("", read(page))
    heads = {
        re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    }
    assert [link for link in re.findall(r"\]\(#([^)]+)\)", text) if link not in heads] == []


@pytest.mark.parametrize("page", PAGES)
def test_options_of_the_callback_exist(page: str) -> None:
    """`name=value` in code is checked where it stands in a call or alone, `--oft.name` everywhere."""
    text = read(page)
    own = set(OFTFinetuning.__init__.__annotations__) | {field.name for field in dataclasses.fields(OFTConfig)}
    flags = set(re.findall(r"--oft\.(\w+)", text))
    assert flags <= own
    for call in re.findall(r"`((?:OFTFinetuning|OFTConfig)\([^`]*\))`", text):
        if "..." not in call:
            node = ast.parse(call, mode="eval").body
            assert isinstance(node, ast.Call)
            assert {keyword.arg for keyword in node.keywords} <= own


def test_the_table_of_fields_is_complete_and_right() -> None:
    peft = pytest.importorskip("peft")
    rows = re.findall(
        r"^\| `(\w+)` \| (.+?) \| (.+?) \|", read("docs/coming-from-peft.md").split("## Fields")[1], re.MULTILINE
    )
    theirs, ours = peft.OFTConfig(), OFTConfig()
    assert [name for name, _, _ in rows] == [field.name for field in dataclasses.fields(OFTConfig)]
    for name, at_peft, here in rows:
        assert here.strip("`") == repr(getattr(ours, name)), name
        assert at_peft.strip("`") == (repr(getattr(theirs, name)) if hasattr(theirs, name) else "-"), name
