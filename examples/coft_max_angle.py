"""Constrain how far a rotation may turn (COFT), in degrees, and look at what it used of that.

python examples/coft_max_angle.py
"""

from typing import Any

import torch
from torch import nn

from lightning_oft import OFTConfig, inject, oft_layers, project
from lightning_oft.functional import rotation_angle


def largest_turn(max_angle: float | None) -> tuple[float, float]:
    """Train with a constraint. Returns the last loss and the largest turn of a plane in degrees."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 8))
    x, y = torch.randn(256, 32), torch.randn(256, 8)
    inject(model, OFTConfig(oft_block_size=8, max_angle=max_angle, use_cayley_neumann=False))
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.02)
    for _ in range(100):
        loss = nn.functional.mse_loss(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        project(model)  # what OFTFinetuning does after every optimizer step
    layers: Any = oft_layers(model)
    rotations = [layer.oft_R["default"] for layer in layers.values()]
    with torch.no_grad():
        return loss.item(), max(float(rotation_angle(r.matrix()).max()) for r in rotations)


def main() -> dict[float | None, tuple[float, float]]:
    """Returns (loss, degrees) by constraint."""
    found = {max_angle: largest_turn(max_angle) for max_angle in (5.0, 20.0, None)}
    for max_angle, (loss, turn) in found.items():
        print(f"max_angle={max_angle!s:<5} turned by up to {turn:6.2f} degrees, loss {loss:.4f}")
    return found


if __name__ == "__main__":
    main()
