"""Every format's writer and reader agree: over the layer types, the ways to train, and the shapes of models."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from layer_cases import KINDS, Case, relative
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    ViTConfig,
    ViTForImageClassification,
)

from lightning_oft import AdapterState, OFTConfig, inject, project, save_adapter, set_adapter, unload
from lightning_oft.cli import main
from lightning_oft.formats import read_adapter
from lightning_oft.formats.checkpoint import complete, load_state, put_adapters, write_entry
from lightning_oft.formats.checkpoint_file import read
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
            parameter.data.add_(torch.randn(parameter.shape, generator=generator) * 0.01)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d) and module.weight.requires_grad:
            module.running_mean = torch.rand(module.num_features, generator=generator)
    project(model)


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
    """A layer of some type, and a head behind it."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = case.build()
        self.head = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5))

    def forward(self, *inputs: Tensor) -> Tensor:
        logits: Tensor = self.head(self.body(*inputs).flatten()[:8].view(2, 4))
        return logits


TYPES = ["linear_2d", "linear_3d", "conv1d_hf", "embedding_1d", "conv2d_1x1", "conv2d_3x3", "conv1d", "conv_transpose2d_groups", "attention",
    "attention_no_bias", "attention_kdim_vdim"]  # fmt: skip
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bias": {"bias": "all"},
    "block_share": {"block_share": True, "bias": "oft_only"},
    "modules_to_save": {"modules_to_save": ["head"], "bias": "oft_only", "r": 2, "oft_block_size": 0},
    "exact": {"use_cayley_neumann": False, "coft": True, "coft_radius": "peft", "eps": 0.2},
}


@pytest.mark.parametrize("kind", TYPES)
def test_what_is_written_is_read(kind: str, tmp_path: Path) -> None:
    inputs = KINDS[kind].inputs()
    for way, options in OPTIONS.items():
        model = Lit(Beside(KINDS[kind])).eval()
        base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        inject(model, OFTConfig(**{"oft_block_size": 4, "target_modules": ["layer"], **options}))
        train(model)
        taken = take(model)
        for file_format, through in FORMATS.items():
            case = f"{way}, {file_format}"
            (tmp_path / case).mkdir()
            read = through(model, tmp_path / case, "default")
            assert difference(read, taken) == [], case
            again = Lit(Beside(KINDS[kind])).eval()
            assert put(again, read) == ["model.body.layer"]
            assert torch.equal(again(*inputs), model(*inputs)), case
            assert _trainable(again) == _trainable(model), case
            assert difference(take(again), taken) == [], case
            for state, place in ((taken, "one"), (read, "two")):
                write_peft(state, tmp_path / case / place)
            assert files(tmp_path / case / "one") == files(tmp_path / case / "two"), case
            unload(again)
            assert all(torch.equal(tensor, base[name]) for name, tensor in again.state_dict().items()), case


def _trainable(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


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


IDS, PICTURES, SQUARES, ROWS = (
    torch.arange(10).view(2, 5),
    torch.ones(2, 3, 8, 8),
    torch.ones(2, 2, 4, 4),
    torch.ones(2, 8),
)
Row = tuple[Callable[[], nn.Module], Tensor, dict[str, Any]]
MODELS: dict[str, Row] = {
    "SEQ_CLS": (_bert, IDS, {"target_modules": ["query"], "task_type": "SEQ_CLS"}),
    "head by its full name": (_bert, IDS, {"target_modules": ["query"], "modules_to_save": ["model.bert.pooler"]}),
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


@pytest.mark.parametrize("name", ["digits", "pre_classifier", "tied"])
def test_an_adapter_that_waits_is_written_like_one_that_is_active(name: str, tmp_path: Path) -> None:
    """Another one is active, which trains the same modules whole, and one that PEFT wants in the file of the first."""
    row = MODELS[name]
    model, options = _adapted(row, "a"), row[2]
    save_adapter(model, tmp_path / "saved", "a")
    heads = [*options.get("modules_to_save", []), *(["pre_classifier"] if name == "pre_classifier" else [])]
    inject(model, OFTConfig(**{**options, "oft_block_size": 2, "modules_to_save": heads}), "b")
    set_adapter(model, "b")
    train(model, 2)
    save_adapter(model, tmp_path / "waiting", "a")
    assert files(tmp_path / "waiting") == files(tmp_path / "saved")
    exported = _export(checkpoint(model, tmp_path), tmp_path / "exported", "--adapter-name", "a")
    assert exported == files(tmp_path / "saved")


def test_names_can_start_at_another_module(tmp_path: Path) -> None:
    model = _adapted(MODELS["digits"])
    exported = _export(checkpoint(model, tmp_path), tmp_path / "exported", "--root", "model")
    save_adapter(model.get_submodule("model"), tmp_path / "saved")
    assert exported[1] == files(tmp_path / "saved")[1]
    assert set(read_adapter(tmp_path / "exported").layers) == {"0", "2"}
    assert (
        main(["export", "--checkpoint", str(tmp_path / "x.ckpt"), "--output", str(tmp_path / "no"), "--root", "modle"])
        == 2
    )


# ---- files from before AdapterState --------------------------------------------------------------------------------------

FIXTURES = Path(__file__).parent / "fixtures"
_spec: Any = importlib.util.spec_from_file_location("old_files", FIXTURES / "write.py")
old: Any = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(old)


@pytest.mark.parametrize("file", ["adapter", "checkpoint"])
def test_files_of_earlier_versions_are_read(file: str, tmp_path: Path) -> None:
    """Written by fixtures/write.py with the library of then."""
    in_directory = file == "adapter"
    state = read_adapter(FIXTURES / file, "default")
    assert sorted(state.layers) == [
        f"{'' if in_directory else 'net.'}{name}" for name in ("attention", "body.0", "body.1", "patch")
    ]
    model, x = old.Holder(), torch.ones(3, 2, 5, 5)
    base = model.net(x)
    put(model, state)
    assert relative(model.net(x), base) > 1e-2
    reference = old.Holder()
    inject(reference, OFTConfig(**old.config(), use_cayley_neumann=not in_directory))
    old.fill(reference, 0.1)
    assert torch.equal(model.net(x), reference.net(x))
    write_peft(state, tmp_path)
    raw = json.loads((tmp_path / "adapter_config.json").read_text())
    assert "patch" not in str(raw["target_modules"])
    assert raw["base_model_name_or_path"] == (None if in_directory else "some/base")
    again = old.Holder()
    put(again, read_adapter(tmp_path))
    assert torch.equal(again.net(x), reference.net(x))


def test_a_checkpoint_of_an_earlier_version_has_both_its_adapters() -> None:
    checkpoint = read(FIXTURES / "checkpoint")
    model = old.Holder()
    put_adapters(model, checkpoint)
    assert complete(model, checkpoint) == "adapter"
    load_state(model, checkpoint["state_dict"], "x")
    assert not differ(take(model, "second").generators(), read_adapter(FIXTURES / "checkpoint", "second").generators())
    set_adapter(model, "second")
    assert torch.equal(model.net.head[1].weight, old.Holder().net.head[1].weight)
