"""Everything that is no adapter, or no adapter of this model, is one clear line, and the model stays as it was."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lightning_oft import OFTConfig, inject, load_adapter, oft_layers, save_adapter
from lightning_oft.formats import AdapterFileError, read_adapter

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
KEY = "base_model.model.body.oft_R.weight"


class Net(nn.Module):
    """One layer to adapt and one to train whole."""

    def __init__(self, width: int = 8, classes: int = 3) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Linear(width, 8)
        self.words = nn.Embedding(5, 8)
        self.attention = nn.MultiheadAttention(8, 2)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, classes)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.body(x))
        return logits


def _save(directory: Path) -> None:
    model = Net()
    inject(model, OFTConfig(oft_block_size=4, target_modules=["body"], modules_to_save=["head"]))
    model.body.oft_R["default"].weight.data.normal_(std=0.1)  # type: ignore[operator, union-attr, index]
    save_adapter(model, directory)


def _fields(**changes: Any) -> Callable[[Path], None]:
    """Change fields of the configuration; `...` takes one away. Our own key goes, as in a file of PEFT's."""

    def damage(directory: Path) -> None:
        raw = {**json.loads((directory / CONFIG).read_text()), "lightning_oft": ..., **changes}
        (directory / CONFIG).write_text(json.dumps({key: value for key, value in raw.items() if value is not ...}))

    return damage


def _tensors(change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> Callable[[Path], None]:
    """Change the tensors, as PEFT's file."""

    def damage(directory: Path) -> None:
        save_file(change(load_file(directory / TENSORS)), directory / TENSORS, {"format": "pt"})
        _fields()(directory)

    return damage


def _generator(tensor: Tensor) -> Callable[[Path], None]:
    return _tensors(lambda tensors: {**tensors, KEY: tensor})


def _renamed(old: str, new: str) -> Callable[[Path], None]:
    return _tensors(lambda tensors: {key.replace(old, new): value for key, value in tensors.items()})


def _bytes(file: str, change: Callable[[bytes], bytes], own: bool = False) -> Callable[[Path], None]:
    def damage(directory: Path) -> None:
        (directory / file).write_bytes(change((directory / file).read_bytes()))
        if not own and file == TENSORS:
            _fields()(directory)

    return damage


def _header(entry: dict[str, Any]) -> bytes:
    """A tensor file of a header alone."""
    header = json.dumps({KEY: entry}).encode()
    return struct.pack("<Q", len(header)) + header


def _huge(shape: list[int]) -> Callable[[Path], None]:
    entry = {"dtype": "F32", "shape": shape, "data_offsets": [0, 4 * shape[0] * shape[1]]}
    return _bytes(TENSORS, lambda _: _header(entry))


def _pickle_only(directory: Path) -> None:
    (directory / TENSORS).unlink()
    torch.save({}, directory / "adapter_model.bin")


def _own(**changes: Any) -> Callable[[Path], None]:
    def damage(directory: Path) -> None:
        raw = json.loads((directory / CONFIG).read_text())
        raw["lightning_oft"].update(changes)
        (directory / CONFIG).write_text(json.dumps(raw))

    return damage


def _flip(content: bytes) -> bytes:
    return content[:-5] + bytes([content[-5] ^ 0x10]) + content[-4:]


UNREADABLE: dict[str, tuple[Callable[[Path], None], str]] = {
    "json_cut": (_bytes(CONFIG, lambda content: content[:200]), "not a readable JSON file"),
    "json_deep": (_bytes(CONFIG, lambda _: b"[" * 200_000), "not a readable JSON file"),
    "json_huge_number": (_bytes(CONFIG, lambda _: b'{"r": ' + b"9" * 10_000 + b"}"), "not a readable JSON file"),
    "neither_size": (_fields(oft_block_size=0, r=0), "neither r nor oft_block_size is given"),
    "both_sizes": (_fields(r=2), "r=2 and oft_block_size=4 exclude each other"),
    "version_number": (_fields(peft_version=18), "peft_version=18 is no version"),
    "own_list": (_own(config=[]), "lightning_oft has a field of a wrong type"),
    "own_fingerprint": (_own(fingerprint={"body": 3}), "lightning_oft has a field of a wrong type"),
    "own_radius": (_own(config={"coft_radius": "mine"}), "coft_radius='mine': must be"),
    "own_newer": (_own(version=2), "written by a newer lightning_oft"),
    "bit_flip": (_bytes(TENSORS, _flip, own=True), "an interrupted write, or damaged since"),
    "truncated_peft": (_bytes(TENSORS, lambda content: content[:-10]), "not a whole safetensors file"),
    "declared_huge": (_huge([10**6, 496]), "not a whole safetensors file"),
    "declared_beyond": (_huge([2**31, 2**33]), "not a whole safetensors file"),
    "old_keys": (_renamed("oft_R", "oft_r"), "holds oft_r keys, so it was written by PEFT 0.15 or before"),
    "two_adapters": (
        _tensors(
            lambda t: {**t, KEY.replace("oft_R", "oft_R.a"): t[KEY] + 1, KEY.replace("oft_R", "oft_R.b"): t[KEY] + 2}
        ),
        "mean the same; save one adapter a file",
    ),
    "beyond_float32": (
        _generator(torch.full((2, 6), 1e300, dtype=torch.float64)),
        "oft_R.weight is NaN or infinite",
    ),
    "integers": (_generator(torch.ones(2, 6, dtype=torch.int64)), r"is torch.int64 of shape \(2, 6\), no generators"),
    "one_dimension": (_generator(torch.zeros(6)), r"of shape \(6,\), no generators of shape"),
    "no_blocks": (_generator(torch.zeros(0, 6)), r"of shape \(0, 6\), no generators of shape"),
    "nothing_to_turn": (_generator(torch.zeros(8, 0)), "all its blocks are of size 1"),
}
UNFIT: dict[str, tuple[Callable[[Path], None], Callable[[], nn.Module], str]] = {
    "shared_many": (_fields(block_share=True), Net, "the file's 2 blocks of 4 with one shared block turn another one;"),
    "not_shared": (_generator(torch.zeros(1, 6)), Net, "body has fan-in 8, the file's 1 blocks of 4 turn 4;"),
    "missing_tensor": (_renamed("head", "top"), Net, r"the model has no top\.\w+, top\.\w+;"),
    "no_linear": (_renamed("body", "norm"), Net, "norm is a LayerNorm, which this rotation does not fit"),
    "attention": (_renamed("body", "attention"), Net, "attention is a MultiheadAttention, which this rotation does not fit"),
    "embedding": (_renamed("body", "words"), Net, "words is a Embedding, the file holds a rotation of"),
    "no_embedding": (_renamed("oft_R", "oft_embedding_R"), Net, "body is a Linear, the file holds a rotation of a layer of type embedding"),
    "head_nan": (_tensors(lambda t: {**t, "base_model.model.head.bias": t["base_model.model.head.bias"] / 0}), Net, r"head\.bias is NaN"),
    "head_lost": (_tensors(lambda t: {k: v for k, v in t.items() if "head.bias" not in k}), Net, r"says that head\.bias were trained"),
    "bias_lost": (_fields(bias="oft_only"), Net, r"says that body\.bias were trained, and the file lacks them"),
    "head_integers": (
        _tensors(lambda t: {k: v.int() if "head" in k else v for k, v in t.items()}), Net, r"head\.\w+ is torch.int32, torch.float32 in"
    ),
    "meta": (_fields(), lambda: Net().to("meta"), "body is on the meta device"),
    "weight_norm": (_fields(), lambda: _normed(), "body cannot be adapted: its weight is parametrized"),
}  # fmt: skip


def _normed() -> nn.Module:
    model = Net()
    nn.utils.parametrizations.weight_norm(model.body)
    return model


def _one_line(error: BaseException) -> None:
    assert "\n" not in str(error)
    assert len(str(error)) < 600


@pytest.mark.parametrize("case", UNREADABLE.values(), ids=UNREADABLE)
def test_what_is_no_adapter_is_refused_in_one_line(case: tuple[Callable[[Path], None], str], tmp_path: Path) -> None:
    damage, message = case
    _save(tmp_path)
    damage(tmp_path)
    with pytest.raises(AdapterFileError, match=message) as caught:
        read_adapter(tmp_path)
    _one_line(caught.value)
    assert str(tmp_path) in str(caught.value)
    model = Net()
    with pytest.raises(AdapterFileError, match=message):
        load_adapter(model, tmp_path)
    assert oft_layers(model) == {}
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("case", UNFIT.values(), ids=UNFIT)
def test_what_does_not_fit_the_model_is_refused_and_leaves_it_alone(
    case: tuple[Callable[[Path], None], Callable[[], nn.Module], str], tmp_path: Path
) -> None:
    damage, build, message = case
    _save(tmp_path)
    damage(tmp_path)
    model = build()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(AdapterFileError, match=message) as caught:
        load_adapter(model, tmp_path)
    _one_line(caught.value)
    assert oft_layers(model) == {}
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert list(model.state_dict()) == list(before)
    assert all(value.is_meta or torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_the_undamaged_file_of_these_tables_is_read(tmp_path: Path) -> None:
    _save(tmp_path)
    assert list(read_adapter(tmp_path).generators()) == ["body"]
    assert load_adapter(Net(), tmp_path) == ["body"]
    _fields(unknown={"of": "a later PEFT"}, peft_version="0.22.0.dev0@abc", layers_pattern=[], exclude_modules=[])(
        tmp_path
    )
    contents = read_adapter(tmp_path)
    assert contents.extra["unknown"] == {"of": "a later PEFT"}
    assert (contents.root, contents.fingerprints) == (None, {})
    assert contents.config.neumann_series == "halved"
    assert load_adapter(Net(), tmp_path) == ["body"]


@pytest.mark.parametrize(("fields", "series"), [({"peft_version": ...}, "unhalved"),
    ({"peft_version": "0.18.0"}, "halved"), ({"peft_version": ..., "use_cayley_neumann": False}, "halved")])  # fmt: skip
def test_the_version_says_which_series(fields: dict[str, Any], series: str, tmp_path: Path) -> None:
    _save(tmp_path)
    _fields(**fields)(tmp_path)
    assert read_adapter(tmp_path).config.neumann_series == series


def test_fields_that_a_file_lacks_have_pefts_defaults(tmp_path: Path) -> None:
    _save(tmp_path)
    _fields(**dict.fromkeys(("num_cayley_neumann_terms", "eps", "bias", "coft", "r", "block_share"), ...))(tmp_path)
    assert read_adapter(tmp_path).config.num_cayley_neumann_terms == 5


def test_a_pattern_beside_layer_numbers_is_read_as_peft_does(tmp_path: Path) -> None:
    _save(tmp_path)
    _fields(target_modules="body", layers_to_transform=[0], layers_pattern="layers")(tmp_path)
    assert read_adapter(tmp_path).config.layers_to_transform is None


def test_a_layer_of_blocks_of_size_one_is_left_out_and_named(tmp_path: Path) -> None:
    _save(tmp_path)
    _tensors(lambda t: {**t, "base_model.model.words.oft_embedding_R.weight": torch.zeros(8, 0)})(tmp_path)
    with pytest.warns(UserWarning, match="words have blocks of size 1, which rotate nothing; left out"):
        assert load_adapter(Net(), tmp_path) == ["body"]


def test_no_directory_and_a_file_are_named(tmp_path: Path) -> None:
    with pytest.raises(AdapterFileError, match="nowhere: no such file or directory"):
        read_adapter(tmp_path / "nowhere")
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="file: is no checkpoint"):
        read_adapter(tmp_path / "file")


def test_a_directory_of_several_adapters_says_which_there_are(tmp_path: Path) -> None:
    for name in ("a", "b"):
        _save(tmp_path / name)
    with pytest.raises(AdapterFileError, match="there are adapters in a, b: give one of these directories"):
        load_adapter(Net(), tmp_path)
    assert load_adapter(Net(), tmp_path, "b") == ["body"]


def test_nothing_outside_the_directory_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _save(tmp_path / "adapter")
    _fields(base_model_name_or_path="/etc/passwd", auto_mapping={"parent_library": "antigravity"})(tmp_path / "adapter")
    opened: list[str] = []
    sys.addaudithook(lambda event, args: opened.append(str(args[0])) if event == "open" and recording else None)
    recording = True
    load_adapter(Net(), tmp_path / "adapter")
    recording = False
    assert "antigravity" not in sys.modules
    assert {path for path in opened if not path.startswith(str(tmp_path / "adapter"))} <= {os.devnull}


@pytest.mark.subprocess
def test_reading_imports_neither_lightning_nor_transformers(tmp_path: Path) -> None:
    _save(tmp_path)
    code = (
        "import sys; from lightning_oft.formats import read_adapter; print(read_adapter(sys.argv[1]).config.oft_block_size); "
        "print([name for name in ('lightning', 'transformers', 'peft') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[:2] == ["4", "[]"]
