"""`info`, `export` and `merge`: files in, files out, no Trainer."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageClassification

from lightning_oft import OFTConfig, inject, save_adapter
from lightning_oft.cli import main


@pytest.fixture(scope="module")
def exported(fitted: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The adapter of the fit's checkpoint, as `export` writes it."""
    output: Path = tmp_path_factory.mktemp("exported") / "adapter"
    assert main(["export", "--checkpoint", str(fitted.checkpoint), "--output", str(output)]) == 0
    return output


def weights(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / "model.safetensors")


def test_export_writes_what_the_fit_wrote(exported: Path, fitted: Any) -> None:
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (exported / file).read_bytes() == (fitted.directory / "export" / "adapter" / file).read_bytes()


@pytest.mark.parametrize("source", ["adapter directory", "checkpoint"])
def test_merge_is_the_model_that_the_fit_merged(
    source: str, fitted: Any, exported: Path, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    places = {"adapter directory": fitted.directory / "export" / "adapter", "checkpoint": fitted.checkpoint}
    output = tmp_path / "merged"
    arguments = ["--base", str(base), "--adapter", str(places.get(source, exported)), "--output", str(output)]
    assert main(["merge", *arguments]) == 0
    assert f'AutoModelForImageClassification.from_pretrained("{output}")' in capsys.readouterr().out
    torch.testing.assert_close(weights(output), weights(fitted.directory / "export" / "merged"), rtol=0, atol=1e-6)
    assert {path.name for path in base.glob("*.json")} <= {path.name for path in output.iterdir()}
    AutoModelForImageClassification.from_pretrained(output)


def test_merge_replaces_a_model_when_asked_and_nothing_else_ever(
    exported: Path, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def merge(output: Path, *options: str, base: Path = base, adapter: Path = exported) -> tuple[int, str]:
        code = main(["merge", "--base", str(base), "--adapter", str(adapter), "--output", str(output), *options])
        return code, capsys.readouterr().err

    place = tmp_path / "place"
    assert merge(place) == (0, "")
    (place / "stale.bin").touch()
    code, said = merge(place)
    assert code == 2
    assert "--overwrite" in said
    assert merge(place, "--overwrite") == (0, "")
    assert not (place / "stale.bin").exists()
    if os.name == "posix":
        assert {file.stat().st_mode & 0o777 for file in place.iterdir()} == {0o644}

    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "thesis.txt").touch()
    own_base, own_adapter = shutil.copytree(base, tmp_path / "base"), shutil.copytree(exported, tmp_path / "adapter")
    for output, options, message in (
        (tmp_path / "precious", {}, "holds something else than a model"),
        (own_base, {"base": own_base}, "would replace --base"),
        (own_adapter, {"adapter": own_adapter}, "would replace --adapter"),
        (tmp_path, {"base": own_base}, "would replace --base"),
    ):
        before = sorted(tmp_path.rglob("*"))
        code, said = merge(output, "--overwrite", **options)
        assert code == 2
        assert message in said
        assert sorted(tmp_path.rglob("*")) == before


def test_merge_refuses_another_base_unless_asked(
    exported: Path, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = shutil.copytree(base, tmp_path / "other")
    tensors = {name: torch.randn_like(tensor) for name, tensor in weights(other).items()}
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    arguments = ["merge", "--base", str(other), "--adapter", str(exported), "--output", str(tmp_path / "merged")]
    assert main(arguments) == 2
    said = capsys.readouterr().err
    assert "was trained on another base" in said
    assert "--any-base" in said
    assert said.count("\n") == 1
    assert main([*arguments, "--any-base"]) == 0


@pytest.mark.parametrize("file", ["model.safetensors", "config.json"])
def test_merge_names_a_damaged_base(
    file: str, exported: Path, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damaged = shutil.copytree(base, tmp_path / "damaged")
    (damaged / file).write_bytes((damaged / file).read_bytes()[:-100])
    assert main(["merge", "--base", str(damaged), "--adapter", str(exported), "--output", str(tmp_path / "m")]) == 2
    assert f"the base '{damaged}' cannot be loaded" in capsys.readouterr().err


def test_an_empty_output_is_not_this_directory(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["merge", "--base", "b", "--adapter", "a", "--output", ""]) == 2
    assert "--output: is empty" in capsys.readouterr().err


def test_merge_takes_a_head_with_other_classes(exported: Path, base: Path, tmp_path: Path) -> None:
    adapter, output = tmp_path / "adapter", tmp_path / "merged"
    adapter.mkdir()
    config = json.loads((exported / "adapter_config.json").read_text(encoding="utf-8"))
    own = config.pop("lightning_oft")
    assert own["root"] == "model"
    config["target_modules"].remove("classifier")
    config["modules_to_save"] = ["classifier"]
    tensors = load_file(exported / "adapter_model.safetensors")
    tensors.pop("base_model.model.classifier.oft_R.weight")
    width = weights(base)["classifier.weight"].shape[1]
    head = {"weight": torch.randn(3, width), "bias": torch.randn(3)}
    tensors.update({f"base_model.model.classifier.{name}": tensor for name, tensor in head.items()})
    save_file(tensors, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    (adapter / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    assert main(["merge", "--base", str(base), "--adapter", str(adapter), "--output", str(output)]) == 0
    torch.testing.assert_close(weights(output)["classifier.weight"], head["weight"])
    assert AutoModelForImageClassification.from_pretrained(output).config.num_labels == 3


def test_export_replaces_an_adapter_when_asked_and_nothing_else_ever(
    fitted: Any, exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def export(output: Path, *options: str) -> tuple[int, str]:
        code = main(["export", "--checkpoint", str(fitted.checkpoint), "--output", str(output), *options])
        return code, capsys.readouterr().err

    place = Path(shutil.copytree(exported, tmp_path / "adapter"))
    (place / "adapter_model.safetensors").write_text("mine")
    code, said = export(place)
    assert (code, (place / "adapter_model.safetensors").read_text()) == (2, "mine")
    assert "holds an adapter already; --overwrite replaces it" in said
    assert export(place, "--overwrite") == (0, "")
    assert (place / "adapter_model.safetensors").read_bytes() == (exported / "adapter_model.safetensors").read_bytes()
    (tmp_path / "taken").write_text("mine")
    (tmp_path / "empty").mkdir()
    assert "holds something else than an adapter: give another directory" in export(tmp_path, "--overwrite")[1]
    assert "is a file: give another directory" in export(tmp_path / "taken", "--overwrite")[1]
    assert export(tmp_path / "empty") == (0, "")


@pytest.mark.parametrize("command", ["export", "merge"])
def test_a_name_is_asked_of_a_checkpoint_and_of_a_directory_of_directories(
    command: str, exported: Path, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(place: Path) -> int:
        source = ["--checkpoint", str(place)] if command == "export" else ["--base", str(base), "--adapter", str(place)]
        return main([command, *source, "--output", str(tmp_path / "out"), "--adapter-name", "style"])

    shutil.copytree(exported, tmp_path / "both" / "style")
    assert run(exported) == 2
    assert "its files say no name: leave 'style' out" in capsys.readouterr().err
    assert run(tmp_path / "both") == 0


def test_one_layer_is_no_layers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(8, 8))
    inject(model, OFTConfig(oft_block_size=4))
    save_adapter(model, tmp_path / "adapter")
    assert main(["export", "--checkpoint", str(tmp_path / "adapter"), "--output", str(tmp_path / "again")]) == 0
    assert "rotations of 1 layer\n" in capsys.readouterr().out


def test_info_names_one_layer_for_the_fingerprint_whatever_it_reads(
    fitted: Any, exported: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = set()
    for place in (exported, fitted.directory / "export" / "adapter", fitted.checkpoint):
        assert main(["info", str(place)]) == 0
        found |= {line for line in capsys.readouterr().out.splitlines() if "fingerprint" in line}
    assert len(found) == 1


@pytest.mark.parametrize("kind", ["directory", "checkpoint"])
def test_info_says_what_is_inside(kind: str, fitted: Any, exported: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", str(exported if kind == "directory" else fitted.checkpoint), "--layers"]) == 0
    text = capsys.readouterr().out
    for words in ("25 (blocks x block size: ", "21 of 4 x 16", "17,760 in rotations", "oft_block_size=16", "float32:"):
        assert words in text
    (turn,) = [float(line.split()[1]) for line in text.splitlines() if line.strip().startswith("angle")]
    assert 0 < turn < 90
    (error,) = [float(line.split()[1]) for line in text.splitlines() if line.strip().startswith("error")]
    assert 0 < error < 1e-3
    assert sum("vit.layers." in line and " 4    16 " in line for line in text.splitlines()) == 20


def test_info_of_a_merged_or_plain_checkpoint(fitted: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = torch.load(fitted.checkpoint, weights_only=True)
    plain = {"state_dict": {"net.weight": torch.zeros(2, 2)}, "epoch": 1, "global_step": 2}
    torch.save(plain, tmp_path / "plain.ckpt")
    assert main(["info", str(tmp_path / "plain.ckpt")]) == 0
    assert "without an adapter; epoch 1, step 2" in capsys.readouterr().out
    checkpoint["lightning_oft"]["merged"] = True
    checkpoint["state_dict"] = plain["state_dict"]
    torch.save(checkpoint, tmp_path / "merged.ckpt")
    assert main(["info", str(tmp_path / "merged.ckpt")]) == 0
    assert "their rotations are in the weights already" in capsys.readouterr().out


@pytest.mark.parametrize("damage", ["merged", "plain", "two adapters", "another name", "no checkpoint"])
def test_export_refuses_what_holds_no_adapter(
    damage: str, fitted: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint: Any = torch.load(fitted.checkpoint, weights_only=True)
    adapters = checkpoint["lightning_oft"]["adapters"]
    expected, more = {
        "merged": ("merged model", []),
        "plain": ("no adapter in it", []),
        "two adapters": ("holds default, second: give the name of one", []),
        "another name": ("holds default: give the name of one", ["--adapter-name", "defualt"]),
        "no checkpoint": ("no state_dict", []),
    }[damage]
    if damage == "merged":
        checkpoint["lightning_oft"]["merged"] = True
    elif damage == "plain":
        del checkpoint["lightning_oft"]
    elif damage == "two adapters":
        adapters["second"] = adapters["default"]
        state = checkpoint["state_dict"]
        state |= {name.replace(".oft_R.default.", ".oft_R.second."): tensor for name, tensor in state.items()}
    elif damage == "no checkpoint":
        checkpoint = {"weights": torch.zeros(1)}
    torch.save(checkpoint, tmp_path / "x.ckpt")
    output = tmp_path / "adapter"
    assert main(["export", "--checkpoint", str(tmp_path / "x.ckpt"), "--output", str(output), *more]) == 2
    assert expected in capsys.readouterr().err
    assert not output.exists()


@pytest.mark.subprocess
def test_info_imports_neither_lightning_nor_transformers(exported: Path) -> None:
    code = (
        "import sys; from lightning_oft.cli import main\n"
        f"assert main(['info', {str(exported)!r}]) == 0\n"
        "assert not {'lightning', 'pytorch_lightning', 'transformers', 'peft'} & set(sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (run.returncode, run.stderr) == (0, "")
