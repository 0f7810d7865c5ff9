"""What it costs to write rotated weights back in their quantized format: the table of docs/quantized.md.

    python examples/requantize.py

A layer of 512 x 512 normal numbers is quantized, rotated by about 20 degrees in blocks of 32, and merged in each way.
Of a format whose package is not installed there is no row.
"""

import contextlib
import importlib
import io
import logging
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lightning_oft import OFTConfig, inject, merge
from lightning_oft.codecs import packed_codec

SIZE = 512


def bitsandbytes(linear: nn.Linear, **options: Any) -> nn.Module:
    """nf4, fp4 or int8."""
    from bitsandbytes import nn as bnb

    cls = bnb.Linear4bit if "quant_type" in options else bnb.Linear8bitLt
    made = cls(SIZE, SIZE, bias=False, **options or {"has_fp16_weights": False})
    made.load_state_dict(linear.state_dict())
    return made.to("cpu")


def torchao(linear: nn.Linear, config: str) -> nn.Module:
    """int8, int4 or float8, weights only."""
    from torchao import quantization as ao

    options = (torch.int4, ao.PerGroup(32)) if config == "IntxWeightOnlyConfig" else ()
    ao.quantize_(linear, getattr(ao, config)(*options))
    return linear


FORMATS: dict[str, tuple[Callable[..., nn.Module], dict[str, Any]]] = {
    "bitsandbytes nf4": (bitsandbytes, {"quant_type": "nf4"}),
    "bitsandbytes fp4": (bitsandbytes, {"quant_type": "fp4"}),
    "bitsandbytes int8": (bitsandbytes, {}),
    "torchao int8": (torchao, {"config": "Int8WeightOnlyConfig"}),
    "torchao int4, groups of 32": (torchao, {"config": "IntxWeightOnlyConfig"}),
    "torchao float8": (torchao, {"config": "Float8WeightOnlyConfig"}),
}


def relative(a: Tensor, b: Tensor) -> float:
    """The norm of a difference, relative to that of the second."""
    return float((a - b).norm() / b.norm())


@torch.no_grad()
def errors(quantize: Callable[..., nn.Module], options: dict[str, Any]) -> tuple[float, float, float]:
    """Of outputs: what quantizing the base has put them off by, then a bfloat16 export, then requantizing."""
    torch.manual_seed(0)
    linear, x = nn.Linear(SIZE, SIZE, bias=False), torch.randn(256, SIZE)
    nn.init.normal_(linear.weight)
    plain = linear(x)
    model = nn.Sequential(quantize(linear, **options)).train()
    base = relative(model(x), plain)
    inject(model, OFTConfig(oft_block_size=32, use_cayley_neumann=False))
    nn.init.normal_(model[0].oft_R["default"].weight, std=0.03)
    wanted = model(x)
    codec = packed_codec(model[0])
    weight = codec.read(model[0], "weight").float()
    rotation = torch.block_diag(*model[0].oft_R["default"].matrix())
    exported = (weight @ rotation.T).bfloat16().float()
    merge(model, requantize=True)
    return base, relative(x @ exported.T, wanted), relative(model(x), wanted)


def main() -> list[tuple[str, ...]]:
    """The rows of the table, its head first."""
    rows = [("format of the base", "the quantized base itself", "save_merged in bfloat16", "merge(requantize=True)")]
    logging.disable(logging.WARNING)  # each merge says its error, and bitsandbytes each call
    for name, (quantize, options) in FORMATS.items():
        with contextlib.suppress(ImportError), warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            importlib.import_module(name.split()[0])
            rows.append((name, *(f"{error:.4f}" for error in errors(quantize, options))))
    logging.disable(logging.NOTSET)
    return rows


if __name__ == "__main__":
    for number, row in enumerate(main()):
        print("| " + " | ".join(row) + " |" + ("\n" + "|---" * len(row) + "|" if number == 0 else ""))
