"""What OFTFinetuning remembers of one run of the Trainer."""

from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from lightning_oft.callback.strategies.base import StrategyAdapter
from lightning_oft.callback.strategies.steps import Steps
from lightning_oft.config import OFTConfig
from lightning_oft.model.first_forward import FirstForward


@dataclass
class Run:
    """One fit, validation, test or prediction, from setup to teardown."""

    strategy: StrategyAdapter
    found: list[str]  # the adapters that the model had when the run began
    was_merged: list[str]  # the layers whose merge the run took back, and makes again at its end
    config: OFTConfig  # as it is injected, with the head that a task wants trained whole
    modes: dict[nn.Module, bool] = field(default_factory=dict)  # that were asked of the modules, before it froze any
    layers: list[str] = field(default_factory=list)  # what the callback has injected into, relative to its module
    saved: list[str] = field(default_factory=list)  # the tensors that its adapter trains whole
    trainable: list[nn.Parameter] = field(default_factory=list)  # what trained before configure_model
    unfrozen: set[str] = field(default_factory=set)  # what trained, of the base, in the loaded checkpoint
    has_begun: bool = False  # whether a batch of training has started: what is trained is kept from then on
    keeps_adapter: bool = False  # whether what the run has put in stays: it has trained, or a checkpoint was loaded
    merges: bool = False  # whether the fit ends with a merge
    first_forward: FirstForward | None = None  # watches the forward of the first batch
    steps: Steps | None = None  # acts after every optimizer step
    exporter: Any = None  # writes the fit's results, where anybody asked for them
    undo: ExitStack = field(default_factory=ExitStack)  # takes away whatever the run has registered
