"""Draw docs/oft.png, the picture in the README: what a rotation does to a layer's neurons, and what adding does.

    pip install '.[plot]'
    python examples/picture.py

The arrows are the rows of one weight with fan-in 2. All angles in the picture are measured from what is drawn.
"""

import sys
from pathlib import Path
from typing import Any

import matplotlib
import torch
from torch import Tensor

from lightning_oft.functional import cayley, rotate_weight, skew

matplotlib.use("Agg")  # draws into files only, so that no display is needed
import matplotlib.pyplot as plt
from matplotlib.patches import Arc

INK, GHOST, KEPT, CHANGED = "#1f2933", "#c3cad3", "#5f6b7a", "#d1495b"
COLOURS = ["#2f6fde", "#1b9aaa", "#3fa34d", "#e09f3e"]


def measured_angles(weight_oi: Tensor) -> list[float]:
    """Degrees between neighbouring neurons. (o, 2) -> o - 1 values."""
    unit = weight_oi / weight_oi.norm(dim=1, keepdim=True)
    return [float(a) for a in torch.rad2deg(torch.acos((unit[:-1] * unit[1:]).sum(1)))]


def draw_arrow(axes: Any, tip: Tensor, colour: str, ghost: bool) -> None:
    axes.annotate(
        "", tip.tolist(), (0, 0), annotation_clip=False, zorder=1 if ghost else 3,
        arrowprops={"arrowstyle": "-|>", "color": colour, "lw": 1.5 if ghost else 3, "shrinkA": 0, "shrinkB": 0,
                    "mutation_scale": 13 if ghost else 20, "linestyle": (0, (3, 2)) if ghost else "-"},
    )  # fmt: skip


def draw_angles(axes: Any, weight_oi: Tensor, reference: list[float]) -> None:
    """An arc between neighbours, with its degrees; in another colour where they are not those of the reference."""
    for i, (angle, before) in enumerate(zip(measured_angles(weight_oi), reference, strict=True)):
        colour, radius = KEPT if round(angle) == round(before) else CHANGED, 0.46 + 0.1 * (i % 2)
        ends = sorted(float(a) for a in torch.rad2deg(torch.atan2(weight_oi[i : i + 2, 1], weight_oi[i : i + 2, 0])))
        axes.add_patch(Arc((0, 0), 2 * radius, 2 * radius, theta1=ends[0], theta2=ends[1], color=colour, lw=1.8))
        middle = torch.deg2rad(torch.tensor(sum(ends) / 2))
        x, y = float(middle.cos()) * (radius + 0.15), float(middle.sin()) * (radius + 0.15)
        box = {"boxstyle": "round,pad=0.12", "facecolor": "white", "edgecolor": "none", "alpha": 0.85}
        label = {"color": colour, "fontsize": 12.5, "fontweight": "bold", "ha": "center", "va": "center"}
        axes.text(x, y, f"{angle:.0f}°", bbox=box, zorder=4, **label)


def draw_panel(axes: Any, title: str, formula: str, base_oi: Tensor, weight_oi: Tensor) -> None:
    changed = not torch.equal(base_oi, weight_oi)
    for before, after, colour in zip(base_oi, weight_oi, COLOURS, strict=True):
        if changed:
            draw_arrow(axes, before, GHOST, ghost=True)
        draw_arrow(axes, after, colour, ghost=False)
    draw_angles(axes, weight_oi, measured_angles(base_oi))
    axes.set(xlim=(-1.25, 1.35), ylim=(-0.06, 1.42), aspect="equal")
    axes.axis("off")
    axes.set_title(title, fontsize=15, fontweight="bold", color=INK, pad=10)
    axes.text(0.5, -0.04, formula, transform=axes.transAxes, ha="center", va="top", fontsize=14, color=KEPT)


def main(target: Path = Path(__file__).parents[1] / "docs" / "oft.png") -> None:
    """Write the picture."""
    at = torch.deg2rad(torch.tensor([8.0, 46.0, 78.0, 122.0]))
    base_oi = torch.stack([at.cos(), at.sin()], 1) * torch.tensor([[1.15], [1.0], [1.15], [1.05]])
    rotation_nbb = cayley(skew(torch.tensor([[-0.19]]), 2))  # one block of size 2, made as the library makes it
    added = base_oi + torch.outer(torch.tensor([-0.15, 0.25, 0.2, -0.35]), torch.tensor([-0.5, 0.87]))  # rank 1
    figure, panels = plt.subplots(1, 3, figsize=(11.5, 3.1), layout="constrained")
    draw_panel(panels[0], "pretrained", r"neurons: the rows of $W$", base_oi, base_oi)
    draw_panel(
        panels[1],
        "OFT turns them together",
        r"$W R^\top$:  angles and lengths stay",
        base_oi,
        rotate_weight(base_oi, rotation_nbb),
    )
    draw_panel(panels[2], "adding moves each by itself", r"$W + u v^\top$:  angles and lengths change", base_oi, added)
    figure.savefig(target, dpi=150, metadata={"Software": None})
    plt.close(figure)
    print(f"{target}: {target.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
