"""Seq2SeqLM: supervised finetuning of an encoder-decoder, which writes a target for a source."""

from torch import Tensor

from lightning_oft.tasks.text.writing import WritingTask


class Seq2SeqLM(WritingTask):
    """Targets from sources with any model of transformers' AutoModelForSeq2SeqLM, such as T5 or BART; the model is
    `self.model`.

    Batches are {"input_ids", "attention_mask"} (B, S) and "labels" (B, L), all int64, labels -100 where nothing is learned.
    A gradient is the mean over all tokens that are learned in one step of the optimizer, over accumulated batches and
    processes. Logs `train/`, `val/` and `test/` `loss`, `perplexity` and `accuracy`, all means over tokens; with
    several test sets `test/<name>/...`.

    Args:
        pretrained: The model to start from: a folder written by save_pretrained, or a hub id.
        prompts: Sources that the model answers after each validation, and before and after the fit.
        generation: Options of transformers' generate, such as max_new_tokens or num_beams.
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

    auto_class = "AutoModelForSeq2SeqLM"
    shift = 0

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        """-> logits (B, L, V) for each label, given the labels before it, in the model's dtype."""
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask") if name in batch}
        # The model shifts the labels for its decoder, and views them, which it can of contiguous ones only.
        logits: Tensor = self.model(**inputs, labels=batch["labels"].contiguous(), use_cache=False).logits
        return logits
