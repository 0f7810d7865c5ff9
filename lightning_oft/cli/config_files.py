"""Limits of a configuration file, checked before the parser reads it.

The parser copies what an alias stands for: ten lines of aliases of aliases would take every byte of memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import yaml

from lightning_oft.cli.errors import UserError

SIZE_LIMIT = 2**18
"""Bytes of a file; the longest shipped one has some thousand, and a quarter of a MiB takes seconds to parse."""
VALUE_LIMIT = 100_000
"""Values of a file with its aliases written out."""
GROUPS = ("oft", "trainer")
"""Blocks in whose place the parser accepts a scalar or a list, dropping every option of the block."""


def check(arguments: Sequence[str]) -> list[str]:
    """Return the texts of the configuration files among `arguments`. Raises UserError for one that is none.

    A file that does not exist is left to the parser.
    """
    texts = []
    for before, argument in pairwise(["", *arguments]):
        option, _, value = argument.partition("=") if argument.startswith("-") else (before, "", argument)
        whole = option in ("-c", "--config")
        file = Path(value)
        if (whole or file.suffix in (".yaml", ".yml", ".json")) and file.is_file():
            texts.append(_text(file))
            _check(file, texts[-1], whole)
    return texts


def _text(file: Path) -> str:
    if file.stat().st_size > SIZE_LIMIT:
        raise UserError(f"{file}: larger than {SIZE_LIMIT // 2**10} KiB; no configuration is, so give another file")
    try:
        return file.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{file}: no UTF-8 text at byte {error.start}; save it as UTF-8, or give another file"
        ) from None


def _check(file: Path, text: str, whole: bool) -> None:
    """Check the YAML of one file; `whole` says that it holds the options of a command, not those of one option."""
    try:
        # Not CSafeLoader: half a million brackets overflow its stack, and the process ends without a word (measured).
        tree = yaml.compose(text, Loader=yaml.SafeLoader)
        count = _count(tree, {}, ())
    except yaml.YAMLError as error:
        raise UserError(f"{file}: not valid YAML: {error}") from None
    except RecursionError:
        raise UserError(f"{file}: nested too deeply; a configuration has a handful of levels") from None
    if count > VALUE_LIMIT:
        raise UserError(f"{file}: more than {VALUE_LIMIT:,} values once its aliases (*name) are written out; use fewer")
    if whole and not isinstance(tree, yaml.MappingNode):
        raise UserError(f"{file}: expected a mapping of options")
    for key, value in tree.value if isinstance(tree, yaml.MappingNode) else ():
        if key.value == "config":
            raise UserError(f"{file}: config: a file cannot include another; give each of them with --config FILE")
        if key.value in GROUPS and not isinstance(value, yaml.MappingNode):
            raise UserError(
                f"{file}: {key.value}: expected a mapping of options, got {'a list' if isinstance(value, yaml.SequenceNode) else value.value or 'nothing'}"
            )


def _count(node: yaml.Node | None, known: dict[int, int], above: tuple[int, ...]) -> int:
    """Values below a node, aliases written out; over the limit where one contains itself."""
    if id(node) in above:
        return VALUE_LIMIT + 1
    if id(node) not in known:
        children = node.value if isinstance(node, yaml.CollectionNode) else []
        flat = [child for item in children for child in (item if isinstance(item, tuple) else (item,))]
        known[id(node)] = 1 + sum(_count(child, known, (*above, id(node))) for child in flat)
    return known[id(node)]
