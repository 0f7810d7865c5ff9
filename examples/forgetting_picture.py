"""Draw docs/forgetting-digits.png and -text.png from what examples/forgetting.py measured, and print them as tables.

    pip install '.[plot]'
    python examples/forgetting_picture.py digits
    python examples/forgetting_picture.py text

A point is the mean of the seeds at one learning rate and step. Outlined points are on the frontier: no other point of any
method is as good on both kinds of data.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib

matplotlib.use("Agg")  # draws into files only, so that no display is needed
import matplotlib.pyplot as plt
from matplotlib.ticker import LogLocator, NullLocator

DOCS = Path(__file__).parents[1] / "docs"
COLOURS = ["#8a94a3", "#d1495b", "#2f6fde", "#1b9aaa", "#3fa34d", "#e09f3e"]
MARKERS = ["s", "^", "o", "o", "o", "o"]


@dataclass(frozen=True)
class Look:
    """How one task is drawn."""

    learned: str
    kept: str
    digits: int
    """Decimals in the table."""
    better: int
    """1 where a higher score is better, -1 where a lower one is."""
    along: str
    """What a line of the left picture runs along: the learning rates ("lr") or the steps of a run ("step")."""
    axes: dict[str, Any]


LOOKS = {
    "digits": Look("accuracy on the new digits", "accuracy on the digits as they were", 2, 1, "lr",
                   {"xlim": (0.05, 1.0), "ylim": (0.78, 0.97)}),
    "text": Look("perplexity of the King James Bible", "perplexity of Python's documentation", 1, -1, "step",
                 {"xscale": "log", "yscale": "log"}),
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


def frontier(methods: dict[str, list[Point]], better: int) -> list[Point]:
    """The points that no other is as good as on both."""
    every = {point: (better * point.old, better * point.new) for series in methods.values() for point in series}
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
        cells = [f"{p.new:.{look.digits}f}, {p.old:.{look.digits}f}" for p in series]
        cells = [f"**{cell}**" if p in best else cell for p, cell in zip(series, cells, strict=True)]
        lines.append(f"| {method}, from {series[0].lr:g} | {' | '.join(cells)} |")
    return lines


def plane(axes: Any, methods: dict[str, list[Point]], look: Look) -> None:
    """What is learned against what is kept."""
    best = frontier(methods, look.better)
    for (method, series), colour, marker in zip(methods.items(), COLOURS, MARKERS, strict=True):
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
    for (_, series), colour, marker in zip(methods.items(), COLOURS, MARKERS, strict=True):
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
    methods, look = points(DOCS / f"forgetting-{task}.jsonl"), LOOKS[task]
    target = target or DOCS / f"forgetting-{task}.png"
    print("\n".join(table(methods, look)))
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
