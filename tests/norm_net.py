"""The model that several tests of this folder share: a bit of everything that freezing concerns."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Net(nn.Module):
    """A convolution, two norms with statistics, a layer to adapt and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.fc = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Linear(8, 8)
        self.head = nn.Sequential(nn.Linear(8, 4), nn.BatchNorm1d(4))

    def forward(self, x: Tensor) -> Tensor:
        pooled = self.norm(self.conv(x)).relu().mean((2, 3))
        output: Tensor = self.head(self.fc(pooled).relu())
        return output


def net() -> Net:
    """With statistics that are not the initial ones."""
    model = Net()
    for _ in range(3):
        model(torch.randn(4, 3, 6, 6) * 2 + 1)
    return model


def batch(size: int = 2) -> Tensor:
    return torch.randn(size, 3, 6, 6)


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(model: nn.Module, before: dict[str, Tensor]) -> bool:
    """Names, order and every bit."""
    now = model.state_dict()
    return list(now) == list(before) and all(torch.equal(now[name], tensor) for name, tensor in before.items())


def changed(model: nn.Module, before: dict[str, Tensor]) -> set[str]:
    return {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}


def flags(model: nn.Module) -> dict[str, bool]:
    return {name: parameter.requires_grad for name, parameter in model.named_parameters()}


def trainable(model: nn.Module) -> set[str]:
    return {name for name, trains in flags(model).items() if trains}


def train(model: nn.Module, steps: int = 3) -> None:
    model.train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for _ in range(steps):
        optimizer.zero_grad()
        model(batch(4)).square().sum().backward()
        optimizer.step()
