"""Makes docstrings-train.csv, -val.csv and -test.csv beside it: the first paragraphs of docstrings, and whose they are.

    pip install '.[test]' pandas pydantic
    python examples/text/make_docstrings.py

360 of each package, in the order of their SHA-1, so that the same versions give the same rows; README.md names versions
and licences. What says whose it is by name is left out.
"""

import csv
import re
import sys
from collections import Counter
from hashlib import sha1
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

HERE = Path(__file__).parent
sys.path.append(str(HERE.parent / "bases"))
from make_docs_llama import docstrings  # noqa: E402 - found by the line above

PACKAGES = ["numpy", "pandas", "pydantic", "torch"]
SPLITS = {"train": 200, "val": 60, "test": 100}  # rows of each package
NAMED = re.compile(r"numpy|\bnp\b|pandas|pydantic|torch", re.IGNORECASE)
SENTENCE = re.compile(r"[A-Z][A-Za-z0-9 ,;:'()/_-]{48,138}\.")  # prose: no tables, code or signatures


def sentences(package: str) -> list[str]:
    """The first paragraphs of a package's docstrings, each once and on one line."""
    folder = Path(str(find_spec(package).origin)).parent  # type: ignore[union-attr]
    firsts = (re.split(r"\n\s*\n", text)[0] for text in docstrings(folder))
    lines = dict.fromkeys(" ".join(re.sub(r"[`*]", "", text).split()) for text in firsts)
    return [line for line in lines if SENTENCE.fullmatch(line) and not NAMED.search(line)]


def main(target: Path = HERE) -> None:
    found = {package: sentences(package) for package in PACKAGES}
    packages = Counter(line for lines in found.values() for line in lines)
    rows: dict[str, list[tuple[str, str]]] = {split: [] for split in SPLITS}
    for package, lines in found.items():
        own = sorted((line for line in lines if packages[line] == 1), key=lambda line: sha1(line.encode()).digest())
        print(package, version(package), len(own), "found")
        for split, count in SPLITS.items():
            rows[split] += [(line, package) for line in own[:count]]
            own = own[count:]
    for split, chosen in rows.items():
        with (target / f"docstrings-{split}.csv").open("w", encoding="utf-8", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows([("text", "label"), *chosen])
        print(split, len(chosen), "rows")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
