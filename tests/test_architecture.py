"""The house: who imports whom, how long a file may be, and that docs/architecture.md says so. Nothing is run."""

from __future__ import annotations

import ast
import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]
MAX_LINES, MAX_FUNCTION_LINES = 300, 40
VAGUE = {"util", "utils", "helper", "helpers", "manager", "wrapper", "common", "misc"}
LIGHTNING_FROM = 4
"""The lowest floor that knows Lightning."""


@pytest.fixture(scope="module")
def house() -> ModuleType:
    """The script that draws the picture; it reads the imports."""
    spec = importlib.util.spec_from_file_location("architecture", ROOT / "examples" / "architecture.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _climbs(house: ModuleType, files: dict[str, set[str]]) -> list[str]:
    floor_of = {part: level for level, parts in enumerate(house.FLOORS) for part in parts}
    return [
        f"{name} imports {other}"
        for name, others in files.items()
        for other in others
        if house.folder(name) != house.folder(other) and floor_of[house.folder(name)] <= floor_of[house.folder(other)]
    ]


def _circles(files: dict[str, set[str]]) -> list[str]:
    """Files that import themselves by way of others: what is left when files without imports are taken away in turn."""
    left = {name: set(others) for name, others in files.items()}
    while done := {name for name, others in left.items() if not others & left.keys()}:
        left = {name: others for name, others in left.items() if name not in done}
    return sorted(left)


def test_a_file_imports_only_from_lower_floors_or_its_own_folder(house: ModuleType) -> None:
    assert _climbs(house, house.graph()) == []


def test_no_file_imports_itself_by_way_of_others(house: ModuleType) -> None:
    assert _circles(house.graph()) == []


def test_what_climbs_or_circles_is_seen(house: ModuleType, tmp_path: Path) -> None:
    known = {"model.merging": tmp_path, "callback": tmp_path, "model": tmp_path, "layers.base": tmp_path}
    source = tmp_path / "merging.py"
    source.write_text(
        "if TYPE_CHECKING:\n    from lightning_oft.callback import OFTFinetuning\n"
        "def f():\n    from lightning_oft.layers import base\n    from . import other\n"
    )
    found = set(house.imported("model.merging", source, known))
    assert found == {"callback", "layers.base", "model"}
    assert _climbs(house, {"model.merging": found}) == ["model.merging imports callback"]
    assert _circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}, "e": set()}) == ["a", "b", "c", "d"]


def test_lightning_is_known_from_the_callback_up_and_peft_nowhere(house: ModuleType) -> None:
    allowed = {part for floor in house.FLOORS[LIGHTNING_FROM:] for part in floor}
    found = []
    for name, file in house.modules().items():
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            tops = {one.partition(".")[0] for one in names}
            if "peft" in tops or (tops & {"lightning", "pytorch_lightning"} and house.folder(name) not in allowed):
                found.append(f"{name}:{getattr(node, 'lineno', 0)}")
    assert found == []


def test_no_file_is_hidden_by_a_name_of_its_folder(house: ModuleType) -> None:
    """`from folder import name` must give the same thing whatever was imported before."""
    hidden = []
    for name, file in house.modules().items():
        if file.name == "__init__.py":
            tree = ast.parse(file.read_text(encoding="utf-8"))
            taken = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
            # What is taken from the folder itself are its files.
            taken = [node for node in taken if node.module != f"lightning_oft.{name}".rstrip(".")]
            named = {alias.asname or alias.name for node in taken for alias in node.names}
            named |= {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
            hidden += [
                f"{name}.{one}" for one in named if (file.parent / f"{one}.py").exists() or (file.parent / one).is_dir()
            ]
    assert hidden == []


def test_files_and_functions_stay_short(house: ModuleType) -> None:
    long = []
    for name, file in house.modules().items():
        source = file.read_text(encoding="utf-8")
        if source.count("\n") > MAX_LINES:
            long.append(f"{name} has {source.count(chr(10))} lines: would a folder of the same name read better?")
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                body = [
                    one for one in node.body if not (isinstance(one, ast.Expr) and isinstance(one.value, ast.Constant))
                ]
                lines = (node.end_lineno or 0) - body[0].lineno + 1 if body else 0
                long += [f"{name}.{node.name} has {lines} lines"] if lines > MAX_FUNCTION_LINES else []
    assert long == []


def test_no_file_has_a_vague_name(house: ModuleType) -> None:
    assert [name for name in house.modules() if VAGUE & set(re.split(r"[._]", name))] == []


def test_package_resolves_its_names_lazily(house: ModuleType) -> None:
    tree = ast.parse((house.PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    eager = [node for node in tree.body if isinstance(node, ast.ImportFrom | ast.Import)]
    assert {node.module for node in eager if isinstance(node, ast.ImportFrom)} == {"importlib", "typing"}


def _rows(page: str) -> list[tuple[int, str, list[str], set[str]]]:
    """(floor, folder, files, folders that it imports) of the table in docs/architecture.md."""
    found = re.findall(r"^\| (\d) \| `(\w+)` \| (.*?) \| (.*?) \|", page, re.MULTILINE)
    return [
        (int(floor), part, re.findall(r"`(\w+)`", files), set(re.findall(r"`(\w+)`", imports)))
        for floor, part, files, imports in found
    ]


def test_the_page_on_the_architecture_is_true(house: ModuleType) -> None:
    rows = _rows((ROOT / "docs" / "architecture.md").read_text(encoding="utf-8"))
    files, arrows = house.graph(), house.arrows(house.graph())
    assert [(floor, part) for floor, part, _, _ in rows] == [
        (level, part) for level in range(len(house.FLOORS) - 1, -1, -1) for part in house.FLOORS[level]
    ]
    for _, part, listed, imports in rows:
        own = {name.split(".")[1] for name in files if name.startswith(f"{part}.")}
        assert set(listed) == own - {"__main__"}, part
        assert imports == arrows[part], part


def test_the_picture_of_the_architecture_is_current(house: ModuleType) -> None:
    stored = (ROOT / "docs" / "architecture.svg").read_text(encoding="utf-8")
    assert stored == house.drawing(), "python examples/architecture.py"
