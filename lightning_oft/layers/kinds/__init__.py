"""How each kind of module is rotated: by its input, its output, or the weights that it reads."""

from __future__ import annotations

from torch import nn
from torch.nn.utils import parametrize

from .attention import ATTENTION
from .base import Kind, Part
from .conv import CONV, CONV_TRANSPOSE
from .linear import CONV1D, EMBEDDING, LINEAR

__all__ = ["Kind", "Part", "kind_of", "refusal"]

# Bound now: inside Lightning's quantization contexts `torch.nn.Linear` names another class.
_Linear, _Embedding, _Attention = nn.Linear, nn.Embedding, nn.MultiheadAttention
_ConvNd = nn.modules.conv._ConvNd
_ConvTransposeNd = nn.modules.conv._ConvTransposeNd
_LazyModule = nn.modules.lazy.LazyModuleMixin


def kind_of(module: nn.Module) -> Kind | None:
    """How this module would be rotated; None where no way is known."""
    if isinstance(module, _ConvTransposeNd):
        return CONV_TRANSPOSE
    if isinstance(module, _ConvNd):
        return CONV
    if isinstance(module, _Attention):
        return ATTENTION
    if isinstance(module, _Embedding):
        return EMBEDDING
    if isinstance(module, _Linear):
        return LINEAR
    if type(module).__name__ == "Conv1D" and hasattr(module, "nf"):
        return CONV1D
    sizes = (getattr(module, "in_features", None), getattr(module, "out_features", None))
    return LINEAR if all(isinstance(size, int) for size in sizes) else None


def refusal(module: nn.Module) -> str | None:
    """Why a module of a known kind cannot be adapted as it stands, with the remedy; None where it can."""
    if isinstance(module, _LazyModule) and module.has_uninitialized_params():
        return "its shape is not known yet: run one batch through the model first to materialise it"
    if parametrize.is_parametrized(module):
        return "its weight is parametrized: call torch.nn.utils.parametrize.remove_parametrizations first"
    if isinstance(module, _Attention) and (reason := refusal(module.out_proj)) is not None:
        return f"of its out_proj, {reason}"
    names = [*module._parameters, *module._buffers]
    for suffix, remedy in (("_g", "remove_weight_norm"), ("_orig", "remove_spectral_norm or prune.remove")):
        if any(name.endswith(f"weight{suffix}") for name in names):
            return f"its weight is recomputed at every forward: call torch.nn.utils.{remedy} first"
    return None
