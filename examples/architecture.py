"""The floors of the package and who imports whom, read from the imports and drawn into docs/architecture.svg.

python examples/architecture.py
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "lightning_oft"
FLOORS = [
    ("functional", "config"),
    ("layers", "codecs"),
    ("model",),
    ("formats",),
    ("callback",),
    ("tasks", "data"),
    ("cli",),
]
"""From the ground up. A file imports only from lower floors, or from its own folder."""
WIDTH, HEIGHT, GAP, LINE = 270, 84, 40, 13


def modules() -> dict[str, Path]:
    """Every file of the package by its dotted name below it; a folder's `__init__.py` by the folder's name."""
    files = {file.relative_to(PACKAGE).with_suffix("").parts: file for file in sorted(PACKAGE.rglob("*.py"))}
    return {".".join(parts[:-1] if parts[-1] == "__init__" else parts): file for parts, file in files.items()}


def imported(name: str, file: Path, known: dict[str, Path]) -> Iterator[str]:
    """The files that one file imports, wherever the import stands: in a function, behind TYPE_CHECKING, relative or not."""
    above = (
        f"lightning_oft.{name}".split(".") if file.name == "__init__.py" else f"lightning_oft.{name}".split(".")[:-1]
    )
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            wanted = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ".".join([*(above[: len(above) - node.level + 1] if node.level else ()), node.module or ""]).strip(
                "."
            )
            # `from folder import file` names a file, `from file import thing` the file before it.
            wanted = [f"{base}.{alias.name}" for alias in node.names]
            wanted = [whole if whole.partition(".")[2] in known else base for whole in wanted]
        else:
            continue
        yield from (one.partition(".")[2] for one in wanted if one.partition(".")[0] == "lightning_oft" and "." in one)


def graph() -> dict[str, set[str]]:
    """By file the files that it imports."""
    known = modules()
    return {name: {one for one in imported(name, file, known) if one in known} for name, file in known.items() if name}


def folder(name: str) -> str:
    """The part of the house that a file belongs to."""
    return name.partition(".")[0]


def arrows(files: dict[str, set[str]]) -> dict[str, set[str]]:
    """By folder the folders that it imports."""
    found: dict[str, set[str]] = {part: set() for floor in FLOORS for part in floor}
    for name, others in files.items():
        found[folder(name)] |= {folder(other) for other in others} - {folder(name)}
    return found


def drawing() -> str:
    """The picture as SVG: a box a folder, its files in it, an arrow where the way through other folders says less."""
    files, places, parts = graph(), {}, []
    edges = arrows(files)
    for level, floor in enumerate(reversed(FLOORS)):
        for column, part in enumerate(floor):
            left = 480 - len(floor) * (WIDTH + GAP) / 2 + column * (WIDTH + GAP) + GAP / 2
            places[part] = (left + WIDTH / 2, 30 + level * (HEIGHT + GAP))
    for part, others in edges.items():
        for other in sorted(o for o in others if not any(o in edges[between] for between in others - {o})):
            (x1, y1), (x2, y2) = places[part], places[other]
            parts.append(
                f'<path d="M{x1:.0f} {y1 + HEIGHT} L{x2:.0f} {y2 - 3}" stroke="#5b6b7b" marker-end="url(#tip)"/>'
            )
    for part, (x, y) in places.items():
        own = sorted({name.partition(".")[2].partition(".")[0] for name in files if folder(name) == part} - {""})
        parts.append(
            f'<rect x="{x - WIDTH / 2:.0f}" y="{y:.0f}" width="{WIDTH}" height="{HEIGHT}" rx="6" fill="#eef3f8" stroke="#9db2c6"/>'
        )
        parts.append(f'<text x="{x:.0f}" y="{y + 17:.0f}" font-weight="bold" font-size="13">{part}</text>')
        for row, start in enumerate(range(0, len(own), 4)):
            parts.append(f'<text x="{x:.0f}" y="{y + 34 + row * LINE:.0f}">{"  ".join(own[start : start + 4])}</text>')
    for level in range(len(FLOORS)):
        middle = 30 + (len(FLOORS) - 1 - level) * (HEIGHT + GAP) + HEIGHT / 2
        parts += [f'<text x="14" y="{middle:.0f}" text-anchor="start" fill="#5b6b7b">floor {level}</text>']
    height = 30 + len(FLOORS) * (HEIGHT + GAP)
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 960 {height}" font-family="sans-serif" font-size="9.5" text-anchor="middle">'
    tip = '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto"><path d="M0 0 L8 4 L0 8 z" fill="#5b6b7b"/></marker></defs>'
    return "\n".join([head, tip, '<rect width="100%" height="100%" fill="white"/>', *parts, "</svg>", ""])


def main() -> None:
    """Draw the picture."""
    (ROOT / "docs" / "architecture.svg").write_text(drawing(), encoding="utf-8")


if __name__ == "__main__":
    main()
