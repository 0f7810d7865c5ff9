"""Every format's writer and reader agree: over the layer types, the ways to train, and the shapes of models."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from layer_cases import KINDS, Case
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    ViTConfig,
    ViTForImageClassification,
)

from lightning_oft import AdapterState, OFTConfig, inject, save_adapter, set_adapter
from lightning_oft.cli import main
from lightning_oft.formats import read_adapter
from lightning_oft.formats.checkpoint import write_entry
from lightning_oft.formats.peft import write_peft
from lightning_oft.model.adapter_state import take
from lightning_oft.model.loading import put

pytestmark = [
    pytest.mark.filterwarnings("ignore:block sizes adjusted"),
    pytest.mark.filterwarnings("ignore:PEFT cannot represent"),
    pytest.mark.filterwarnings("ignore:adapter .* is not active on"),
]
FILES = ("adapter_config.json", "adapter_model.safetensors")


class Lit(nn.Module):
    """Stands for a LightningModule: what a checkpoint's names start at."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *inputs: Any, **named: Any) -> Any:
        return self.model(*inputs, **named)


def train(model: nn.Module, seed: int = 1) -> None:
    """Stands for training: noise on everything that trains, and statistics that moved."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d) and module.weight.requires_grad:
            module.running_mean = torch.rand(module.num_features, generator=generator)


def through_peft(model: nn.Module, place: Path, name: str) -> AdapterState:
    """The adapter of a model from a directory."""
    write_peft(take(model, name), place / "adapter")
    return read_adapter(place / "adapter", name)


def through_checkpoint(model: nn.Module, place: Path, name: str) -> AdapterState:
    """The adapter of a model from a checkpoint."""
    return read_adapter(checkpoint(model, place), name)


def checkpoint(model: nn.Module, place: Path) -> Path:
    """An adapter-only checkpoint as Lightning would write it."""
    content: dict[str, Any] = {"state_dict": model.state_dict()}
    write_entry(model, content, adapter_only=True)
    torch.save(content, place / "x.ckpt")
    return place / "x.ckpt"


FORMATS: dict[str, Callable[[nn.Module, Path, str], AdapterState]] = {
    "peft": through_peft,
    "checkpoint": through_checkpoint,
}
formats = pytest.mark.parametrize("through", FORMATS.values(), ids=FORMATS)


def difference(one: AdapterState, other: AdapterState) -> list[str]:
    """Names of the fields in which two states differ for anybody who writes or uses them."""
    found = [f.name for f in fields(AdapterState) if f.name not in ("layers", "saved", "carried", "source", "extra")]
    found = [name for name in found if _ordered(getattr(one, name)) != _ordered(getattr(other, name))]
    structures = ({n: layer[:3] for n, layer in state.layers.items()} for state in (one, other))
    tensors = (state.generators() | state.saved | state.carried for state in (one, other))
    return found + ["layers"] * differ(*structures) + ["tensors"] * differ(*tensors)


def _ordered(value: Any) -> Any:
    return sorted(value) if isinstance(value, list) else value


def differ(one: dict[str, Any], other: dict[str, Any]) -> bool:
    if one.keys() != other.keys():
        return True
    pairs = [(one[key], other[key]) for key in one]
    return not all(torch.equal(a, b) and a.dtype == b.dtype if isinstance(a, Tensor) else a == b for a, b in pairs)


def files(directory: Path) -> list[bytes]:
    return [(directory / name).read_bytes() for name in FILES]


class Beside(nn.Module):
    """A layer, a linear layer behind nothing of it, and a head; the head's output is the model's."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = case.build()
        self.head = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5))

    def forward(self, *inputs: Tensor) -> Tensor:
        logits: Tensor = self.head(self.body(*inputs).flatten()[:8].view(2, 4))
        return logits


TYPES = ["linear_2d", "linear_3d", "conv1d_hf", "embedding_1d", "conv2d_1x1", "conv2d_3x3", "conv2d_groups", "conv1d", "conv_transpose2d",
    "attention", "attention_no_bias", "attention_kdim_vdim"]  # fmt: skip
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bias": {"bias": "all"},
    "block_share": {"block_share": True, "bias": "oft_only"},
    "modules_to_save": {"modules_to_save": ["head"], "bias": "oft_only"},
    "exact": {"use_cayley_neumann": False, "max_angle": 20.0},
}


@formats
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("kind", TYPES)
def test_what_is_written_is_read(
    kind: str, options: dict[str, Any], through: Callable[[nn.Module, Path, str], AdapterState], tmp_path: Path
) -> None:
    model, inputs = Lit(Beside(KINDS[kind])).eval(), KINDS[kind].inputs()
    inject(model, OFTConfig(oft_block_size=4, target_modules=["layer"], **options))
    train(model)
    taken = take(model)
    read = through(model, tmp_path, "default")
    assert difference(read, taken) == []
    again = Lit(Beside(KINDS[kind])).eval()
    assert put(again, read) == ["model.body.layer"]
    assert torch.equal(again(*inputs), model(*inputs))
    assert difference(take(again), taken) == []
    write_peft(taken, tmp_path / "one")
    write_peft(read, tmp_path / "two")
    assert files(tmp_path / "one") == files(tmp_path / "two")


# ---- models: `lightning-oft export` of a checkpoint is `save_adapter` of the model -------------------------------------


def _bert() -> nn.Module:
    config = BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24, vocab_size=20)
    return BertForSequenceClassification(config)


def _vit() -> nn.Module:
    options: Any = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    model = ViTForImageClassification(ViTConfig(**options, image_size=8, patch_size=4, num_labels=3))
    model.config._name_or_path = "some/vit"
    return model


def _distilbert() -> nn.Module:
    return DistilBertForSequenceClassification(
        DistilBertConfig(dim=16, hidden_dim=24, n_layers=1, n_heads=2, vocab_size=20, max_position_embeddings=16)
    )


def _digits() -> nn.Module:
    return nn.Sequential(nn.Conv2d(2, 4, 3), nn.Flatten(), nn.Linear(16, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))


def _suffixes() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)))


class Patches(nn.Module):
    """PEFT would find `rest.wide`, which it computes otherwise, by the name of `wide`."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.rest = nn.Linear(8, 16), nn.ModuleDict({"wide": nn.Conv2d(1, 2, 3)})

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.rest["wide"](self.wide(x).view(2, 1, 4, 4))
        return y


def _compiled() -> nn.Module:
    model = _digits()
    model[2] = torch.compile(nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 8)), backend="eager")
    return model


class Tied(nn.Module):
    """A head that shares the weight of an embedding, and a layer between them."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.mix, self.head = nn.Embedding(9, 8), nn.Linear(8, 8), nn.Linear(8, 9, bias=False)
        self.head.weight = self.words.weight

    def forward(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.head(self.mix(self.words(ids)))
        return logits


IDS, PICTURES, SQUARES, ROWS = torch.arange(10).view(2, 5), torch.ones(2, 3, 8, 8), torch.ones(2, 2, 4, 4), torch.ones(2, 8)
Row = tuple[Callable[[], nn.Module], Tensor, dict[str, Any]]
MODELS: dict[str, Row] = {
    "SEQ_CLS": (_bert, IDS, {"target_modules": ["query"], "task_type": "SEQ_CLS"}),
    "pre_classifier": (_distilbert, IDS, {"target_modules": ["q_lin"], "task_type": "SEQ_CLS"}),
    "pre_classifier adapted": (_distilbert, IDS, {"target_modules": ["q_lin", "pre_classifier"], "modules_to_save": ["classifier"]}),
    "ViT": (_vit, PICTURES, {"target_modules": ["q_proj", "projection"], "modules_to_save": ["classifier"], "bias": "oft_only"}),
    "ViT all biases": (_vit, PICTURES, {"target_modules": "all-linear", "exclude_modules": ["classifier"], "bias": "all"}),
    "convolution with bias": (_digits, SQUARES, {"target_modules": ["0"], "bias": "oft_only"}),
    "digits": (_digits, SQUARES, {"target_modules": ["0", "2"], "modules_to_save": ["3", "4"], "bias": "all"}),
    "suffixes": (_suffixes, ROWS, {"target_modules": r"model\.(0|1\.1)"}),
    "suffix unknown to PEFT": (Patches, ROWS, {"target_modules": ["wide"]}),
    "compiled": (_compiled, SQUARES, {"target_modules": ["2.0", "2.1"], "modules_to_save": ["4"], "bias": "oft_only"}),
    "tied": (Tied, torch.arange(5), {"target_modules": ["mix"], "modules_to_save": ["head"]}),
    "half": (lambda: _digits().bfloat16(), SQUARES.bfloat16(), {"target_modules": ["2"], "modules_to_save": ["4"]}),
}  # fmt: skip


def _adapted(row: Row, name: str = "default") -> nn.Module:
    build, _, options = row
    torch.manual_seed(0)
    model = Lit(build()).eval()
    inject(model, OFTConfig(oft_block_size=4, **options), name)
    train(model)
    return model


def _export(source: Path, place: Path, *more: str) -> list[bytes]:
    assert main(["export", "--checkpoint", str(source), "--output", str(place), *more]) == 0
    return files(place)


@pytest.mark.parametrize("row", MODELS.values(), ids=MODELS)
def test_export_of_a_checkpoint_writes_what_save_adapter_writes(row: Row, tmp_path: Path) -> None:
    model = _adapted(row)
    save_adapter(model, tmp_path / "saved")
    expected = files(tmp_path / "saved")
    assert _export(checkpoint(model, tmp_path), tmp_path / "exported") == expected
    assert _export(tmp_path / "saved", tmp_path / "again") == expected
    build, x, _ = row
    for source in (tmp_path / "saved", tmp_path / "x.ckpt"):
        torch.manual_seed(0)
        again = Lit(build()).eval()
        put(again, read_adapter(source))
        with torch.compiler.set_stance("force_eager"):
            theirs, mine = (getattr(out, "logits", out) for out in (again(x), model(x)))
        assert torch.equal(theirs, mine)
        save_adapter(again, tmp_path / "loaded")
        assert files(tmp_path / "loaded") == expected


@pytest.mark.parametrize("row", [MODELS["digits"], MODELS["pre_classifier"], MODELS["tied"]], ids=["digits", "carried", "tied"])
def test_an_adapter_that_waits_is_written_like_one_that_is_active(row: Row, tmp_path: Path) -> None:
    save_adapter(_adapted(row, "a"), tmp_path / "saved", "a")
    build, _, options = row
    torch.manual_seed(0)
    model = Lit(build()).eval()
    inject(model, OFTConfig(oft_block_size=4, **options), "a")
    train(model)
    inject(model, OFTConfig(oft_block_size=8, **{**options, "modules_to_save": ["pre_classifier", *options.get("modules_to_save", [])]} if build is _distilbert else options), "b")
    set_adapter(model, "b")
    train(model, 2)
    save_adapter(model, tmp_path / "waiting", "a")
    assert files(tmp_path / "waiting") == files(tmp_path / "saved")
    exported = _export(checkpoint(model, tmp_path), tmp_path / "exported", "--adapter-name", "a")
    assert exported == files(tmp_path / "saved")
