"""Every mistake of the table raises what the table says, in one line with where, what and the remedy; so does the page."""

from __future__ import annotations

from pathlib import Path

import pytest
from bad_input import TABLE, outcome, page, row, shown
from bad_inputs.table import Mistake

PAGE = Path(__file__).parents[1] / "docs" / "bad-input.md"


@pytest.mark.parametrize("mistake", TABLE, ids=[f"{mistake.category}: {mistake.name}" for mistake in TABLE])
def test_a_mistake_says_where_what_and_the_remedy(mistake: Mistake, tmp_path: Path) -> None:
    found = outcome(mistake, tmp_path)
    assert (found.error if isinstance(found.error, int) else type(found.error)) == mistake.error, found.message
    assert found.message.isprintable()
    assert 20 < len(found.message.replace(str(tmp_path), "")) < 500
    for part in (mistake.where, mistake.what, mistake.remedy):
        assert part
        assert part in found.message
    assert found.intact
    line = row(mistake, shown(mistake, found.message, tmp_path))
    assert line in PAGE.read_text(encoding="utf-8").splitlines(), "python tests/bad_input.py > docs/bad-input.md"


def test_the_page_is_a_rendering_of_the_table() -> None:
    assert len({(mistake.category, mistake.name) for mistake in TABLE}) == len(TABLE)
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    starts = [row(mistake, "").removesuffix("  |") for mistake in TABLE]
    rows = [line for start in starts for line in lines if line.startswith(start)]
    assert page(rows).splitlines() == lines, "python tests/bad_input.py > docs/bad-input.md"
