"""CausalLM: supervised finetuning of a language model that predicts the next token."""

from torch import Tensor

from lightning_oft.tasks.text.generation import check_packing
from lightning_oft.tasks.text.writing import WritingTask


class CausalLM(WritingTask):
    """Next-token prediction with any model of transformers' AutoModelForCausalLM; the model is `self.model`.

    Batches are {"input_ids", "labels"} (B, L) int64, labels -100 where nothing is learned, with "attention_mask" (B, L),
    or "position_ids" (B, L) of packed rows. A gradient is the mean over all tokens that are learned in one step of the
    optimizer, over accumulated batches and processes. Logs `train/`, `val/` and `test/` `loss`, `perplexity` and
    `accuracy`, all means over tokens; with several test sets `test/<name>/...`.

    Args:
        pretrained: The model to start from: a folder written by save_pretrained, or a hub id.
        prompts: Texts that the model continues after each validation, and before and after the fit.
        generation: Options of transformers' generate, such as max_new_tokens or do_sample.
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

    auto_class = "AutoModelForCausalLM"
    _packs = False

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        """-> logits (B, L, V), in the model's dtype."""
        if "position_ids" in batch and not self._packs:
            check_packing(self.model)
            self._packs = True
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "position_ids") if name in batch}
        # Without a cache, and without a mask where rows are packed: else transformers lets documents see each other.
        logits: Tensor = self.model(**inputs, use_cache=False).logits
        return logits
