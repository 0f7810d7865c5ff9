"""ComparedTask: what the tasks that are held to the model that they started from share: its reference, and its memory."""

from contextlib import AbstractContextManager
from typing import Any

from lightning.pytorch.utilities import rank_zero_info
from typing_extensions import override

from lightning_oft.model.reference import has_reference, keep_reference, reference, require_reference
from lightning_oft.tasks.text.generative import GenerativeTask

_ENTRY = "reference"


class ComparedTask(GenerativeTask):
    """Base of the tasks with a reference: the base with adapters off or, where the fit starts from an adapter, a frozen
    copy of it. No second model is kept. A subclass sets `has_trained` in its training step."""

    has_trained = False
    """Whether the model has left its reference, which is then chosen for good."""

    @property
    def compares(self) -> bool:
        """Whether there is to be a reference."""
        return True

    @property
    def remedy(self) -> str:
        """What to do where there is no adapter to turn off."""
        return "set beta: 0"

    @property
    def has_reference(self) -> bool:
        """Whether the model has adapters, so that there is something to turn off."""
        return has_reference(self.library_model)

    def at_reference(self) -> AbstractContextManager[None]:
        """A context in which the model is its reference."""
        return reference(self.library_model)

    @override
    def setup(self, stage: str) -> None:
        """Called when the model has its adapters: one that has learned already is what a fit will be compared with."""
        if not self.compares or stage == "predict" or self.has_trained:
            return
        if keep_reference(self.library_model) and stage == "fit":
            rank_zero_info("the reference is the adapter that the fit starts from; a frozen copy is named 'reference'")

    @override
    def on_fit_start(self) -> None:
        """Called when the fit begins: the reference must be at hand."""
        if not self.compares:
            return
        if not self.has_reference:
            raise ValueError(
                f"no adapter: once the model trains, nothing is left to compare it with; adapt it with OFT, or {self.remedy}"
            )
        if not self.has_trained:
            require_reference(self.library_model)

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Called when a checkpoint is written."""
        checkpoint[_ENTRY] = {"has_trained": self.has_trained}

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Called when a checkpoint is read: a model that has trained keeps the reference that it had."""
        self.has_trained = checkpoint.get(_ENTRY, {}).get("has_trained", False)
