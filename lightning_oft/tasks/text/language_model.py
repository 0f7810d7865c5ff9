"""LanguageModel: what every task around a language model has: its tokenizer, samples, checkpointing, noise, new tokens."""

from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from typing_extensions import override

from lightning_oft.tasks.base import Dtype, LRInterval, Task
from lightning_oft.tasks.loading import load_companion


class LanguageModel(Task):
    """Base of the text tasks. A subclass calls `load_language_model` in its `__init__`, or loads its model and calls
    `complete_model`.

    Args:
        pretrained: The model to start from: a folder written by save_pretrained, or a hub id.
        dtype, quantization_config, optimizer, lr_scheduler, lr_interval: As for Task.
        activation_checkpointing: Recompute activations in the backward pass: half the memory, a third more time.
        neftune_alpha: Noise on the embeddings while training (Jain et al. 2023); 5 is usual, 0 is none.
        new_tokens: Tokens to add to the vocabulary, each once; their rows train as `new_token_rows` says.
    """

    model: Any

    def __init__(
        self,
        pretrained: str,
        dtype: Dtype = "float32",
        quantization_config: Any = None,
        activation_checkpointing: bool = False,
        neftune_alpha: float = 0.0,
        new_tokens: list[str] | None = None,
        optimizer: Any = torch.optim.AdamW,
        lr_scheduler: Any = None,
        lr_interval: LRInterval = "auto",
    ) -> None:
        super().__init__(pretrained, dtype, quantization_config, optimizer, lr_scheduler, lr_interval)
        if neftune_alpha < 0:
            raise ValueError(f"neftune_alpha={neftune_alpha}: is the size of a noise, at least 0")
        self.activation_checkpointing, self.neftune_alpha = activation_checkpointing, neftune_alpha
        self.new_tokens = new_tokens or []
        self.tokenizer: Any = None

    def load_language_model(self, auto_class: Any, **config_overrides: Any) -> list[str]:
        """Load model and tokenizer. Returns the modules of a new head; raises as `Task.load_model`, and OSError when
        there is no tokenizer at `pretrained`."""
        heads = self.load_model(auto_class, **config_overrides)
        self.complete_model()
        return heads

    def complete_model(self) -> None:
        """Load the tokenizer of a model that is loaded, and give the model what the arguments ask for."""
        from transformers import AutoTokenizer

        self.tokenizer = self.processor = load_companion(AutoTokenizer, str(self.pretrained), "tokenizer")
        if self.new_tokens:
            add_tokens(self.model, self.tokenizer, self.new_tokens)
        if self.activation_checkpointing:
            # Not reentrant: a frozen embedding's output needs no gradient, and the other kind would give none to anything.
            old = self.model.gradient_checkpointing_enable  # its name before transformers 5.24
            getattr(self.model, "activation_checkpointing_enable", old)({"use_reentrant": False})
        if self.neftune_alpha:
            self.model.get_input_embeddings().register_forward_hook(_Noise(self.neftune_alpha))

    @override
    def companions(self) -> list[Any]:
        return [self.tokenizer]


class _Noise:
    """Uniform noise of alpha / sqrt(L D) on embeddings (B, L, D) while training; picklable, unlike a closure."""

    def __init__(self, alpha: float) -> None:
        self.alpha = alpha

    def __call__(self, module: nn.Module, _: Any, embedded: Tensor) -> Tensor:
        if not module.training:
            return embedded
        size = self.alpha / (embedded.shape[-2] * embedded.shape[-1]) ** 0.5
        return embedded + torch.empty_like(embedded).uniform_(-size, size)


def add_tokens(model: Any, tokenizer: Any, tokens: list[str]) -> None:
    """Add tokens to a vocabulary and rows to the embeddings, the new ones at the mean of the old; say what trains them.

    Raises ValueError when a token is in the vocabulary already.
    """
    if known := [token for token in tokens if token in tokenizer.get_vocab()]:
        raise ValueError(f"new_tokens: {known[0]!r} is in the vocabulary already; leave it out")
    tokenizer.add_tokens(tokens, special_tokens=True)
    rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        for module in _vocabularies(model):
            module.weight.data[rows:] = module.weight.data[:rows].mean(0)
    names = [name for name, module in model.named_modules() if module in _vocabularies(model)]
    rank_zero_info(
        f"{len(tokens)} new tokens start at the mean of the others and stay frozen with OFT unless they train whole: "
        f"oft.modules_to_save: [{', '.join(names)}]"
    )


def _vocabularies(model: Any) -> list[Any]:
    """The modules with a row for each word; a tied output is its input."""
    inputs, outputs = model.get_input_embeddings(), model.get_output_embeddings()
    return [inputs] if outputs is None or outputs.weight is inputs.weight else [inputs, outputs]
