"""Language models as ordinary LightningModules."""

from lightning_oft.tasks.text.causal import CausalLM
from lightning_oft.tasks.text.classification import SequenceClassification, TokenClassification
from lightning_oft.tasks.text.policy import PolicyOptimization
from lightning_oft.tasks.text.preferences import PreferenceOptimization
from lightning_oft.tasks.text.seq2seq import Seq2SeqLM

__all__ = [
    "CausalLM",
    "PolicyOptimization",
    "PreferenceOptimization",
    "Seq2SeqLM",
    "SequenceClassification",
    "TokenClassification",
]
