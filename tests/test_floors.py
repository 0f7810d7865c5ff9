"""The house's one structural rule: a file imports only from lower floors. Read from the syntax tree, nothing is run."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "lightning_oft"
FILES = sorted(PACKAGE.rglob("*.py"))
FLOORS = {
    "rotation": 0,
    "config": 0,
    "exchange": 0,
    "layers": 1,
    "codecs": 1,
    "surgery": 2,
    "metrics": 2,
    "checkpoint_files": 1,
    "checkpoints": 3,
    "adapters": 3,
    "merged": 3,
    "callback": 4,
    "monitor": 4,
    "tasks": 5,
    "data": 5,
    "cli": 6,
}
# A file of floor 0 knows torch and the standard library; nothing below the callback knows Lightning.
LIGHTNING_FROM = 4
MAX_LINES = 330
MAX_FUNCTION_LINES = 60
VAGUE = {"util", "utils", "helper", "helpers", "manager", "wrapper", "common", "misc"}


def name_of(file: Path) -> str:
    """The dotted module name of `file`, as an absolute import spells it."""
    parts = file.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def part_of(module: str) -> str:
    """The part of the house a module belongs to: `lightning_oft.tasks.vision` is `tasks`; the package itself is ''."""
    return module.partition(".")[2].split(".")[0]


def imports_of(tree: ast.AST, module: str, is_package: bool) -> Iterator[tuple[int, str]]:
    """Every imported module with its line, wherever it stands: in a function, behind TYPE_CHECKING, relative or not."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = module.split(".")[: None if is_package and node.level == 1 else -(node.level - is_package)]
                base = ".".join([*parents, base]).rstrip(".")
            # `from lightning_oft import x` names a part of the house, or a public name of it.
            yield from (
                (node.lineno, f"{base}.{alias.name}" if base == "lightning_oft" else base) for alias in node.names
            )
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) in (
            "import_module",
            "__import__",
        ):
            yield from ((node.lineno, arg.value) for arg in node.args[:1] if isinstance(arg, ast.Constant))


def violations(source: str, module: str, is_package: bool = False) -> list[str]:
    """What `source`, standing at `module`, imports and must not."""
    part, found = part_of(module), []
    for line, imported in imports_of(ast.parse(source), module, is_package):
        top, other = imported.split(".")[0], part_of(imported)
        if top == "peft":
            found.append(f"{module}:{line} imports peft; the format is ours to read and write")
        elif top in {"lightning", "pytorch_lightning"} and FLOORS[part] < LIGHTNING_FROM:
            found.append(f"{module}:{line} imports {top} below the callback")
        elif top == "transformers" and FLOORS[part] == 0:
            found.append(f"{module}:{line} imports transformers on floor 0")
        elif top != "lightning_oft" or imported == "lightning_oft.__version__" or other == part:
            continue
        elif other not in FLOORS:
            found.append(f"{module}:{line} imports {imported}: name the file it lives in")
        elif FLOORS[other] >= FLOORS[part]:
            found.append(f"{module}:{line} (floor {FLOORS[part]}) imports {imported} (floor {FLOORS[other]})")
    return found


@pytest.mark.parametrize("file", [f for f in FILES if f.parent != PACKAGE or f.name != "__init__.py"], ids=name_of)
def test_file_imports_only_from_lower_floors(file: Path) -> None:
    assert part_of(name_of(file)) in FLOORS, "a new part of the house: give it a floor here and in CONTRIBUTING.md"
    assert violations(file.read_text(encoding="utf-8"), name_of(file), file.name == "__init__.py") == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("lightning_oft.functional", "import lightning_oft.config"),
        ("lightning_oft.layers", "from lightning_oft.model import inject"),
        ("lightning_oft.layers", "def f():\n    from lightning_oft import surgery"),
        ("lightning_oft.layers", "from . import surgery"),
        ("lightning_oft.layers", "from .surgery import inject"),
        ("lightning_oft.layers", "from lightning_oft import inject"),
        ("lightning_oft.tasks.text", "from ..cli import main"),
        ("lightning_oft.tasks.text", "from lightning_oft.data.text import TextDataModule"),
        ("lightning_oft.model", "if TYPE_CHECKING:\n    from lightning.pytorch import Trainer"),
        ("lightning_oft.model", "import importlib\nimportlib.import_module('lightning_oft.callback')"),
        ("lightning_oft.formats", "def f():\n    import peft.utils"),
        ("lightning_oft.functional", "import transformers"),
    ],
)
def test_an_import_that_climbs_is_caught(module: str, source: str) -> None:
    assert len(violations(source, module)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("lightning_oft.layers", "from lightning_oft.functional import cayley\nimport torch, math"),
        ("lightning_oft.layers", "from .rotation import cayley"),
        ("lightning_oft.tasks.text", "from .vision import ImageClassification"),
        ("lightning_oft.tasks.text", "import lightning.pytorch as pl"),
        ("lightning_oft.cli", "from lightning_oft import __version__"),
    ],
)
def test_an_import_from_below_is_allowed(module: str, source: str) -> None:
    assert violations(source, module) == []


def test_package_resolves_its_names_lazily() -> None:
    tree = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    eager = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    assert {module for node in eager for _, module in imports_of(node, "lightning_oft", True)} <= {
        "importlib",
        "typing",
    }


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_file_and_its_functions_stay_short(file: Path) -> None:
    source = file.read_text(encoding="utf-8")
    assert source.count("\n") <= MAX_LINES, "would a folder of the same name read better?"
    long = [
        f"{node.name} has {node.end_lineno - node.lineno + 1} lines"
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and node.end_lineno is not None
        and node.end_lineno - node.lineno >= MAX_FUNCTION_LINES
    ]
    assert long == []


def test_no_file_has_a_vague_name() -> None:
    assert [file.name for file in FILES if VAGUE & set(file.stem.lower().split("_"))] == []
