"""Draw docs/forgetting-digits.png, -text.png and -drawings.png from what examples/forgetting.py measured, and print tables.

    pip install '.[plot]'
    python examples/forgetting_picture.py digits
    python examples/forgetting_picture.py text
    python examples/forgetting_picture.py drawings

A point is the mean of the seeds at one learning rate and step. Outlined points are on the frontier: no other point of any
method is as good on both kinds of data.
"""

import json
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

import matplotlib

matplotlib.use("Agg")  # draws into files only, so that no display is needed
import matplotlib.pyplot as plt
from matplotlib.ticker import LogLocator, NullLocator

DOCS = Path(__file__).parents[1] / "docs"
COLOURS = ["#8a94a3", "#d1495b", "#2f6fde", "#1b9aaa", "#3fa34d", "#e09f3e", "#7b4fa3"]
MARKERS = {"full": "s", "LoRA": "^", "OFT": "o"}


@dataclass(frozen=True)
class Look:
    """How one task is drawn."""

    learned: str
    kept: str
    digits: tuple[int, int]
    """Decimals in the table, of what is learned and of what is kept."""
    better: tuple[int, int]
    """1 where a higher score is better, -1 where a lower one is."""
    along: str
    """What a line of the left picture runs along: the learning rates ("lr") or the steps of a run ("step")."""
    axes: dict[str, Any]
    columns: dict[str, str] = field(default_factory=dict)
    """Heads of a second table, of the seeds at each method's best rate."""


LOOKS = {
    "digits": Look("accuracy on the new digits", "accuracy on the digits as they were", (2, 2), (1, 1), "lr",
                   {"xlim": (0.05, 1.0), "ylim": (0.78, 0.97)}),
    "text": Look("perplexity of the King James Bible", "perplexity of Python's documentation", (1, 1), (-1, -1), "step",
                 {"xscale": "log", "yscale": "log"}),
    "drawings": Look("samples with subject and scene", "change of old pictures, in levels of 255", (2, 1), (1, -1), "lr",
                     {}, {"new": "subject and scene", "seen": "subject, scenes seen", "unseen": "subject, unseen scenes",
                          "old": "old shapes", "original": "old pictures moved", "trained": "numbers trained",
                          "seconds": "seconds"}),
}  # fmt: skip


class Point(NamedTuple):
    """The mean of the seeds."""

    lr: float
    step: int
    old: float
    new: float


def points(measured: Path) -> dict[str, list[Point]]:
    """By method, in the order of rates and steps."""
    found: dict[str, dict[tuple[float, int], list[tuple[float, float]]]] = {}
    for line in measured.read_text(encoding="utf-8").splitlines():
        run = json.loads(line)
        found.setdefault(run["method"], {}).setdefault((run["lr"], run["step"]), []).append(
            (run["original"], run["new"])
        )
    return {
        method: [
            Point(*at, *(sum(column) / len(seeds) for column in zip(*seeds, strict=True))) for at, seeds in at.items()
        ]
        for method, at in found.items()
    }


def frontier(methods: dict[str, list[Point]], better: tuple[int, int]) -> list[Point]:
    """The points that no other is as good as on both."""
    every = {point: (better[1] * point.old, better[0] * point.new) for series in methods.values() for point in series}
    return [
        p
        for p, (old, new) in every.items()
        if not any(q != (old, new) and q[0] >= old and q[1] >= new for q in every.values())
    ]


def table(methods: dict[str, list[Point]], look: Look) -> list[str]:
    """The new score and the old by learning rate and step, in Markdown; the frontier in bold."""
    first = next(iter(methods.values()))
    several = len({point.step for point in first}) > 1
    heads = [f"x {p.lr / first[0].lr:g}" + (f", step {p.step}" if several else "") for p in first]
    lines = [f"| method, smallest rate | {' | '.join(heads)} |", "|---" * (len(first) + 1) + "|"]
    best = frontier(methods, look.better)
    for method, series in methods.items():
        cells = [f"{p.new:.{look.digits[0]}f}, {p.old:.{look.digits[1]}f}" for p in series]
        cells = [f"**{cell}**" if p in best else cell for p, cell in zip(series, cells, strict=True)]
        lines.append(f"| {method}, from {series[0].lr:g} | {' | '.join(cells)} |")
    return lines


def at_best_rates(measured: Path, look: Look) -> list[str]:
    """What the seeds have at the rate of each method that was run with most of them, in Markdown."""
    runs = [json.loads(line) for line in measured.read_text(encoding="utf-8").splitlines()]
    lines = [f"| method, rate | {' | '.join(look.columns.values())} |", "|---" * (len(look.columns) + 1) + "|"]
    for method in dict.fromkeys(run["method"] for run in runs):
        ((lr, _),) = Counter(run["lr"] for run in runs if run["method"] == method).most_common(1)
        found = [run for run in runs if (run["method"], run["lr"]) == (method, lr)]
        cells = [spread([run[column] for run in found]) for column in look.columns]
        lines.append(f"| {method}, {lr:g} | {' | '.join(cells)} |")
    return lines


def spread(values: list[Any]) -> str:
    """Mean and sample standard deviation; a whole number as it is."""
    if isinstance(values[0], int):
        return f"{values[0]:,}"
    digits = 2 if max(values) <= 1 else 1
    return f"{mean(values):.{digits}f} ± {stdev(values):.{digits}f}"


def plane(axes: Any, methods: dict[str, list[Point]], look: Look) -> None:
    """What is learned against what is kept."""
    best = frontier(methods, look.better)
    for (method, series), colour in zip(methods.items(), COLOURS, strict=False):
        marker = MARKERS[method.split()[0].strip(",")]
        fixed = [point.lr if look.along == "step" else point.step for point in series]
        for number, value in enumerate(dict.fromkeys(fixed)):
            line = [point for point, at in zip(series, fixed, strict=True) if at == value]
            axes.plot([p.old for p in line], [p.new for p in line], marker, ls="-", color=colour, lw=1.6, ms=5, alpha=0.9,
                      label=None if number else method)  # fmt: skip
        outlined = [point for point in series if point in best]
        axes.plot([p.old for p in outlined], [p.new for p in outlined], marker, ms=10, mfc="none", mec="#1f2933")
    axes.plot([], [], "o", ms=10, mfc="none", mec="#1f2933", label="no other point is as good on both")
    axes.set(xlabel=f"{look.kept} (kept)", ylabel=f"{look.learned} (learned)", **look.axes)
    for axis in (axes.xaxis, axes.yaxis):
        if axis.get_scale() == "log":
            plain_numbers(axis)
    axes.set_title("What is learned against what is kept", fontsize=12)
    axes.legend(frameon=False, fontsize=9)


def by_rate(axes: Any, methods: dict[str, list[Point]], look: Look) -> None:
    """What is kept at the end of a run."""
    for (method, series), colour in zip(methods.items(), COLOURS, strict=False):
        marker = MARKERS[method.split()[0].strip(",")]
        ends = [point for point in series if point.step == series[-1].step]
        factors = [round(point.lr / series[0].lr) for point in ends]
        axes.plot(factors, [p.old for p in ends], marker, ls="-", color=colour, lw=1.6, ms=5, alpha=0.9)
    axes.set(xscale="log", yscale=look.axes.get("yscale", "linear"))
    axes.set(xlabel="learning rate, as a multiple of the method's smallest", ylabel=f"{look.kept} (kept)")
    axes.set_xticks(factors, map(str, factors))
    axes.xaxis.set_minor_locator(NullLocator())
    if axes.yaxis.get_scale() == "log":
        plain_numbers(axes.yaxis)
    axes.set_title("What is kept, by learning rate", fontsize=12)


def plain_numbers(axis: Any) -> None:
    """Plain numbers on a logarithmic axis, and enough of them."""
    axis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 4, 6, 8)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_locator(NullLocator())


def main(task: str, target: Path | None = None) -> None:
    """Print the table and write the picture."""
    measured, look = DOCS / f"forgetting-{task}.jsonl", LOOKS[task]
    methods = points(measured)
    target = target or DOCS / f"forgetting-{task}.png"
    print("\n".join(table(methods, look)))
    if look.columns:
        print("", *at_best_rates(measured, look), sep="\n")
    figure, panels = plt.subplots(1, 2, figsize=(11.5, 4.3), layout="constrained", width_ratios=[1.2, 1])
    for draw, axes in zip((plane, by_rate), panels, strict=True):
        draw(axes, methods, look)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    figure.savefig(target, dpi=100, metadata={"Software": None})
    plt.close(figure)
    print(f"{target}: {target.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main(sys.argv[1])
