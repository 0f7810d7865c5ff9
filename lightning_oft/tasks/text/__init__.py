"""Language models as ordinary LightningModules."""

from lightning_oft.tasks.text.causal import CausalLM

__all__ = ["CausalLM"]
