"""Limits of a configuration file, checked before the parser reads it.

The parser copies what an alias stands for: ten lines of aliases of aliases would take every byte of memory.
"""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import yaml

from lightning_oft.cli.errors import UserError

SIZE_LIMIT = 2**18
"""Bytes of a file; the longest shipped one has some thousand, and a quarter of a MiB takes seconds to parse."""
VALUE_LIMIT = 100_000  # of a file with its aliases written out


def check(arguments: Sequence[str]) -> list[str]:
    """The texts of the configuration files among `arguments`. Raises UserError; the parser reports absent files."""
    texts = []
    for before, argument in pairwise(["", *arguments]):
        option, _, value = argument.partition("=") if argument.startswith("-") else (before, "", argument)
        whole, file = option in ("-c", "--config"), Path(value)
        if (whole or file.suffix in (".yaml", ".yml", ".json")) and file.is_file():
            try:
                texts.append(_text(file, whole))
            except (ValueError, yaml.YAMLError, RecursionError) as error:
                deep = "nested too deeply; a configuration has a handful of levels"
                raise UserError(f"{file}: {deep if isinstance(error, RecursionError) else error}") from None
    return texts


def _text(file: Path, whole: bool) -> str:
    """The text of one file; `whole` says that it holds the options of a command, not the value of one option."""
    if file.stat().st_size > SIZE_LIMIT:
        raise ValueError(f"larger than {SIZE_LIMIT // 2**10} KiB; no configuration is, so give another file")
    text = file.read_bytes().decode("utf-8")
    # Not CSafeLoader: half a million brackets overflow its stack, and the process ends without a message (measured).
    tree = yaml.compose(text, Loader=yaml.SafeLoader)
    if _count(tree, {}, ()) > VALUE_LIMIT:
        raise ValueError(f"more than {VALUE_LIMIT:,} values once its aliases (*name) are written out; use fewer")
    if whole and not isinstance(tree, yaml.MappingNode):
        raise ValueError("expected a mapping of options")
    for key, value in tree.value if isinstance(tree, yaml.MappingNode) else ():
        if key.value == "config":
            raise ValueError("config: a file cannot include another; give each of them with --config FILE")
        # The parser accepts anything in place of these two blocks, and drops their options, also an earlier file's.
        if key.value in ("oft", "trainer") and not isinstance(value, yaml.MappingNode):
            raise ValueError(f"{key.value}: expected a mapping of options")
    return text


def _count(node: yaml.Node | None, known: dict[int, int], above: tuple[int, ...]) -> int:
    """Values below a node, aliases written out; over the limit where one contains itself."""
    if id(node) in above:
        return VALUE_LIMIT + 1
    if id(node) not in known:
        children = node.value if isinstance(node, yaml.CollectionNode) else []
        flat = [child for item in children for child in (item if isinstance(item, tuple) else (item,))]
        known[id(node)] = 1 + sum(_count(child, known, (*above, id(node))) for child in flat)
    return known[id(node)]
