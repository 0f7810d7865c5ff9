"""What is saved is what is loaded: every kind of layer, several adapters, what is trained whole, nested models."""

from __future__ import annotations

import json
import logging
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from layer_cases import KINDS, Holder, config, randomize, relative
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import BertConfig, BertModel

from lightning_oft import (
    OFTConfig,
    inject,
    load_adapter,
    merge,
    oft_layers,
    project,
    save_adapter,
    set_adapter,
    unload,
    unmerge,
)
from lightning_oft.formats import AdapterFileError, read_adapter
from lightning_oft.formats.peft import to_json
from lightning_oft.model.adapter_state import take
from lightning_oft.model.fingerprint import other_bases
from lightning_oft.model.traversal import walk

pytestmark = [
    pytest.mark.filterwarnings("ignore:block sizes adjusted"),
    pytest.mark.filterwarnings("ignore:PEFT cannot represent"),
]


class Net(nn.Module):
    """A body, a norm with statistics, and a head to train whole."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 8, bias=False))
        self.head = nn.Sequential(nn.BatchNorm1d(8), nn.Linear(8, 3))

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.body(x))
        return logits


def _net() -> Net:
    torch.manual_seed(0)
    return Net().eval()


def _change(model: nn.Module, seed: int = 1) -> None:
    """Stands for training: noise on all that trains."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(torch.randn(parameter.shape, generator=generator) * 0.1)


@pytest.mark.parametrize("kind", ["linear_2d", "embedding_1d", "conv2d_3x3", "attention"])
def test_a_merged_model_writes_the_same_files(kind: str, tmp_path: Path) -> None:
    model = KINDS[kind].build().eval()
    inject(model, config())
    randomize(model)
    save_adapter(model, tmp_path / "before")
    merge(model)
    save_adapter(model, tmp_path / "after")
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "before" / file).read_bytes() == (tmp_path / "after" / file).read_bytes()


def test_two_adapters_are_two_directories_and_stay_apart(tmp_path: Path) -> None:
    model, x = _net(), torch.randn(4, 8)
    inject(model, OFTConfig(target_modules=["body.0"], oft_block_size=4, modules_to_save=["head"]), "a")
    _change(model, 1)
    with pytest.warns(UserWarning, match=r"adapter 'b' is not active on body\.0"):
        inject(model, OFTConfig(target_modules=["body.0", "body.2"], oft_block_size=2), "b")
    set_adapter(model, "b")
    _change(model, 2)
    outputs = {}
    for name in ("a", "b"):
        set_adapter(model, name)
        outputs[name] = model(x)
        save_adapter(model, tmp_path / name, name)
    again = _net()
    assert load_adapter(again, tmp_path / "b", "b") == ["body.0", "body.2"]
    with pytest.warns(UserWarning, match=r"adapter 'a' is not active on body\.0"):
        assert load_adapter(again, tmp_path / "a", "a") == ["body.0"]
    assert torch.equal(again(x), outputs["b"])
    set_adapter(again, "a")
    assert torch.equal(again(x), outputs["a"])


def test_modules_to_save_and_their_statistics_travel_whole(tmp_path: Path) -> None:
    model, x = _net(), torch.randn(4, 8)
    inject(model, OFTConfig(target_modules="all-linear", oft_block_size=4, modules_to_save=["head"]))
    _change(model)
    model.train()(torch.randn(16, 8) + 3)
    expected = model.eval()(x)
    save_adapter(model, tmp_path)
    keys = load_file(tmp_path / "adapter_model.safetensors").keys()
    assert {"base_model.model.head.0.running_mean", "base_model.model.head.1.bias"} < set(keys)
    again = _net()
    load_adapter(again, tmp_path)
    assert torch.equal(again(x), expected)
    assert again.head[1].weight.requires_grad
    assert again.train().head[0].training  # its statistics belong to the adapter


def test_half_a_head_stays_half_and_generators_become_float32(tmp_path: Path) -> None:
    model = _net().bfloat16()
    inject(model, OFTConfig(oft_block_size=4, modules_to_save=["head"]))
    _change(model)
    save_adapter(model, tmp_path)
    contents = read_adapter(tmp_path)
    assert {value.dtype for value in contents.generators().values()} == {torch.float32}
    assert contents.saved["head.1.weight"].dtype == torch.bfloat16
    again = _net().bfloat16()
    load_adapter(again, tmp_path)
    x = torch.randn(2, 8).bfloat16()
    assert torch.equal(again(x), model(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_generators_of_any_floating_dtype_are_read_as_float32(dtype: torch.dtype, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    model = _net()
    inject(model, OFTConfig(oft_block_size=4))
    randomize(model)
    save_adapter(model, tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    save_file({key: value.to(dtype) for key, value in tensors.items()}, tmp_path / "adapter_model.safetensors")
    raw = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({k: v for k, v in raw.items() if k != "lightning_oft"}))
    again = _net()
    load_adapter(again, tmp_path)
    for name, layer in oft_layers(again).items():
        weight = layer.oft_R["default"].weight  # type: ignore[index, operator, union-attr]
        assert weight.dtype == torch.float32
        assert torch.equal(weight, tensors[f"base_model.model.{name}.oft_R.weight"].to(dtype).float())


@pytest.mark.parametrize(
    "options",
    [
        {"coft": True, "eps": 1e-3},
        {"max_angle": 5.0},
        {"neumann_series": "unhalved"},
        {"target_modules": r"body\.[02]", "exclude_modules": ["0"]},
        {"module_dropout": 0.25, "num_cayley_neumann_terms": 8},
        {"target_modules": ["body.0", "body.2"], "modules_to_save": ["head"], "layers_to_transform": [0]},
    ],
    ids=str,
)
def test_the_configuration_returns_as_it_was_given(options: dict[str, Any], tmp_path: Path) -> None:
    given = OFTConfig(**{"oft_block_size": 4, **options})
    model = _net()
    inject(model, given)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="this adapter uses the series of PEFT before 0.18")
        save_adapter(model, tmp_path)
    assert read_adapter(tmp_path).config == given


@pytest.mark.parametrize(
    "options",
    [
        {"coft": True, "eps": 1e-3, "coft_radius": "peft"},
        {"coft": True, "eps": 1e-3, "coft_radius": "peft", "use_cayley_neumann": False},
        {"coft": True, "eps": 1e-3},
        {"max_angle": 5.0},
    ],
    ids=str,
)
def test_a_file_is_what_memory_was_also_before_a_projection(options: dict[str, Any], tmp_path: Path) -> None:
    model, again = _net(), _net()
    inject(model, OFTConfig(oft_block_size=4, series_guard="warn", **options))
    randomize(model)
    save_adapter(model, tmp_path)
    load_adapter(again, tmp_path)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())
    for one in (model, again):
        project(one)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())


class Task(nn.Module):
    """A transformers model inside another module, beside a head of its own."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        options: dict[str, Any] = {
            "hidden_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "intermediate_size": 24,
        }
        self.encoder = BertModel(BertConfig(**options, vocab_size=20))
        self.head = nn.Linear(16, 2)
        self.eval()

    def forward(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.head(self.encoder(ids).pooler_output)
        return logits


IDS = torch.arange(10).view(2, 5)


def test_files_start_at_the_transformers_model(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    task = Task()
    inject(task, OFTConfig(oft_block_size=4, target_modules=["query", "value"]))
    randomize(task)
    with caplog.at_level(logging.INFO, logger="lightning_oft"):
        save_adapter(task, tmp_path)
    assert "names start at encoder (BertModel)" in caplog.text
    contents = read_adapter(tmp_path)
    assert contents.root == "encoder"
    assert next(iter(contents.generators())) == "encoder.layer.0.attention.self.query"
    for bare in (False, True):
        again = Task()
        names = load_adapter(again.encoder if bare else again, tmp_path)
        assert names[0].startswith("encoder.layer" if bare else "encoder.encoder.layer")
        assert torch.equal(again(IDS), task(IDS))


def test_files_start_at_the_model_where_a_head_beside_it_is_saved_too(tmp_path: Path) -> None:
    task = Task()
    inject(task, OFTConfig(oft_block_size=4, target_modules=["query"], modules_to_save=["head"]))
    _change(task)
    save_adapter(task, tmp_path)
    assert read_adapter(tmp_path).root == ""
    again = Task()
    load_adapter(again, tmp_path)
    assert torch.equal(again(IDS), task(IDS))


def test_a_plain_model_is_found_below_any_module(tmp_path: Path) -> None:
    model = _net()
    inject(model, OFTConfig(oft_block_size=4))
    randomize(model)
    save_adapter(model, tmp_path)
    outer = Holder(nn.Sequential(nn.Identity(), _net())).eval()
    assert load_adapter(outer, tmp_path) == [f"layer.1.{name}" for name in oft_layers(model)]
    x = torch.randn(2, 8)
    assert torch.equal(outer(x), model(x))


def test_a_place_that_is_not_unique_is_refused(tmp_path: Path) -> None:
    model = _net()
    inject(model, OFTConfig(oft_block_size=4))
    save_adapter(model, tmp_path)
    two = nn.ModuleDict({"left": _net(), "right": _net()})
    with pytest.raises(AdapterFileError, match=r"fit left, right alike; .* load_adapter\(model.left"):
        load_adapter(two, tmp_path)
    assert load_adapter(two["right"], tmp_path) == list(oft_layers(model))
    assert oft_layers(two["left"]) == {}


def test_a_layer_that_is_the_model_itself_has_a_name_too(tmp_path: Path) -> None:
    layer, x = nn.Linear(8, 3), torch.randn(2, 8)
    holder = Holder(layer)
    inject(holder, config())
    randomize(holder)
    save_adapter(layer, tmp_path)
    assert list(load_file(tmp_path / "adapter_model.safetensors")) == ["base_model.model.oft_R.weight"]
    again = nn.Linear(8, 3)
    again.load_state_dict({"weight": layer.weight, "bias": layer.bias})
    assert load_adapter(again, tmp_path) == [""]
    assert torch.equal(again(x), layer(x))


def test_an_adapter_that_is_there_already_takes_the_values(tmp_path: Path) -> None:
    given = OFTConfig(oft_block_size=4, modules_to_save=["head"])
    model, x = _net(), torch.randn(2, 8)
    inject(model, given)
    _change(model)
    save_adapter(model, tmp_path)
    again = _net()
    inject(again, given)
    parameters = [id(p) for p in again.parameters()]
    assert not torch.equal(again(x), model(x))
    load_adapter(again, tmp_path)
    assert torch.equal(again(x), model(x))
    assert [id(p) for p in again.parameters()] == parameters  # an optimizer that holds them goes on


@pytest.mark.parametrize(
    ("there", "what"),
    [
        ({"oft_block_size": 2}, "the blocks of body.0, body.2 have another size"),
        ({"oft_block_size": 4, "exclude_modules": ["2"]}, "only one of them adapts body.2"),
        ({"oft_block_size": 4, "bias": "oft_only"}, "only one of them trains body.0.bias"),
        ({"oft_block_size": 4, "use_cayley_neumann": False}, "use_cayley_neumann is False there and True in the file"),
    ],
)
def test_another_adapter_of_the_same_name_is_not_overwritten(there: dict[str, Any], what: str, tmp_path: Path) -> None:
    model = _net()
    inject(model, OFTConfig(oft_block_size=4, target_modules=["body.0", "body.2"]))
    randomize(model)
    save_adapter(model, tmp_path)
    again = _net()
    inject(again, OFTConfig(**{"target_modules": ["body.0", "body.2"], **there}))
    before = {name: tensor.clone() for name, tensor in again.state_dict().items()}
    with pytest.raises(AdapterFileError, match=f"another adapter 'default' already, {what}; call unload"):
        load_adapter(again, tmp_path)
    assert all(torch.equal(tensor, before[name]) for name, tensor in again.state_dict().items())


def test_a_merged_model_loads_nothing(tmp_path: Path) -> None:
    model = _net()
    inject(model, OFTConfig(oft_block_size=4))
    save_adapter(model, tmp_path)
    merge(model)
    with pytest.raises(RuntimeError, match=r"cannot load an adapter: .* are merged"):
        load_adapter(model, tmp_path)
    unmerge(model)
    load_adapter(model, tmp_path)


def test_another_base_is_named_and_refused_unless_one_insists(tmp_path: Path) -> None:
    model = _net()
    inject(model, OFTConfig(oft_block_size=4))
    randomize(model)
    save_adapter(model, tmp_path)
    fingerprints = read_adapter(tmp_path).fingerprints
    assert fingerprints is not None
    again = _net()
    again.body[2].weight.data.add_(1)
    assert other_bases(walk(again), fingerprints) == ["body.2"]
    with pytest.raises(AdapterFileError, match=r"was trained on another base, body\.2 differ"):
        load_adapter(again, tmp_path)
    load_adapter(again, tmp_path, ignore_mismatched_base=True)
    assert other_bases(walk(again), fingerprints) == ["body.2"]
    assert other_bases(walk(_net().bfloat16()), fingerprints) == []


def test_a_tied_head_trains_its_embedding_and_both_are_written(tmp_path: Path) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.words, self.mix, self.head = nn.Embedding(9, 8), nn.Linear(8, 8), nn.Linear(8, 9, bias=False)
            self.head.weight = self.words.weight

        def forward(self, ids: Tensor) -> Tensor:
            logits: Tensor = self.head(self.mix(self.words(ids)))
            return logits

    ids = torch.arange(5)
    model = Tied()
    inject(model, OFTConfig(oft_block_size=4, target_modules=["mix"], modules_to_save=["head"]))
    _change(model)
    save_adapter(model, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["modules_to_save"] == ["head", "words"]
    again = Tied()
    load_adapter(again, tmp_path)
    assert torch.equal(again(ids), model(ids))
    assert again.head.weight is again.words.weight
    load_adapter(again, tmp_path)  # and over itself
    load_adapter(model, tmp_path)
    unload(again)
    assert torch.equal(again(ids), Tied()(ids))


def test_names_do_not_show_how_a_model_was_wrapped(tmp_path: Path) -> None:
    model, x = _net(), torch.randn(2, 8)
    inject(model, OFTConfig(oft_block_size=4))
    randomize(model)
    wrapped = nn.Sequential(torch.compile(model, backend="eager"))
    save_adapter(wrapped, tmp_path)
    assert set(read_adapter(tmp_path).generators()) == {f"0.{name}" for name in oft_layers(model)}
    again = nn.Sequential(_net())
    load_adapter(again, tmp_path)
    assert relative(again(x), model(x)) < 1e-6


def test_files_are_pefts_in_every_field_and_key(tmp_path: Path) -> None:
    model = _net()
    inject(model, OFTConfig(oft_block_size=4, target_modules="all-linear", modules_to_save=["head"], bias="oft_only"))
    save_adapter(model, tmp_path)
    names = ["README.md", "adapter_config.json", "adapter_model.safetensors"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    with safe_open(tmp_path / "adapter_model.safetensors", framework="pt") as tensors:
        assert tensors.metadata() == {"format": "pt"}
        keys = list(tensors.keys())
        shapes = {key.removeprefix("base_model.model."): tuple(tensors.get_slice(key).get_shape()) for key in keys}
    assert shapes["body.0.oft_R.weight"] == (2, 6)
    assert shapes["body.0.base_layer.bias"] == (12,)
    assert shapes["head.1.weight"] == (3, 8)
    raw = json.loads((tmp_path / "adapter_config.json").read_text())
    own = raw.pop("lightning_oft")
    assert raw == {
        "peft_type": "OFT", "task_type": None, "base_model_name_or_path": None, "revision": None, "inference_mode": True,
        "auto_mapping": {"base_model_class": "Net", "parent_library": Net.__module__}, "peft_version": "0.21.2",
        "r": 0, "oft_block_size": 4, "module_dropout": 0.0, "target_modules": ["body.0", "body.2"], "exclude_modules": None,
        "fan_in_fan_out": False, "bias": "oft_only", "init_weights": True, "layers_to_transform": None,
        "layers_pattern": None, "modules_to_save": ["head"], "coft": False, "eps": 6e-5, "block_share": False,
        "use_cayley_neumann": True, "num_cayley_neumann_terms": 6,
    }  # fmt: skip
    assert own["root"] == ""
    assert own["config"]["target_modules"] == "all-linear"
    assert set(own["fingerprint"]) == {"body.0", "body.2"}


def test_the_name_of_the_base_is_written_where_it_has_one(tmp_path: Path) -> None:
    task = Task()
    task.encoder.config._name_or_path = "some/bert"
    inject(task, OFTConfig(oft_block_size=4, target_modules=["query"]))
    assert json.loads(to_json(take(task), ""))["base_model_name_or_path"] == "some/bert"
    save_adapter(task, tmp_path)
    assert read_adapter(tmp_path).extra["base_model_name_or_path"] == "some/bert"


def test_an_unknown_adapter_and_broken_generators_are_not_written(tmp_path: Path) -> None:
    model = _net()
    with pytest.raises(ValueError, match="no adapter 'default' here; there are: none"):
        save_adapter(model, tmp_path / "a")
    inject(model, OFTConfig(oft_block_size=4))
    with pytest.raises(ValueError, match="no adapter 'other' here; there are: default"):
        save_adapter(model, tmp_path / "a", "other")
    model.body[0].oft_R["default"].weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"generators of body\.0 are NaN or infinite; nothing was written"):
        save_adapter(model, tmp_path / "a")
    assert not (tmp_path / "a").exists()
