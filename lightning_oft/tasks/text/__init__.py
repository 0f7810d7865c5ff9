"""Language models as ordinary LightningModules."""

from lightning_oft.tasks.text.causal import CausalLM
from lightning_oft.tasks.text.preferences import PreferenceOptimization

__all__ = ["CausalLM", "PreferenceOptimization"]
