"""PreferenceOptimization: a language model learns which of two completions is preferred (DPO and its relatives)."""

from typing import Any, Literal

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor
from torch.utils.data import DataLoader
from typing_extensions import override

from lightning_oft.tasks.base import Dtype, LRInterval
from lightning_oft.tasks.modes import evaluating
from lightning_oft.tasks.text.compared import ComparedTask
from lightning_oft.tasks.text.losses import PREFERENCE_LOSSES, log_probs, preference_losses
from lightning_oft.tasks.text.metrics import Preferences

_ENTRY = "reference_log_probs"


class PreferenceOptimization(ComparedTask):
    """Direct preference optimization (Rafailov et al. 2023) of any model of transformers' AutoModelForCausalLM.

    The reference is the model that the fit starts from. With OFT that takes no second copy: it is the base with adapters
    off or, where the fit starts from an adapter (oft.pretrained_adapter), a frozen copy of that adapter, named
    "reference". Without OFT its log-probabilities must be computed before the fit (`precompute_reference`).

    Batches are PreferenceDataModule's. Logs `train/`, `val/` and `test/` `loss`, `accuracy` (how often the chosen
    completion has the higher reward) and `margin` (by how much); with several test sets `test/<name>/...`. A reward is
    beta log(policy / reference) of a completion.

    Args:
        pretrained: The model to start from: a folder written by save_pretrained, or a hub id.
        loss: sigmoid (DPO); robust (DPO where a share `label_smoothing` of the pairs is the wrong way round); ipo, which
            holds the margin at 1 / (2 beta) a token; hinge.
        beta: How closely the model keeps to the reference; smaller lets it go further.
        label_smoothing: For robust: the share of wrong pairs.
        precompute_reference: Compute the reference's log-probabilities once, when the fit starts: a forward less in
            each step, which pays from the second epoch on.
        prompts: Texts that the model continues after each validation, and before and after the fit.
        generation: Options of transformers' generate, such as max_new_tokens or do_sample.
        activation_checkpointing: Recompute activations in the backward pass: half the memory, a third more time.
        optimizer: Gets what is trainable when the run starts; rotations are never decayed.
        lr_scheduler: Gets the optimizer. None keeps the learning rate.
        lr_interval: When the schedule advances; auto is every step for OneCycleLR and CyclicLR, else every epoch.
        dtype: Data type that the weights are loaded in; "auto" for the checkpoint's.
        quantization_config: transformers' description of a quantized base.

    Raises:
        OSError: When there is no such model or tokenizer at `pretrained`.
        ValueError: When an argument is out of its range; when a fit starts and nothing is left to compare with.
    """

    shown_scores = ("accuracy", "margin")
    auto_class = "AutoModelForCausalLM"
    metric_class = Preferences

    def __init__(
        self,
        pretrained: str,
        loss: Literal["sigmoid", "robust", "ipo", "hinge"] = "sigmoid",
        beta: float = 0.1,
        label_smoothing: float = 0.0,
        precompute_reference: bool = False,
        prompts: list[str] | None = None,
        generation: dict[str, Any] | None = None,
        activation_checkpointing: bool = False,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        lr_scheduler: LRSchedulerCallable | None = None,
        lr_interval: LRInterval = "auto",
        dtype: Dtype = "float32",
        quantization_config: Any = None,
    ) -> None:
        super().__init__(
            pretrained, dtype, quantization_config, activation_checkpointing,
            optimizer=optimizer, lr_scheduler=lr_scheduler, lr_interval=lr_interval,
        )  # fmt: skip
        self.save_hyperparameters(ignore=["optimizer", "lr_scheduler"])
        check_arguments(loss, beta, label_smoothing)
        self.loss: str = loss
        self.beta, self.label_smoothing, self.precompute_reference = beta, label_smoothing, precompute_reference
        self.load_generator(prompts, generation)
        self.reference_log_probs: dict[str, Tensor] = {}
        """By split, (rows, 3) float32: of chosen and rejected completions, and what tells the rows from others; where they
        were precomputed."""

    def forward(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """-> log-probabilities (2, B) float32 of the chosen and the rejected completions, and their tokens (2, B)."""
        check_batch(batch)
        logits = self.model(batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
        found, lengths = log_probs(logits, batch["labels"])
        return found.view(2, -1), lengths.view(2, -1)

    def reference(self, batch: dict[str, Tensor]) -> Tensor:
        """-> log-probabilities (2, B) float32 by the reference, without gradient and dropout."""
        with self.at_reference(), evaluating(self.library_model):
            found: Tensor = self(batch)[0]
        return found

    @property
    @override
    def compares(self) -> bool:
        return self.has_reference or not self.precompute_reference

    @property
    @override
    def remedy(self) -> str:
        return "set precompute_reference: true"

    @override
    def on_fit_start(self) -> None:
        """Called when the fit begins: the reference must be at hand, or its log-probabilities."""
        super().on_fit_start()
        if self.precompute_reference and (self.has_reference or not self.has_trained):
            self.reference_log_probs = self._all_reference_log_probs()

    @override
    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        losses, rewards = self._losses(batch, "train")
        self.has_trained = True
        margins = rewards[0] - rewards[1]
        scores = {"loss": losses.detach().mean(), "accuracy": (margins > 0).float().mean(), "margin": margins.mean()}
        self.log_dict({f"train/{name}": value for name, value in scores.items()}, batch_size=len(losses))
        return losses.mean()

    @override
    def score(self, batch: dict[str, Tensor], metric: Preferences, split: str) -> None:
        metric.update(*self._losses(batch, split))

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Called when a checkpoint is written: without an adapter only these numbers know the reference."""
        super().on_save_checkpoint(checkpoint)
        checkpoint[_ENTRY] = {} if self.has_reference else self.reference_log_probs

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        self.reference_log_probs = dict(checkpoint.get(_ENTRY, {}))

    def _losses(self, batch: dict[str, Tensor], split: str) -> tuple[Tensor, Tensor]:
        """Losses (B,), and rewards (2, B) without gradient."""
        policy, lengths = self(batch)
        theirs = self._reference_of(batch, split)
        losses = preference_losses(policy, theirs, lengths, self.loss, self.beta, self.label_smoothing)
        return losses, self.beta * (policy.detach() - theirs)

    def _reference_of(self, batch: dict[str, Tensor], split: str) -> Tensor:
        """The reference's log-probabilities of a batch (2, B): those computed before, else computed now."""
        in_fit = self.trainer.state.fn == "fit"
        if in_fit and split in self.reference_log_probs:
            return self._looked_up(batch, split)
        if self.has_reference or not self.has_trained:
            return self.reference(batch)
        return self._looked_up(batch, split)

    def _looked_up(self, batch: dict[str, Tensor], split: str) -> Tensor:
        table, rows = self.reference_log_probs.get(split), batch.get("row")
        if table is not None and rows is not None and int(rows.max()) < len(table):
            chosen, rejected, tokens = table.to(self.device)[rows].T
            if torch.equal(tokens, sums_of_tokens(batch)):
                return torch.stack([chosen, rejected])
        raise ValueError(f"{split}: the reference's log-probabilities were computed of other data; use that, or OFT")

    def _all_reference_log_probs(self) -> dict[str, Tensor]:
        """By split, (rows, 3); every process computes a part of the batches and gets all."""
        data, strategy = getattr(self.trainer, "datamodule", None), self.trainer.strategy
        splits: dict[str, Any] = getattr(data, "splits", {})
        if data is None or not all(hasattr(table, "__len__") for table in splits.values()) or not splits:
            raise ValueError("precompute_reference: needs a PreferenceDataModule with streaming: false")
        tables = {}
        for split, rows in splits.items():
            table = torch.zeros(len(rows), 3, device=self.device)
            # A generator of its own: a loader draws a number as it starts, and a run is the same with and without this.
            loader = DataLoader(rows, data.batch_size, collate_fn=data.collate_fn, generator=torch.Generator())
            for number, batch in enumerate(loader):
                # Shards of one model must be called together.
                mine = number % self.trainer.world_size == self.trainer.global_rank
                if mine or self.device_mesh is not None:
                    batch = self.transfer_batch_to_device(batch, self.device, 0)
                    with self.trainer.precision_plugin.val_step_context():
                        found = self.reference(batch)
                    if mine:
                        table[batch["row"]] = torch.stack([*found, sums_of_tokens(batch)], 1)
            tables[split] = strategy.reduce(table, reduce_op="sum").cpu()
        return tables


def sums_of_tokens(batch: dict[str, Tensor]) -> Tensor:
    """The sum of each pair's token ids, (B,) float32, whatever the padding: rows of other data have other ones."""
    return (batch["input_ids"] * batch["attention_mask"]).sum(-1).view(2, -1).sum(0).float()


def check_arguments(loss: str, beta: float, label_smoothing: float) -> None:
    """Raise ValueError, one line, when an argument is out of its range."""
    if loss not in PREFERENCE_LOSSES:
        raise ValueError(f"loss={loss!r}: must be one of {', '.join(PREFERENCE_LOSSES)}")
    if beta <= 0:
        raise ValueError(f"beta={beta}: must be above 0")
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing={label_smoothing}: is a share of wrong pairs, in [0, 0.5)")
    if label_smoothing and loss != "robust":
        raise ValueError(f"label_smoothing={label_smoothing}: {loss} has none; set loss: robust")


def check_batch(batch: Any) -> None:
    """Raise ValueError, one line, when a batch is not what the task can take."""
    wanted = {"input_ids", "labels", "attention_mask"}
    if not isinstance(batch, dict) or not wanted <= set(batch):
        found = sorted(batch) if isinstance(batch, dict) else type(batch).__name__
        raise ValueError(f"batch: found {found}; a batch is a dict of {', '.join(sorted(wanted))} (2B, L)")
