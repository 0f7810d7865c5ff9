"""What a configuration file must be before the parser sees it: text, of a sane size, and a tree when it is written out.

The parser copies what an alias stands for, so that ten lines of aliases of aliases would take every byte of memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path

import yaml

from lightning_oft.cli.errors import UserError

SIZE_LIMIT = 2**18
"""Bytes of a file; the longest shipped one has some thousand, and a quarter of a MiB takes seconds to parse."""
GROUPS = ("oft", "trainer")
"""Blocks of options, which nothing but a mapping can stand for."""
VALUE_LIMIT = 100_000
"""Values of a file with its aliases written out."""


def check(arguments: Sequence[str]) -> None:
    """Raise UserError for a configuration file that is no text, too large, or an alias of itself.

    What is no YAML, or is not there, the parser says.
    """
    for file in _named(arguments):
        if file.is_file():
            _check(file)


def _named(arguments: Sequence[str]) -> Iterator[Path]:
    for before, argument in pairwise(["", *arguments]):
        if before in ("--config", "-c"):
            yield Path(argument)
        elif argument.startswith("--config="):
            yield Path(argument.removeprefix("--config="))
        elif argument.endswith((".yaml", ".yml", ".json")):
            yield Path(argument.rpartition("=")[2])


def _check(file: Path) -> None:
    if file.stat().st_size > SIZE_LIMIT:
        raise UserError(
            f"{file}: larger than {SIZE_LIMIT // 2**10} KiB, which no configuration is; give the right file"
        )
    try:
        text = file.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{file}: no UTF-8 text at byte {error.start}; save it as UTF-8, or give the right file"
        ) from None
    try:
        # Not CSafeLoader: half a million brackets overflow its stack, and the process ends without a word (measured).
        tree = yaml.compose(text, Loader=yaml.SafeLoader)
        count = _count(tree, {}, ())
    except yaml.YAMLError:
        return
    except RecursionError:
        raise UserError(f"{file}: nested too deeply; a configuration has a handful of levels") from None
    if count > VALUE_LIMIT:
        raise UserError(
            f"{file}: holds more than {VALUE_LIMIT:,} values once its aliases (*name) are written out; use fewer"
        )
    for key, value in tree.value if isinstance(tree, yaml.MappingNode) else ():
        if key.value == "config":
            raise UserError(f"{file}: config: a file cannot include another; give each of them with --config FILE")
        # The parser would let a scalar or a list take the place of a whole block, that of an earlier file too.
        if key.value in GROUPS and not isinstance(value, yaml.MappingNode):
            found = (value.value or "nothing") if isinstance(value, yaml.ScalarNode) else "a list"
            raise UserError(f"{file}: {key.value}: expected a mapping of options, got {found}")


def _count(node: yaml.Node | None, known: dict[int, int], above: tuple[int, ...]) -> int:
    """Values below a node, aliases written out; infinite where one contains itself."""
    if id(node) in above:
        return VALUE_LIMIT + 1
    if id(node) not in known:
        children = node.value if isinstance(node, yaml.CollectionNode) else []
        flat = [child for item in children for child in (item if isinstance(item, tuple) else (item,))]
        known[id(node)] = 1 + sum(_count(child, known, (*above, id(node))) for child in flat)
    return known[id(node)]
