"""Linear layers in every quantized format that runs on a CPU, and a model of them."""

from __future__ import annotations

import contextlib
import importlib
import io
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

BITSANDBYTES = ["nf4", "nf4-double", "nf4-bf16-storage", "fp4", "int8"]
TORCHAO = ["ao-int8", "ao-int4", "ao-float8", "NF4Tensor"]
OTHERS = ["quanto-int8", "quanto-int4", "hqq4", "hqq8"]
KINDS = [*BITSANDBYTES, *TORCHAO, *OTHERS]
PACKAGES = {"ao": "torchao", "NF4Tensor": "torchao", "quanto": "optimum.quanto", "hqq": "hqq.core.quantize"}
ERRORS = {"nf4": 0.1, "fp4": 0.13, "int8": 0.01, "ao-int8": 0.01, "ao-int4": 0.12, "ao-float8": 0.03, "NF4Tensor": 0.1,
          "quanto-int8": 0.01, "quanto-int4": 0.12, "hqq4": 0.1, "hqq8": 0.01}  # fmt: skip
"""By kind: what the values of a weight of normal numbers lose at most, relative to its norm."""


def package(kind: str) -> Any:
    """The package of a kind; the test is skipped where it is not installed."""
    name = PACKAGES.get(kind if kind in PACKAGES else kind.split("-")[0].rstrip("48"), "bitsandbytes")
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        try:
            return importlib.import_module(name)
        except ImportError:
            pytest.skip(f"{kind} needs {name}, which is not installed")


def error_of(kind: str) -> float:
    return ERRORS.get(kind) or ERRORS[kind.split("-")[0]]


def quantize(kind: str, linear: nn.Linear, device: str = "cpu") -> nn.Module:
    """The layer in another format, on a device; as it is where that is "plain"."""
    if kind == "plain":
        return linear.to(device)
    own = package(kind)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        make: Callable[[str, Any, nn.Linear], nn.Module] = {
            "bitsandbytes": _bitsandbytes, "torchao": _torchao, "optimum.quanto": _quanto, "hqq.core.quantize": _hqq,
        }[own.__name__]  # fmt: skip
        return make(kind, own, linear).to(device)


def quantized_linear(kind: str, fan_in: int = 64, fan_out: int = 96, bias: bool = True) -> tuple[nn.Module, nn.Linear]:
    """A quantized layer, and the plain one that it was made of."""
    torch.manual_seed(0)
    linear = nn.Linear(fan_in, fan_out, bias)
    return quantize(kind, _copy(linear)), linear


def _copy(linear: nn.Linear) -> nn.Linear:
    made = nn.Linear(linear.in_features, linear.out_features, linear.bias is not None)
    made.load_state_dict(linear.state_dict())
    return made


def _bitsandbytes(kind: str, bnb: Any, linear: nn.Linear) -> nn.Module:
    sizes: Any = (linear.in_features, linear.out_features, linear.bias is not None)
    if kind == "int8":
        made = bnb.nn.Linear8bitLt(*sizes, has_fp16_weights=False)
    else:
        storage = torch.bfloat16 if "bf16" in kind else torch.uint8
        made = bnb.nn.Linear4bit(
            *sizes, quant_type=kind[:3], compress_statistics="double" in kind, quant_storage=storage
        )
    made.load_state_dict(linear.state_dict())
    return made.requires_grad_(False)  # the device to which it goes first quantizes it


def _torchao(kind: str, ao: Any, linear: nn.Linear) -> nn.Module:
    from torchao import quantization as q

    if kind == "NF4Tensor":
        from torchao.quantization.quantize_.workflows import to_nf4

        linear.weight = nn.Parameter(to_nf4(linear.weight.detach(), 64, 1), requires_grad=False)
        return linear
    configs = {
        "ao-int8": q.Int8WeightOnlyConfig,
        "ao-int4": lambda: q.IntxWeightOnlyConfig(torch.int4, q.PerGroup(32)),
        "ao-float8": q.Float8WeightOnlyConfig,
    }
    q.quantize_(linear, configs[kind]())
    return linear


def _quanto(kind: str, quanto: Any, linear: nn.Linear) -> nn.Module:
    made = quanto.QLinear.from_module(linear, weights=quanto.qint8 if kind.endswith("8") else quanto.qint4)
    made.freeze()
    return made.requires_grad_(False)


def _hqq(kind: str, hqq: Any, linear: nn.Linear) -> nn.Module:
    config = hqq.BaseQuantizeConfig(nbits=int(kind[-1]), group_size=32)
    return hqq.HQQLinear(linear, config, compute_dtype=torch.float32, device="cpu")


def llama(kind: str, tied: bool = False, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Any:
    """A small Llama of random weights whose projections are in a format; in training mode, so that the forward of no
    layer rounds its inputs."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "vocab_size": 64}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(**sizes, **heads, tie_word_embeddings=tied)).to(dtype)
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and name != "lm_head":
            model.set_submodule(name, quantize(kind, module, device))
    return model.to(device)


def rotate(model: nn.Module) -> None:
    """Turn every rotation of a model by a large angle."""
    from lightning_oft import oft_layers

    for layer in oft_layers(model).values():
        for rotation in layer.oft_R.values():  # type: ignore[union-attr, operator]
            nn.init.normal_(rotation.weight, std=0.1)


TOKENS = torch.arange(14).view(2, 7)


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    """What a model says of a few tokens, in float32."""
    return model(TOKENS).logits.float()


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    """The norm of a difference, relative to that of the second."""
    return float((a.float() - b.float()).norm() / b.float().norm())
