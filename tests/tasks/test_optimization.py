from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from lightning_oft.tasks.optimization import configure, parameter_groups


class Adapted(nn.Module):
    """Named as an adapted model's parameters are, without adapting anything."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(2, 2)
        self.head = nn.Linear(2, 2)
        self.base.oft_R = nn.ParameterDict({"default": torch.zeros(1, 1)})
        self.base.weight.requires_grad_(False)
        self.base.bias.requires_grad_(False)


def test_rotations_are_not_decayed() -> None:
    module = Adapted()
    head, generators = parameter_groups(module)
    assert head["params"] == list(module.head.parameters())
    assert "weight_decay" not in head
    assert [id(p) for p in generators["params"]] == [id(module.base.oft_R["default"])]  # type: ignore[index, union-attr]
    optimizer: Any = configure(module, partial(torch.optim.AdamW, weight_decay=0.1))
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]


def test_without_rotations_there_is_one_ordinary_group() -> None:
    assert [set(group) for group in parameter_groups(nn.Linear(2, 2))] == [{"params"}]


def test_nothing_to_train_is_refused() -> None:
    with pytest.raises(ValueError, match="every parameter is frozen"):
        parameter_groups(nn.Linear(2, 2).requires_grad_(False))


@pytest.mark.parametrize(
    ("schedule", "interval", "expected"),
    [
        (partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=3), "auto", {"interval": "epoch"}),
        (partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=3), "step", {"interval": "step"}),
        (partial(torch.optim.lr_scheduler.OneCycleLR, max_lr=1.0, total_steps=3), "auto", {"interval": "step"}),
        (torch.optim.lr_scheduler.ReduceLROnPlateau, "auto", {"interval": "epoch"}),
    ],
)
def test_schedule_advances_when_it_should(schedule: Any, interval: Any, expected: dict[str, str]) -> None:
    made: Any = configure(nn.Linear(2, 2), torch.optim.SGD, schedule, interval)
    assert {key: value for key, value in made["lr_scheduler"].items() if key != "scheduler"} == {
        **expected,
        "monitor": "val/loss",
    }
