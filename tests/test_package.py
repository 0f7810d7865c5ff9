"""What a user meets before any model does: the import, the names, the version, the metadata."""

import itertools
import os
import re
import subprocess
import sys
import tempfile
from importlib import resources
from importlib.metadata import metadata, version
from pathlib import Path

import pytest

import lightning_oft

ROOT = Path(__file__).parents[1]
PYPROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", lightning_oft.__all__)
def test_public_name_resolves(name: str) -> None:
    assert getattr(lightning_oft, name) is not None


def test_dir_lists_the_public_names() -> None:
    assert set(lightning_oft.__all__) <= set(dir(lightning_oft))
    assert lightning_oft.__all__ == sorted(lightning_oft.__all__)


def test_every_lazy_name_is_public() -> None:
    assert {*lightning_oft._HOME, "__version__"} == set(lightning_oft.__all__)


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'injekt'"):
        lightning_oft.injekt  # noqa: B018


@pytest.mark.subprocess
def test_version_and_import_need_no_torch() -> None:
    # sys.modules, not the clock: torch alone takes two seconds, but a busy machine takes as long for nothing.
    code = (
        "import sys, lightning_oft; from lightning_oft.cli import main\n"
        "assert not main(['--version'])\n"
        "heavy = {'torch', 'lightning', 'pytorch_lightning', 'transformers', 'jsonargparse', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (run.returncode, run.stderr) == (0, "")
    assert run.stdout == f"lightning-oft {lightning_oft.__version__}\n"


def test_installed_metadata_agrees_with_the_source() -> None:
    assert version("lightning_oft") == lightning_oft.__version__
    assert metadata("lightning_oft")["License-Expression"] == "Apache-2.0"


def test_type_information_is_shipped() -> None:
    assert resources.files("lightning_oft").joinpath("py.typed").is_file()


def bounds(text: str) -> list[tuple[str, str]]:
    """(requirement line, line above it) for every requirement written in pyproject.toml."""
    lines = text.splitlines()
    requirement = re.compile(r"^\s*\"[A-Za-z0-9_\-]+(\[[^\]]*\])?\s*([<>=!~].*)?\",\s*(#.*)?$")
    section = ""
    found = []
    for above, line in itertools.pairwise(["", *lines]):
        section = line if line.startswith("[") else section
        if section in ("[project]", "[project.optional-dependencies]") and requirement.match(line):
            found.append((line, above))
    return found


def test_every_dependency_bound_says_why() -> None:
    requirements = [(line, above) for line, above in bounds(PYPROJECT) if re.search(r"[<>=!~]|lightning_oft\[", line)]
    assert len(requirements) >= 18
    assert [line for line, above in requirements if not above.strip().startswith("#")] == []


def test_every_ignored_warning_says_why() -> None:
    block = PYPROJECT.split("filterwarnings = [")[1].split("]\n")[0].splitlines()
    reasons = [above for above, line in itertools.pairwise(block) if "ignore:" in line]
    assert reasons
    assert all(above.strip().startswith(("#", '"ignore:')) for above in reasons)


def test_no_file_names_a_place_of_the_machine_it_was_written_on() -> None:
    suffixes = {".py", ".md", ".yaml", ".yml", ".toml", ".txt"}
    folders = ("lightning_oft", "configs", "docs", "examples", ".ci")
    files = [*ROOT.glob("*.*"), *(file for folder in folders for file in (ROOT / folder).rglob("*"))]
    own = (ROOT, Path.home(), Path(sys.prefix), Path(tempfile.gettempdir()))
    places = [re.escape(f"{place}{os.sep}") for place in own if len(place.parts) > 1]
    pattern = re.compile("|".join(["/home/", "/Users/", *places]))
    texts = [f for f in files if f.is_file() and f.suffix in suffixes]
    assert [str(f.relative_to(ROOT)) for f in texts if pattern.search(f.read_text(encoding="utf-8"))] == []
