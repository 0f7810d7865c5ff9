"""What OFTFinetuning remembers of one run of the Trainer."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from lightning_oft.callback.strategies import StrategyAdapter
from lightning_oft.callback.strategies.steps import Steps


@dataclass
class Run:
    """One fit, validation, test or prediction, from setup to teardown.

    Attributes:
        strategy: the adapter for the Trainer's strategy.
        was_plain: whether the model had no adapter when the run began.
        was_merged: the layers whose merge the run took back, and makes again at its end.
        layers: the layers that the callback has injected into, relative to its module.
        trainable: parameters that trained when setup ended, before configure_model.
        unfrozen: what trained, of the base, when the loaded checkpoint was written.
        has_begun: whether a batch of training has started: what is trained is kept from then on.
        steps: acts after every optimizer step.
        exporter: writes the fit's results, where anybody asked for them.
        undo: takes away whatever the run has registered.
    """

    strategy: StrategyAdapter
    was_plain: bool
    was_merged: list[str]
    layers: list[str] = field(default_factory=list)
    trainable: list[nn.Parameter] = field(default_factory=list)
    unfrozen: list[str] = field(default_factory=list)
    has_begun: bool = False
    steps: Steps | None = None
    exporter: Any = None
    undo: ExitStack = field(default_factory=ExitStack)
