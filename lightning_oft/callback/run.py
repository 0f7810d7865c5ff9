"""What OFTFinetuning remembers of one run of the Trainer."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from lightning_oft.callback.strategies.steps import Steps


@dataclass
class Run:
    """One fit, validation, test or prediction, from setup to teardown.

    Attributes:
        was_plain: whether the model had no adapter when the run began.
        was_merged: the layers whose merge the run took back, and makes again at its end.
        layers: the layers that the callback has injected into, relative to its module.
        trainable: parameters that trained when setup ended, before configure_model.
        has_begun: whether a batch of training has started: what is trained is kept from then on.
        steps: acts after every optimizer step.
        handles: what the strategy has registered on the module.
    """

    was_plain: bool
    was_merged: list[str] = field(default_factory=list)
    layers: list[str] = field(default_factory=list)
    trainable: list[nn.Parameter] = field(default_factory=list)
    has_begun: bool = False
    steps: Steps | None = None
    handles: list[Any] = field(default_factory=list)

    def unregister(self) -> None:
        """Take every hook of this run away."""
        for handle in (*([self.steps] if self.steps is not None else []), *self.handles):
            handle.remove()
        self.steps, self.handles = None, []
