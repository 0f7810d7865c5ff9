"""Finetune with Lightning Fabric: inject before `fabric.setup`, merge after the loop.

python examples/fabric.py
"""

import torch
from lightning.fabric import Fabric
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_oft import OFTConfig, inject, merge, project, unload


def main() -> tuple[float, float]:
    """Returns the first and the last loss."""
    fabric = Fabric(accelerator="cpu", devices=1, precision="bf16-mixed")
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 4))
    data = TensorDataset(torch.randn(256, 16), torch.randn(256, 4))

    inject(net, OFTConfig(oft_block_size=16, max_angle=30, use_cayley_neumann=False))
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=0.01, weight_decay=0.0)
    model, optimizer = fabric.setup(net, optimizer)
    loader = fabric.setup_dataloaders(DataLoader(data, batch_size=64))

    losses = []
    for _ in range(20):
        for x, y in loader:
            loss = nn.functional.mse_loss(model(x), y)
            optimizer.zero_grad()
            fabric.backward(loss)
            optimizer.step()
            project(net)  # holds every rotation below max_angle
            losses.append(loss.item())

    merge(net)
    unload(net)
    fabric.print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}; parameters: {', '.join(net.state_dict())}")
    return losses[0], losses[-1]


if __name__ == "__main__":
    main()
