"""Draw docs/forgetting.png from what examples/forgetting.py measured, and print it as the table in docs/forgetting.md.

    pip install '.[plot]'
    python examples/forgetting_picture.py

A point is the mean of the seeds at one learning rate. Outlined points are on the frontier: no other point of any method
is as good on both sets of digits.
"""

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # draws into files only, so that no display is needed
import matplotlib.pyplot as plt

ROOT = Path(__file__).parents[1]
STYLE = {
    "full finetuning": ("#8a94a3", "s"), "LoRA r=16": ("#d1495b", "^"), "OFT": ("#2f6fde", "o"),
    "OFT held at 28°": ("#1b9aaa", "o"), "OFT held at 20°": ("#3fa34d", "o"), "OFT held at 14°": ("#e09f3e", "o"),
}  # fmt: skip
Point = tuple[float, float, float]


def points(measured: Path) -> dict[str, list[Point]]:
    """(learning rate, accuracy on the original digits, on the new ones) by method, the mean of the seeds."""
    found: dict[str, dict[float, list[tuple[float, float]]]] = {}
    for run in json.loads(measured.read_text(encoding="utf-8"))["runs"]:
        found.setdefault(run["method"], {}).setdefault(run["lr"], []).append((run["original"], run["new"]))
    return {
        method: [
            (lr, *(sum(column) / len(seeds) for column in zip(*seeds, strict=True))) for lr, seeds in rates.items()
        ]
        for method, rates in found.items()
    }


def frontier(methods: dict[str, list[Point]]) -> list[Point]:
    """The points that no other is as good as on both sets."""
    every = [point for series in methods.values() for point in series]
    return [p for p in every if not any(q[1] >= p[1] and q[2] >= p[2] and q[1:] != p[1:] for q in every)]


def table(methods: dict[str, list[Point]]) -> list[str]:
    """Accuracy on the new digits and on the original ones by learning rate, in Markdown; frontier in bold."""
    rates = len(next(iter(methods.values())))
    lines = [f"| method, smallest rate | {' | '.join(f'x {2**i}' for i in range(rates))} |", "|---" * (rates + 1) + "|"]
    best = frontier(methods)
    for method, series in methods.items():
        cells = [
            f"**{new:.2f}, {old:.2f}**" if (lr, old, new) in best else f"{new:.2f}, {old:.2f}"
            for lr, old, new in series
        ]
        lines.append(f"| {method}, from {series[0][0]:g} | {' | '.join(cells)} |")
    return lines


def main(target: Path = ROOT / "docs" / "forgetting.png", measured: Path = ROOT / "docs" / "forgetting.json") -> None:
    """Write the picture."""
    methods = points(measured)
    print("\n".join(table(methods)))
    best = frontier(methods)
    figure, (plane, rates) = plt.subplots(1, 2, figsize=(11.5, 4.3), layout="constrained", width_ratios=[1.2, 1])
    for method, (colour, marker) in STYLE.items():
        series = methods[method]
        line = {"color": colour, "lw": 1.6, "marker": marker, "ms": 5, "label": method, "alpha": 0.9}
        plane.plot([old for _, old, _ in series], [new for _, _, new in series], **line)
        rates.plot([lr / series[0][0] for lr, _, _ in series], [old for _, old, _ in series], **line)
        outlined = [point for point in series if point in best]
        plane.plot([o for _, o, _ in outlined], [n for _, _, n in outlined], marker, ms=10, mfc="none", mec="#1f2933")
    plane.plot([], [], "o", ms=10, mfc="none", mec="#1f2933", label="no other point is as good on both")
    plane.set(xlim=(0.05, 1.0), ylim=(0.78, 0.97), xlabel="accuracy on the digits as they were (kept)")
    plane.set_title("What is learned against what is kept", fontsize=12)
    plane.set_ylabel("accuracy on the new digits (learned)")
    rates.set(xscale="log", ylim=(0.0, 1.0), xlabel="learning rate, as a multiple of the method's smallest")
    rates.set_xticks([2**i for i in range(7)], [str(2**i) for i in range(7)])
    rates.minorticks_off()
    rates.set(ylabel="accuracy on the digits as they were (kept)")
    rates.set_title("What is kept, by learning rate", fontsize=12)
    plane.legend(loc="lower left", frameon=False, fontsize=9)
    for axes in (plane, rates):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    figure.savefig(target, dpi=110, metadata={"Software": None})
    plt.close(figure)
    print(f"{target}: {target.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
