"""Our own tasks under FSDP2, and fits by processes that the main process starts itself."""

from __future__ import annotations

from pathlib import Path

import datasets
import pytest
import torch
from launch import Runs
from safetensors.torch import load_file
from tasks_worker import Mixture, fit_experts, fit_vision
from text_worker import fit_recipe, fit_text
from torch import nn
from transformers import AutoModelForImageClassification, LlamaConfig, LlamaForCausalLM

from lightning_oft.tasks.sharding import blocks
from tests.quantized import package

pytestmark = [pytest.mark.distributed, pytest.mark.subprocess, pytest.mark.slow]


def largest_difference(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> float:
    assert left.keys() == right.keys()
    return max(float((left[name].double() - right[name].double()).abs().max()) for name in left)


def test_fsdp2_task_equals_one_process(runs: Runs, tmp_path: Path) -> None:
    first, second = (rank["task:vision"] for rank in runs.two)
    assert "error" not in first, first.get("trace")
    alone = fit_vision("auto", 1, 0, tmp_path)
    assert largest_difference(first["state"], second["state"]) == 0
    assert largest_difference(first["state"], alone["state"]) < 1e-6
    assert first["scores"] == second["scores"]
    for name, score in alone["scores"].items():
        assert first["scores"][name] == pytest.approx(score, abs=1e-6)


@pytest.mark.parametrize("name", ["text", "text-ddp", "dpo", "dpo-ddp", "grpo"])
def test_processes_learn_text_as_one_does_from_unlike_numbers_of_tokens(name: str, runs: Runs, tmp_path: Path) -> None:
    first, second = (rank[f"task:{name}"] for rank in runs.two)
    assert "error" not in first, first.get("trace")
    alone = fit_text("auto", 1, 0, tmp_path, name.partition("-")[0])
    assert largest_difference(first["state"], second["state"]) == 0
    assert largest_difference(first["state"], alone["state"]) < 1e-6
    assert first["scores"] == pytest.approx(alone["scores"], rel=1e-5)


@pytest.mark.filterwarnings("ignore::UserWarning:bitsandbytes")
@pytest.mark.parametrize("name", ["sft-ddp", "sft-fsdp2", "qoft-nf4-fsdp2"])
def test_a_recipe_learns_on_two_processes_as_on_one_and_resumes(
    name: str, runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if name.startswith("qoft"):
        package("nf4")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    first, second = (rank[f"task:{name}"] for rank in runs.two)
    assert "error" not in first, first.get("trace")
    assert "error" not in second, second.get("trace")
    alone = fit_recipe(name.rpartition("-")[0], "auto", 1, 0, tmp_path)
    assert alone[1] < alone[0] - 0.1
    assert first["losses"] == pytest.approx(alone, abs=1e-5)
    assert first["resumed"] == first["losses"][1:]
    whole, halves = (
        load_file(runs.output / name / part / "adapter" / "adapter_model.safetensors")
        for part in ("export", "halves/export")
    )
    assert largest_difference(whole, halves) == 0
    assert largest_difference(whole, load_file(tmp_path / "export" / "adapter" / "adapter_model.safetensors")) < 1e-6


@pytest.mark.parametrize(("name", "implementation"), [("experts", "grouped_mm"), ("experts-fsdp1", "eager")])
def test_sharded_experts_equal_one_process(name: str, implementation: str, runs: Runs, tmp_path: Path) -> None:
    first = runs.two[0][f"task:{name}"]
    assert "error" not in first, first.get("trace")
    alone = fit_experts("auto", 1, 0, tmp_path, implementation)["state"]
    assert largest_difference({key: first["state"][key] for key in alone}, alone) < 1e-6
    base = Mixture(implementation).state_dict()
    assert max(float((alone[key] - base[key]).abs().max()) for key in alone if "experts.down_proj" in key) > 1e-4


def test_experts_that_are_cut_are_refused(runs: Runs) -> None:
    said = runs.two[0]["task:experts-cut"].get("said", "")
    assert "experts: its experts are cut by tensor or expert parallelism" in said


def test_every_block_is_one_unit_and_stays_one(runs: Runs) -> None:
    first = runs.two[0]["task:vision"]
    layers = [f"model.vit.layers.{i}" for i in range(4)]
    assert first["units"] == ["model", *layers]  # the rotations have left with the merge
    assert first["units after"] == ["model", *layers]


def test_fsdp2_exports_a_plain_model(runs: Runs) -> None:
    output, first = runs.output, runs.two[0]["task:vision"]
    plain = AutoModelForImageClassification.from_pretrained(output / "vision" / "export" / "merged")
    trained = {name.removeprefix("model."): v for name, v in first["state"].items() if name.startswith("model.")}
    assert type(plain).__name__ == "ViTForImageClassification"
    assert largest_difference(plain.state_dict(), trained) == 0


def test_tensor_parallel_is_refused_with_the_remedy(runs: Runs) -> None:
    error = runs.two[0]["task:split"]["error"]
    assert "tensor_parallel_size=2" in error
    assert "data_parallel_size: 2" in error


def test_recipe_runs_through_the_command_line(runs: Runs) -> None:
    output, results = runs.output, [rank["task:recipe"] for rank in runs.two]
    assert [result.get("code", result) for result in results] == [0, 0]
    assert (output / "recipe" / "checkpoints" / "last.ckpt").is_file()
    AutoModelForImageClassification.from_pretrained(output / "recipe" / "export" / "merged")


def test_spawned_fits_bring_their_weights_home(runs: Runs) -> None:
    results = runs.forks
    alone = results["one process"]["state"]
    assert largest_difference(alone, results["one process"]["before"]) > 1e-3
    for method in ("fork", "spawn"):
        assert "error" not in results[method], results[method]["error"]
        assert results[method]["state"].keys() == results[method]["before"].keys()
        assert largest_difference(results[method]["state"], alone) < 1e-6
    # Its adapter on top of the weights that hold it already would turn them twice.
    assert "trained on another base" in results["fork"]["twice"]
    # Without the merge nothing could come home; nothing has been trained either.
    assert "merge_on_fit_end=True, or use strategy='ddp'" in results["refused"]["error"]
    assert largest_difference(results["refused"]["state"], results["refused"]["before"]) == 0


class Tied(nn.Module):
    """Two blocks, of which one lends its weight to the outside."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.ReLU()) for _ in range(3))
        self.head = nn.Linear(4, 4)
        self.head.weight = self.blocks[1][0].weight  # type: ignore[index, assignment]


def block_names(model: nn.Module) -> list[str]:
    found = blocks(model)
    return [name for name, module in model.named_modules() if module in found]


def test_blocks_are_the_repeated_layers_of_a_transformer() -> None:
    small = LlamaConfig(hidden_size=16, intermediate_size=16, num_attention_heads=2, vocab_size=8, num_hidden_layers=3)
    assert block_names(LlamaForCausalLM(small)) == [f"model.layers.{i}" for i in range(3)]
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2), 2, enable_nested_tensor=False)
    assert block_names(nn.Sequential(nn.Linear(8, 8), encoder)) == ["1.layers.0", "1.layers.1"]


@pytest.mark.parametrize(
    ("model", "names"),
    [
        (nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)), []),  # layers, not blocks
        (nn.Linear(4, 4), []),
        (Tied(), ["blocks.0", "blocks.2"]),  # a unit of its own would have a copy of the shared weight
    ],
)
def test_what_is_no_block_is_left_to_the_rest(model: nn.Module, names: list[str]) -> None:
    assert block_names(model) == names
