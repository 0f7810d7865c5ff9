"""SequenceClassification and TokenClassification: a class for a text, or one for each of its words."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor

from lightning_oft.tasks.base import Dtype, LRInterval
from lightning_oft.tasks.classification import Classification
from lightning_oft.tasks.text.language_model import LanguageModel


class TextClassification(Classification, LanguageModel):
    """Base of the classifiers of text. A subclass names transformers' class that loads the model, and the labels' shape."""

    inputs: ClassVar[Mapping[str, str]] = {"input_ids": "(B, L)", "attention_mask": "(B, L)"}
    optional_inputs = ("token_type_ids",)

    auto_class: ClassVar[str]
    """transformers' class that loads the model."""

    def __init__(
        self,
        pretrained: str,
        num_classes: int | None = None,
        label_smoothing: float = 0.0,
        class_weights: list[float] | None = None,
        activation_checkpointing: bool = False,
        neftune_alpha: float = 0.0,
        new_tokens: list[str] | None = None,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        lr_scheduler: LRSchedulerCallable | None = None,
        lr_interval: LRInterval = "auto",
        dtype: Dtype = "float32",
        quantization_config: Any = None,
    ) -> None:
        import transformers

        super().__init__(
            pretrained, dtype, quantization_config, activation_checkpointing, neftune_alpha, new_tokens,
            optimizer, lr_scheduler, lr_interval,
        )  # fmt: skip
        self.save_hyperparameters(ignore=["optimizer", "lr_scheduler"])
        self.load_classifier(getattr(transformers, self.auto_class), num_classes, label_smoothing, class_weights)
        self.complete_model()
        if self.model.config.pad_token_id is None:  # by which a decoder finds the last token of a text
            ids = (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id, 0)
            self.model.config.pad_token_id = next(number for number in ids if number is not None)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, **inputs: Tensor) -> Tensor:
        """input_ids, attention_mask: (B, L) int64 -> logits (B, C), or (B, L, C) of tokens, float32."""
        logits: Tensor = self.model(input_ids=input_ids, attention_mask=attention_mask, **inputs).logits
        return logits.float()


class SequenceClassification(TextClassification):
    """A class for each text, with any model of transformers' AutoModelForSequenceClassification; it is `self.model`.

    Batches are {"input_ids", "attention_mask"} (B, L) and "labels" (B,), all int64; "token_type_ids" (B, L) where there are
    some. Logs `train/`, `val/` and `test/` `loss`, `accuracy` and `f1` (the mean over classes); with several test sets
    `test/<name>/...`. The counts of what was taken for what are in `confusion`.

    Args:
        pretrained: The model to start from: a folder written by save_pretrained, or a hub id.
        num_classes: Number of classes. Where it differs from the model's a new head is made, which starts from random
            values and is trained whole. None keeps the model's head.
        label_smoothing: Share of the target that is spread over all classes, in [0, 1).
        class_weights: Weight of each class in the loss, in the order of the class ids.
        activation_checkpointing: Recompute activations in the backward pass: half the memory, a third more time.
        neftune_alpha: Noise on the embeddings while training (Jain et al. 2023); 5 is usual, 0 is none.
        new_tokens: Tokens to add to the vocabulary; train their rows with oft.modules_to_save.
        optimizer: Gets what is trainable when the run starts; rotations are never decayed.
        lr_scheduler: Gets the optimizer. None keeps the learning rate.
        lr_interval: When the schedule advances; auto is every step for OneCycleLR and CyclicLR, else every epoch.
        dtype: Data type that the weights are loaded in; "auto" for the checkpoint's.
        quantization_config: transformers' description of a quantized base.

    Raises:
        OSError: When there is no such model or tokenizer at `pretrained`.
        ValueError: When an argument is out of its range.
    """

    auto_class = "AutoModelForSequenceClassification"


class TokenClassification(TextClassification):
    """A class for each word, with any model of transformers' AutoModelForTokenClassification; it is `self.model`.

    Batches are {"input_ids", "attention_mask", "labels"} (B, L) int64, labels -100 at what is not scored: padding, special
    tokens and all but the first token of a word. Logs what SequenceClassification logs, over the words that are scored;
    `f1` is the mean over the classes of words, not over entities of several words.

    Args:
        pretrained, num_classes, label_smoothing, class_weights: As for SequenceClassification.
        activation_checkpointing, neftune_alpha, new_tokens: As for SequenceClassification.
        optimizer, lr_scheduler, lr_interval, dtype, quantization_config: As for SequenceClassification.

    Raises:
        OSError: When there is no such model or tokenizer at `pretrained`.
        ValueError: When an argument is out of its range.
    """

    auto_class = "AutoModelForTokenClassification"
    label_shape = "(B, L)"
