"""Measure where this library and PEFT compute different things; docs/coming-from-peft.md quotes the table.

    pip install '.[test]'
    python examples/compare_with_peft.py

"rel" is ||a - b|| / ||b||. Every line is a few layers on the CPU; nothing is downloaded.
"""

import copy
import warnings
from collections.abc import Callable
from typing import Any

import peft
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2Model, LlamaConfig, LlamaForCausalLM

import lightning_oft
from lightning_oft import OFTConfig, inject, merge, oft_layers, project, set_adapter
from lightning_oft.functional import orthogonality_error, rotation_angle

LAYER: dict[str, Any] = {"target_modules": ["0"], "oft_block_size": 32}
Row = tuple[str, object, object]


class OneInput(nn.Module):
    """Calls a layer as self-attention is called."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(32, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        """x: (n, t, 32) -> the same shape."""
        attended: Tensor = self.attention(x, x, x)[0]
        return attended


class Holder(nn.Module):
    """A transformers model as an attribute, as LightningModules hold one."""

    def __init__(self) -> None:
        super().__init__()
        sizes: dict[str, Any] = {
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
        }
        self.model = LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=2, vocab_size=64))


def both(base: nn.Module, noise: float = 0.0, **fields: Any) -> tuple[nn.Module, nn.Module]:
    """The same base adapted by PEFT and by us, with the same generators."""
    torch.manual_seed(0)
    theirs = peft.get_peft_model(copy.deepcopy(base), peft.OFTConfig(**fields))
    inject(base, OFTConfig(**fields))
    for (_, a), (_, b) in zip(generators(theirs), generators(base), strict=True):
        a.data = torch.randn_like(a) * noise
        b.data = a.data.clone()
    return theirs, base


def generators(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(name, parameter) for name, parameter in model.named_parameters() if "oft_R" in name]


def rotations(theirs: nn.Module, ours: nn.Module, size: int) -> tuple[Tensor, Tensor]:
    """R of the first layer as each computes it. (size, size) twice."""
    layer: Any = theirs.get_submodule("base_model.model.0")
    mine: Any = next(iter(oft_layers(ours).values()))
    return layer.oft_R["default"](torch.eye(size)), torch.block_diag(*mine.oft_R["default"].matrix())


def rel(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


def outcome(action: Callable[[], object], done: str = "adapted") -> str:
    try:
        action()
    except Exception as error:
        return type(error).__name__
    return done


def series() -> Row:
    torch.manual_seed(0)
    upper = torch.randn(32, 32).triu(1)
    generator = (upper - upper.T).div(torch.linalg.matrix_norm(upper - upper.T, 2)).mul(0.2)
    theirs, ours = both(nn.Sequential(nn.Linear(32, 4)), **LAYER)
    for _, weight in (*generators(theirs), *generators(ours)):
        weight.data = generator[tuple(torch.triu_indices(32, 32, 1))][None].clone()
    a, b = (float(orthogonality_error(r[None])) for r in rotations(theirs, ours, 32))
    return "default series (k = 5, here 6) at t = 0.2: norm of RᵀR - I", a, b


def exact_map() -> Row:
    (a, b), (exact_a, exact_b) = (
        rotations(*both(nn.Sequential(nn.Linear(32, 4)), 0.02, **LAYER, use_cayley_neumann=truncated), 32)
        for truncated in (True, False)
    )
    return "series and exact map from one tensor: rel of R", rel(a, exact_a), rel(b, exact_b)


def convolution() -> Row:
    base, x = nn.Sequential(nn.Conv2d(8, 16, 3, padding=1)), torch.randn(2, 8, 9, 9)
    expected = base(x)
    theirs, ours = both(base, **{**LAYER, "oft_block_size": 8})
    return "Conv2d 3x3 before any training: rel to the base", rel(theirs.eval()(x), expected), rel(ours(x), expected)


def coft() -> Row:
    theirs, ours = both(nn.Sequential(nn.Linear(768, 4)), **LAYER, coft=True, eps=6e-5)
    for _, weight in (*generators(theirs), *generators(ours)):
        weight.data[:, 0] = 1.0  # one plane of each block, far outside any ball
    theirs(torch.randn(1, 768))
    project(ours)
    a, b = (float(rotation_angle(r[None])) for r in rotations(theirs, ours, 768))
    return "COFT at the default eps, fan-in 768, b = 32: degrees a plane may turn", a, b


def several_adapters() -> Row:
    theirs, ours = both(nn.Sequential(nn.Linear(64, 8)), 0.05, **LAYER)
    theirs.add_adapter("second", peft.OFTConfig(**LAYER))  # type: ignore[operator]
    theirs.base_model.set_adapter(["default", "second"])  # type: ignore[operator, union-attr]
    set_adapter(ours, [])
    inject(ours, OFTConfig(**LAYER), "second")
    set_adapter(ours, ["default", "second"])
    for name, weight in (*generators(theirs), *generators(ours)):
        if "second" in name:
            torch.manual_seed(1)
            weight.data = torch.randn_like(weight) * 0.05
    x = torch.randn(5, 64)
    before = theirs(x), ours(x)
    theirs.merge_adapter()  # type: ignore[operator]
    merge(ours)
    return "two active adapters: rel of merged to unmerged", rel(theirs(x), before[0]), rel(ours(x), before[1])


def dropout() -> Row:
    theirs, ours = both(nn.Sequential(nn.Linear(64, 8)), 0.05, **LAYER, module_dropout=0.5)
    x = torch.randn(5, 64)
    changes = [max(rel(model(x), model(x)) for _ in range(8)) for model in (theirs.train(), ours.train())]
    return "module_dropout=0.5: rel of two training passes", changes[0], changes[1]


def batch_norm() -> Row:
    theirs, ours = both(nn.Sequential(nn.Linear(32, 8), nn.BatchNorm1d(8)), **LAYER)
    x = torch.randn(16, 32) + 1
    drift = []
    for model in (theirs.train(), ours.train()):
        model(x)
        drift.append(max(float(b.abs().max()) for name, b in model.named_buffers() if "running_mean" in name))
    return "BatchNorm of the frozen base: drift of its mean in one pass", drift[0], drift[1]


def encoder_layer() -> Row:
    base = nn.Sequential(nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True))
    x = torch.randn(2, 5, 32)
    with torch.no_grad():
        expected = base.eval()(x)
        models = both(base, 0.05, target_modules=["linear1", "linear2"], oft_block_size=32)
        changes = [rel(model.eval()(x), expected) for model in models]
    return "nn.TransformerEncoderLayer in eval: rel of adapted to base", changes[0], changes[1]


def attention() -> Row:
    adapt: dict[str, Any] = {"target_modules": ["attention"], "oft_block_size": 32}
    theirs = outcome(lambda: peft.get_peft_model(OneInput(), peft.OFTConfig(**adapt)))
    return "nn.MultiheadAttention as a target", theirs, outcome(lambda: inject(OneInput(), OFTConfig(**adapt)))


def out_projection() -> Row:
    base, x = OneInput(), torch.randn(2, 5, 32)
    expected = base(x)
    theirs, ours = both(base, 0.05, target_modules=["out_proj"], oft_block_size=32)
    return "its out_proj as a target: rel of adapted to base", rel(theirs(x), expected), rel(ours(x), expected)


def conv1d() -> Row:
    def base() -> GPT2Model:
        return GPT2Model(GPT2Config(n_embd=32, n_layer=1, n_head=2))

    adapt: dict[str, Any] = {"target_modules": ["c_attn"], "oft_block_size": 32}
    theirs = outcome(lambda: peft.get_peft_model(base(), peft.OFTConfig(**adapt)))
    return "transformers' Conv1D (GPT-2)", theirs, outcome(lambda: inject(base(), OFTConfig(**adapt)))


def four_dimensions() -> Row:
    theirs, ours = both(nn.Sequential(nn.Linear(32, 8)), **LAYER)
    x = torch.randn(2, 3, 4, 32)
    return "nn.Linear with a 4-D input", outcome(lambda: theirs(x), "runs"), outcome(lambda: ours(x), "runs")


def no_parameters() -> Row:
    base = nn.Sequential(nn.Linear(769, 8))
    theirs = peft.get_peft_model(copy.deepcopy(base), peft.OFTConfig(**LAYER))
    count = f"{sum(p.numel() for p in theirs.parameters() if p.requires_grad)} parameters"
    return "fan-in 769, which 32 does not divide", count, outcome(lambda: inject(base, OFTConfig(**LAYER)))


def all_linear() -> Row:
    ours = Holder()
    theirs = peft.get_peft_model(Holder(), peft.OFTConfig(target_modules="all-linear", oft_block_size=32))
    inject(ours, OFTConfig(target_modules="all-linear", oft_block_size=32))
    said = [
        "with lm_head" if any("lm_head" in name for name, _ in generators(m)) else "without" for m in (theirs, ours)
    ]
    return "all-linear on a module that holds a causal LM", said[0], said[1]


def layers_and_pattern() -> Row:
    adapt: dict[str, Any] = {"target_modules": r".*\.q_proj", "layers_to_transform": [0], "oft_block_size": 32}
    theirs = peft.get_peft_model(Holder(), peft.OFTConfig(**adapt))
    said = outcome(lambda: OFTConfig(**adapt))
    return "layers_to_transform=[0] beside a pattern, 2 layers", f"adapts {len(generators(theirs))} of 2", said


ROWS = (
    series, exact_map, convolution, coft, several_adapters, dropout, batch_norm, encoder_layer, out_projection,
    attention, conv1d, four_dimensions, no_parameters, all_linear, layers_and_pattern,
)  # fmt: skip


def main() -> list[tuple[str, str, str]]:
    """Print the table, in Markdown; returns its rows."""
    torch.set_num_threads(1)
    table = [("measured", f"peft {peft.__version__}", f"lightning_oft {lightning_oft.__version__}")]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # both announce what the table shows
        for row in ROWS:
            what, *values = row()
            theirs, ours = (f"{value:.1e}" if isinstance(value, float) else str(value) for value in values)
            table.append((what, theirs, ours))
    widths = [max(len(row[i]) for row in table) for i in range(3)]
    for i, line in enumerate(table):
        print("| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |")
        if i == 0:
            print("|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return table


if __name__ == "__main__":
    main()
