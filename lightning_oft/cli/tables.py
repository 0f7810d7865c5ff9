"""Tables of what a model was before and after a fit: its scores, and what it made of its prompts."""

from collections.abc import Mapping, Sequence

WIDEST = 140
"""Characters of a table of two rows."""


def test_table(scores: Mapping[str, float]) -> str:
    """A row for each test set, called test where there is one, and a column for each metric."""
    return _by_set({"": scores})


def score_table(before: Mapping[str, float], after: Mapping[str, float], shown: Sequence[str] = ("acc",)) -> str:
    """Two rows, `before` and `after`, a column for each metric with one of `shown` in its name; for each metric where
    there is none.

    `test/new/accuracy` is headed `new/accuracy`, `test/accuracy/dataloader_idx_1` is `accuracy 1`. Where that is wide,
    each test set has two rows of its own.
    """
    names = [name for name in before if name in after]
    names = [name for name in names if any(part in name for part in shown)] or names
    runs = {when: {name: one[name] for name in names} for when, one in (("before", before), ("after", after))}
    if sum(len(_title(name)) + 2 for name in names) > WIDEST:
        return _by_set(runs)
    return _aligned({when: {_title(name): value for name, value in one.items()} for when, one in runs.items()})


def _title(name: str) -> str:
    return name.removeprefix("test/").removeprefix("test_").replace("/dataloader_idx_", " ")


def _by_set(runs: Mapping[str, Mapping[str, float]]) -> str:
    """Rows for each test set, one for each run, of the same metrics in all runs."""
    rows: dict[str, dict[str, float]] = {}
    for name in next(iter(runs.values())):
        split, _, column = _title(name).rpartition("/")
        for run, scores in runs.items():
            rows.setdefault(f"{split} {run}".strip() or "test", {})[column] = scores[name]
    return _aligned(rows)


def _aligned(rows: Mapping[str, Mapping[str, float]]) -> str:
    """Rows by name, of values by column; a row that lacks one has a gap there."""
    titles = list(dict.fromkeys(title for row in rows.values() for title in row))
    width = max(map(len, rows))
    columns = [[name.ljust(width) for name in ("", *rows)]]
    for title in titles:
        cells = [title, *(f"{row[title]:.4f}" if title in row else "" for row in rows.values())]
        columns.append([cell.rjust(max(map(len, cells))) for cell in cells])
    return "\n".join("  ".join(row).rstrip() for row in zip(*columns, strict=True))


def sample_table(before: Mapping[str, str], after: Mapping[str, str]) -> str:
    """For each prompt two lines: what a model made of it before and after the fit."""
    rows = [(prompt, when, said[prompt]) for prompt in before for when, said in (("before", before), ("after", after))]
    return "\n".join(f"{when:<6}  {' '.join((prompt + text).split())}" for prompt, when, text in rows)
