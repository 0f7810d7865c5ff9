"""Tiny language models of several architectures, saved with the tokenizer of the offline base."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoTokenizer,
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaModel,
    T5Config,
    T5ForConditionalGeneration,
)

TOKENIZER = Path(__file__).parents[1] / "examples" / "bases" / "docs-llama"
IDS: dict[str, Any] = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2, "vocab_size": 1024}
BERT = BertConfig(
    hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=64,
    hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, initializer_range=0.2, **IDS,
)  # fmt: skip
LLAMA = LlamaConfig(
    hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=64,
    **{**IDS, "pad_token_id": None},
)  # fmt: skip
T5 = T5Config(d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, dropout_rate=0.0, decoder_start_token_id=2, **IDS)
BART = BartConfig(
    d_model=16, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=16, decoder_ffn_dim=16, encoder_attention_heads=2,
    decoder_attention_heads=2, max_position_embeddings=64, dropout=0.0, init_std=0.2, decoder_start_token_id=1, **IDS,
)  # fmt: skip
MODELS: dict[str, Any] = {
    "bert": (BertModel, BERT),
    "llama": (LlamaModel, LLAMA),
    "t5": (T5ForConditionalGeneration, T5),
    "bart": (BartForConditionalGeneration, BART),
}


def save(name: str, folder: Path) -> str:
    """Save one of `MODELS` with its tokenizer; returns its path."""
    model_class, config = MODELS[name]
    return save_as(model_class, config, folder)


def save_as(model_class: Any, config: Any, folder: Path) -> str:
    """Save a model of random weights, always the same, with the tokenizer of the offline base; returns its path."""
    torch.manual_seed(0)
    model_class(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(TOKENIZER).save_pretrained(folder)
    return str(folder)
