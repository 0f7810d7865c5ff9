"""Rows of the benchmark `python examples/benchmarks/speed.py`, as a Markdown table, as JSON and as one picture."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from measuring import quartiles
from models import BASE, OURS, VARIANTS


@dataclass(frozen=True)
class Row:
    """One measurement of all variants: every sample, so that any statistic can be made of it later."""

    model: str
    what: str
    clock: str
    unit: str
    values: dict[str, list[float]]
    device: str = "cpu"
    dtype: str = "float32"

    def medians(self) -> dict[str, float]:
        """One figure for each variant."""
        return {name: quartiles(found)[1] for name, found in self.values.items()}


def save(path: str | Path, environment: dict[str, Any], rows: Sequence[Row]) -> None:
    content = {"environment": environment, "rows": [asdict(row) for row in rows]}
    Path(path).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def read(path: str | Path) -> tuple[dict[str, Any], list[Row]]:
    content = json.loads(Path(path).read_text(encoding="utf-8"))
    return content["environment"], [Row(**row) for row in content["rows"]]


def table(head: Sequence[str], body: Iterable[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(cells) + " |" for cells in (head, *body)]
    return "\n".join([lines[0], "|" + "---|" * len(head), *lines[1:]])


def columns(rows: Sequence[Row]) -> list[str]:
    return [name for name in VARIANTS if any(name in row.values for row in rows)]


def markdown(rows: Sequence[Row]) -> str:
    """Median (first to third quartile), and the ratio of the median to the frozen base's; one line a row."""
    names = columns(rows)
    head = ["model", "measured", "read as", *names]
    body = [
        [row.model, f"{row.what}, {row.unit}", f"{row.clock}, {row.device} {row.dtype}", *_cells(row, names)]
        for row in rows
    ]
    return table(head, body)


def _cells(row: Row, names: Sequence[str]) -> list[str]:
    medians = row.medians()
    base = medians.get(BASE, 0.0)
    cells = []
    for name in names:
        if name not in row.values:
            cells.append("")
            continue
        low, middle, high = quartiles(row.values[name])
        spread = f" ({number(low)} to {number(high)})" if len(row.values[name]) > 1 else ""
        ratio = f" {middle / base:.3f}x" if base and name != BASE else ""
        cells.append(number(middle) + spread + ratio)
    return cells


def number(value: float) -> str:
    """Three significant digits, without an exponent."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def draw(path: str | Path, environment: dict[str, Any], rows: Sequence[Row]) -> None:
    """One picture: what each row costs over the frozen base, or over ours where the base has no such thing."""
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot

    over_base = [row for row in rows if row.medians().get(BASE)]
    over_ours = [row for row in rows if not row.medians().get(BASE) and row.medians().get(OURS)]
    panels = {name: own for name, own in ((BASE, over_base), (OURS, over_ours)) if own} or {BASE: []}
    size = 9 * len(panels), 2.0 + 0.4 * max(map(len, panels.values()))
    figure, axes = pyplot.subplots(1, len(panels), figsize=size, layout="constrained", squeeze=False)
    for axis, (reference, own) in zip(axes[0], panels.items(), strict=True):
        _panel(axis, own, reference, columns(rows))
        axis.set_title(f"over {reference} (log scale; less is better)")
    axes[0, 0].legend(fontsize=8)
    figure.suptitle(" · ".join(f"{key} {value}" for key, value in environment.items()), fontsize=8)
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


def _panel(axis: Any, rows: Sequence[Row], reference: str, names: Sequence[str]) -> None:
    from matplotlib import ticker

    labels = [f"{row.model}: {row.what}\n{row.clock}, {row.device} {row.dtype}" for row in rows]
    for column, name in enumerate(names):
        found = [(y, row) for y, row in enumerate(rows) if name in row.values and name != reference]
        if not found:
            continue
        for y, row in found:
            low, _, high = (value / row.medians()[reference] for value in quartiles(row.values[name]))
            axis.plot([low, high], [y + 0.08 * (column - 3)] * 2, color=f"C{column}", linewidth=1)
        x = [row.medians()[name] / row.medians()[reference] for _, row in found]
        axis.plot(x, [y + 0.08 * (column - 3) for y, _ in found], "o", color=f"C{column}", markersize=4, label=name)
    axis.axvline(1.0, color="black", linewidth=0.8)
    axis.set_xscale("log")
    axis.xaxis.set_major_locator(ticker.LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.xaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
    axis.xaxis.set_minor_formatter(ticker.NullFormatter())
    axis.set_yticks(range(len(rows)), labels, fontsize=7)
    axis.invert_yaxis()
    axis.grid(axis="x", which="both", alpha=0.3)
