"""The recipes of diffusion through the command line, with tiny pipelines in the place of the real ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusion_models as tiny
import pytest
import torch
import yaml
from diffusion_models import SIZE, diffusers
from PIL import Image
from safetensors.torch import load_file

from lightning_oft import OFTConfig, inject, merge, save_adapter, unload
from lightning_oft.cli import main
from lightning_oft.cli.application import loading_line
from lightning_oft.tasks import ControlledTextToImage

ROOT = Path(__file__).parents[2]
JUDGE = ROOT / "examples" / "bases" / "drawn-judges" / "shape"
RECIPES = {
    "diffusion-dreambooth-sd15": "sd",
    "diffusion-sdxl": "sdxl",
    "diffusion-sd3": "sd3",
    "diffusion-flux": "flux",
}
SAMPLING = {"num_inference_steps": 2, "height": SIZE, "width": SIZE}

pytestmark = [
    pytest.mark.filterwarnings("ignore:PEFT cannot represent the rotations of"),
    # The paper's radius grows with the block, and the blocks of a tiny pipeline are tiny.
    pytest.mark.filterwarnings("ignore:the constraint lets .* turn by at most"),
]


def words(changes: dict[str, Any]) -> list[str]:
    return [word for name, value in changes.items() for word in (f"--{name}", str(value))]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two pictures with prompts, where the recipes look for them."""
    folder = tmp_path / "path" / "to" / "pictures"
    folder.mkdir(parents=True)
    for number in range(2):
        Image.new("RGB", (20, 16), (90 * number, 120, 0)).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"sks picture {number}")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_trains_a_tiny_pipeline_that_samples_afterwards(
    name: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = ROOT / "configs" / "recipes" / f"{name}.yaml"
    written = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    base = tiny.save(RECIPES[name], place / "base")
    changes = {
        "model.init_args.pretrained": base,
        "model.init_args.sampling": json.dumps(SAMPLING),
        "data.init_args.size": SIZE,
        "oft.export_dir": "out",
        "trainer.max_steps": 2,
        "trainer.accelerator": "cpu",
        "trainer.logger": "false",
        "trainer.enable_progress_bar": "false",
        "trainer.enable_model_summary": "false",
    }
    if "class_pictures" in written["data"]["init_args"]:
        changes["data.init_args.class_pictures"] = 2
        changes["trainer.val_check_interval"] = 2
        (place / "asked.jsonl").write_text('{"prompt": "a sks dog"}\n{"prompt": "a cat"}\n')
        changes["data.init_args.test_prompts"] = json.dumps({"asked": "asked.jsonl"})
        changes["model.init_args.evaluators"] = json.dumps({"dino": str(JUDGE)})
    else:
        changes |= {"data.init_args.num_workers": 0, "data.init_args.val_fraction": 0.5, "oft.oft_block_size": 4}
    keeping = ["--trainer.callbacks+=ModelCheckpoint", "--trainer.callbacks.every_n_train_steps=1"]
    keeping += ["--trainer.callbacks.save_top_k=-1", "--trainer.callbacks.dirpath=kept"]
    keeping += ["--trainer.callbacks.filename={step}"]
    assert main(["fit", "--config", str(recipe), *words(changes), *keeping]) == 0
    said = capsys.readouterr().out
    assert "before and after            out/before_after.png" in said
    resumed = words({**changes, "oft.export_dir": "again", "ckpt_path": "kept/step=1.ckpt"})
    assert main(["fit", "--config", str(recipe), *resumed, *keeping]) == 0
    capsys.readouterr()
    straight, after = (load_file(f"{one}/adapter/adapter_model.safetensors") for one in ("out", "again"))
    assert all(torch.equal(value, after[key]) for key, value in straight.items())
    if "data.init_args.test_prompts" in changes:
        titles, before, after = (line.split() for line in said.splitlines()[:3])
        assert (titles, before[0], before[2], after[0]) == (["DINO", "drift"], "before", "0.0000", "after")
        again = ["--config", str(recipe), *words(changes), "--oft.pretrained_adapter", "out/adapter"]
        assert main(["test", *again]) == 0
        table = [line.split() for line in capsys.readouterr().out.splitlines()]
        assert table == [titles, ["test", *after[1:]]]
    assert f"load the adapter with       {loading_line(Path('out/adapter'))}" in said
    dtype = written["model"]["init_args"].get("dtype", "float32")
    told = "" if dtype == "float32" else f", dtype=torch.{dtype}"
    assert f'load the merged model with  DiffusionPipeline.from_pretrained("out/merged"{told})' in said
    assert said.count("load the merged model") == 1
    options = {"dtype": getattr(torch, dtype)}
    merged, plain = (diffusers.DiffusionPipeline.from_pretrained(path, **options) for path in ("out/merged", base))
    assert type(merged) is type(plain)
    pictures = []
    for pipeline in (merged, plain):
        pipeline.set_progress_bar_config(disable=True)
        pictures.append(pipeline(["a"], generator=[torch.Generator().manual_seed(0)], **SAMPLING).images[0])
    assert pictures[0].size == (SIZE, SIZE)
    weights = [getattr(one, written["oft"]["module"]).state_dict() for one in (merged, plain)]
    assert any(not torch.equal(value, weights[1][key]) for key, value in weights[0].items())


@pytest.mark.parametrize("shows", [True, False], ids=["with_prompts", "as_it_is"])
def test_the_recipe_of_control_trains_a_tiny_pipeline_that_draws_along_outlines_afterwards(
    shows: bool, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, folder = ROOT / "configs" / "recipes" / "diffusion-control.yaml", place / "path" / "to" / "pictures"
    rows = [{"file_name": f"{n}.png", "conditioning_image": f"{1 - n}.png", "text": f"picture {n}"} for n in range(2)]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    outline = folder / "0.png"
    changes = {
        "model.init_args.pretrained": tiny.save("sd", place / "base"),
        "model.init_args.sampling": json.dumps(SAMPLING),
        "data.init_args.data": folder,
        "data.init_args.size": SIZE,
        "data.init_args.num_workers": 0,
        "data.init_args.val_fraction": 0.5,
        "oft.export_dir": "out",
        "trainer.max_epochs": 1,
        "trainer.accelerator": "cpu",
        "trainer.logger": "false",
        "trainer.enable_progress_bar": "false",
        "trainer.enable_model_summary": "false",
    }
    if shows:
        changes |= {"model.init_args.prompts": "[a circle]", "model.init_args.controls": f"[{outline}]"}
    assert main(["fit", "--config", str(recipe), *words(changes)]) == 0
    said = capsys.readouterr().out
    assert ("before and after            out/before_after.png" in said) == shows
    assert 'load the merged model with  lightning_oft.tasks.ControlledTextToImage("out/merged")' in said
    task = ControlledTextToImage("out/merged", sampling=SAMPLING)
    assert task.sample(["a circle"], [0], [Image.open(outline)])[0].size == (SIZE, SIZE)
    again = {**changes, "oft.pretrained_adapter": "out/adapter", "oft.magnitude": "after", "oft.export_dir": "scaled"}
    assert main(["fit", "--config", str(recipe), *words(again)]) == 0
    first, scaled = (load_file(f"{name}/adapter/adapter_model.safetensors") for name in ("out", "scaled"))
    assert all(torch.equal(value, scaled[key]) for key, value in first.items() if key.endswith("oft_R.weight"))
    assert any(bool(value.any()) for key, value in scaled.items() if key.endswith("oft_R.magnitude"))


@pytest.mark.nightly
def test_the_example_learns_its_subject_in_scenes_where_it_was_never_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two and a half minutes of CPU time."""
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    quiet = {"trainer.accelerator": "cpu", "trainer.enable_progress_bar": "false"}
    assert main(["fit", "--config", str(ROOT / "configs" / "diffusion.yaml"), *words(quiet)]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    names = next(line for line in lines if line and line[0].endswith("_accuracy"))
    before, after = (
        dict(zip(names, map(float, line[1:]), strict=True))
        for line in lines
        if len(line) == len(names) + 1 and line[0] in ("before", "after")
    )
    for scenes in ("seen", "unseen"):
        assert before[f"{scenes}/shape_accuracy"] <= 0.05
        assert after[f"{scenes}/shape_accuracy"] >= 0.8
        assert after[f"{scenes}/scene_accuracy"] >= 0.7
    assert after["old/shape_accuracy"] >= before["old/shape_accuracy"] - 0.1
    pipeline = diffusers.DiffusionPipeline.from_pretrained("runs/diffusion/merged")
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline("a sks on the sea", num_inference_steps=2).images[0].size == (32, 32)


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_merge_makes_a_whole_pipeline_of_the_adapters_of_its_parts(
    family: str, dtype: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, output = tmp_path / "base", tmp_path / "merged"
    pipeline = tiny.pipeline(family)
    pipeline.save_pretrained(base)
    parts = ["unet", "text_encoder"] + ["text_encoder_2"] * (family == "sdxl")
    for part in parts:
        turn(getattr(pipeline, part), tmp_path / part)
    adapters = [str(tmp_path / part) for part in parts]
    options = ["--dtype", dtype] if dtype else []
    assert main(["merge", "--base", str(base), "--adapter", *adapters, "--output", str(output), *options]) == 0
    said = capsys.readouterr().out
    assert f"{output}: {' and '.join(sorted(parts))} with the rotations of " in said
    assert f'load it with  DiffusionPipeline.from_pretrained("{output}")' in said
    written = diffusers.DiffusionPipeline.from_pretrained(output)
    assert type(written) is type(pipeline)
    plain = diffusers.DiffusionPipeline.from_pretrained(base)
    for name, part in written.components.items():
        if isinstance(part, torch.nn.Module):
            ours, theirs, before = (getattr(one, name).state_dict() for one in (pipeline, written, plain))
            near = {"rtol": 1e-2, "atol": 1e-2} if dtype else {"rtol": 1e-6, "atol": 1e-6}
            torch.testing.assert_close(theirs, ours, check_dtype=False, **near)
            assert all(torch.equal(theirs[key], before[key]) for key in before) is (name == "vae" and not dtype)
    files = {file.relative_to(base).as_posix() for file in base.rglob("*") if file.is_file()}
    assert files == {file.relative_to(output).as_posix() for file in output.rglob("*") if file.is_file()}
    if dtype:
        tensors = load_file(output / "vae" / "diffusion_pytorch_model.safetensors")
        assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}


def turn(model: torch.nn.Module, adapter: Path) -> None:
    """Give a model rotations, write them, and merge."""
    inject(model, OFTConfig(oft_block_size=4, target_modules="all-linear"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "oft_R" in name:
                parameter.normal_(0, 0.05)
    save_adapter(model, adapter)
    merge(model)
    unload(model)


def test_an_adapter_of_several_parts_and_what_does_not_fit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = tmp_path / "base"
    pipeline = tiny.pipeline("sd")
    pipeline.unet.to(torch.bfloat16)
    pipeline.save_pretrained(base)
    whole = torch.nn.ModuleDict({"unet": pipeline.unet, "text_encoder": pipeline.text_encoder})
    turn(whole, tmp_path / "whole")

    def merged(output: str, *adapters: str, base: Path = base) -> tuple[int, str]:
        given = [str(tmp_path / adapter) for adapter in adapters]
        code = main(["merge", "--base", str(base), "--adapter", *given, "--output", str(tmp_path / output)])
        return code, capsys.readouterr().err

    assert merged("one", "whole") == (0, "")
    written = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "one")
    for part in ("unet", "text_encoder"):
        ours, theirs = (getattr(one, part).state_dict() for one in (pipeline, written))
        torch.testing.assert_close(theirs, ours, check_dtype=False)
    tensors = load_file(tmp_path / "one" / "unet" / "diffusion_pytorch_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    code, said = merged("two", "whole", base=tmp_path / "one")
    assert code == 2
    assert "the adapter was trained on another base" in said
    code, said = merged("three", "whole", "whole", base=base / "unet")
    assert (code, said.count("\n")) == (2, 1)
    assert "is one model, of which one adapter is merged at a time" in said
    turn(torch.nn.Sequential(torch.nn.Linear(8, 8)), tmp_path / "other")
    code, said = merged("four", "other")
    assert code == 2
    assert f"{tmp_path / 'other'}: " in said
    assert not any((tmp_path / name).exists() for name in ("two", "three", "four"))
