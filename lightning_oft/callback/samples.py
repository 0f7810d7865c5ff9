"""Samples: what a model makes of its fixed prompts, after each validation, at the speed of its base."""

from typing import Any

from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_info
from typing_extensions import override

from lightning_oft.callback.pictures import log_pictures
from lightning_oft.callback.strategies.base import strategy_adapter
from lightning_oft.model.merging import merged_where_possible


class Samples(Callback):
    """Logs `samples()` of a LightningModule that has one, text or pictures by prompt: our tasks that generate do.

    Opt in with `Trainer(callbacks=[..., Samples()])`; `lightning-oft fit` does. TensorBoard and Weights & Biases get
    them; with any other logger, or none, text is printed and pictures become a PNG in the log directory.
    """

    @override
    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """Called on every process, each of which generates: a sharded model needs all of them."""
        if trainer.sanity_checking or not getattr(pl_module, "prompts", None):
            return
        with strategy_adapter(trainer).whole(), merged_where_possible(pl_module):
            said = pl_module.samples()
        if not trainer.is_global_zero:
            return
        if texts := {prompt: one for prompt, one in said.items() if isinstance(one, str)}:
            log_text(trainer.loggers, texts, trainer.global_step)
        if pictures := {prompt: one for prompt, one in said.items() if not isinstance(one, str)}:
            log_pictures(trainer, pictures)


def log_text(loggers: Any, said: dict[str, str], step: int) -> None:
    """Give texts by prompt to the loggers that take text; print them where none does."""
    taken = False
    for logger in loggers:
        if hasattr(logger, "log_text"):  # Weights & Biases
            logger.log_text(
                "samples", columns=["prompt", "text"], data=[list(pair) for pair in said.items()], step=step
            )
            taken = True
        elif hasattr(logger.experiment, "add_text"):  # TensorBoard
            logger.experiment.add_text("samples", "\n\n".join(f"**{p}**{text}" for p, text in said.items()), step)
            taken = True
    if not taken:
        for prompt, text in said.items():
            rank_zero_info(f"step {step}: {' '.join((prompt + text).split())}")
