"""`fit` and its sisters: what they run, what they say, and the traps of the stock LightningCLI."""

from __future__ import annotations

import copy
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch import Tensor, nn

from lightning_oft import OFTConfig, OFTFinetuning, inject, oft_layers
from lightning_oft.cli import COMMANDS, main, tables
from lightning_oft.cli.application import Application
from lightning_oft.cli.tables import score_table
from lightning_oft.formats.checkpoint import NOTE
from lightning_oft.formats.pretrained import auto_class, loader_of

Write = Callable[..., str]


class Plain(LightningModule):
    """A model that configures no optimizer."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 10))

    def training_step(self, batch: dict[str, Tensor], _: int) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch["pixel_values"].flatten(1)[:, :64]), batch["labels"])

    def validation_step(self, batch: dict[str, Tensor], _: int) -> None:
        pass


BASE = Path(__file__).parents[2] / "examples" / "bases" / "digits-vit"
PLAIN = {"class_path": f"{__name__}.Plain"}


@pytest.fixture
def applications(monkeypatch: pytest.MonkeyPatch) -> list[Application]:
    """Every application that `main` builds; each stops before it runs its command."""
    built: list[Application] = []
    monkeypatch.setattr(Application, "_run_subcommand", lambda self, _: built.append(self))
    return built


def test_fit_prints_the_scores_before_and_after_and_how_to_load(fitted: Any) -> None:
    table, (adapter, merged) = fitted.said.splitlines()[:3], fitted.said.splitlines()[3:]
    assert [row.split()[0] for row in table[1:]] == ["before", "after"]
    assert "accuracy" in table[0]
    assert len({len(row) for row in table}) == 1, "the columns are aligned"
    assert f'PeftModel.from_pretrained(base_model, "{fitted.directory / "export" / "adapter"}")' in adapter
    assert f'AutoModelForImageClassification.from_pretrained("{fitted.directory / "export" / "merged"}")' in merged


def test_fit_writes_an_adapter_checkpoint_the_export_and_its_configuration(fitted: Any) -> None:
    checkpoint = torch.load(fitted.checkpoint, weights_only=True)
    assert all(".oft_R." in name for name in checkpoint["state_dict"] if name != NOTE)
    assert any(tensor.abs().sum() > 0 for tensor in checkpoint["state_dict"].values())
    assert {path.name for path in (fitted.directory / "export").iterdir()} == {"adapter", "merged"}
    beside = fitted.directory / "export" / "merged" / "preprocessor_config.json"
    assert beside.read_bytes() == (BASE / "preprocessor_config.json").read_bytes()
    saved = yaml.safe_load((fitted.directory / "config.yaml").read_text(encoding="utf-8"))
    assert saved["oft"]["oft_block_size"] == 16
    assert saved["trainer"]["max_epochs"] == 1, "options that --help leaves out are written too"


def test_predict_says_that_nothing_takes_the_predictions(
    config_file: Write, fitted: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    file = config_file({"trainer.limit_predict_batches": 1})
    assert main(["predict", "--config", file, "--ckpt_path", str(fitted.checkpoint)]) == 0
    assert "nothing was written" in capsys.readouterr().out


def test_a_second_fit_may_write_where_the_first_did(config_file: Write) -> None:
    file = config_file({"trainer.limit_train_batches": 1})
    assert main(["fit", "--config", file]) == 0
    assert main(["fit", "--config", file, "--trainer.max_epochs", "2"]) == 0


def test_an_adapter_is_scored_by_its_own_configuration(
    config_file: Write, fitted: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = ["--oft.pretrained_adapter", str(fitted.directory / "export" / "adapter")]
    assert main(["validate", "--config", config_file(), *adapter]) == 0
    assert main(["validate", "--config", config_file({"oft.oft_block_size": 8}), *adapter]) == 2
    assert "oft_block_size=8 (the file has 16)" in capsys.readouterr().err


def test_a_checkpoint_is_scored(config_file: Write, fitted: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["validate", "--config", config_file(), "--ckpt_path", str(fitted.checkpoint)]) == 0
    assert "accuracy" in capsys.readouterr().out


def test_the_same_task_runs_without_oft(config_file: Write, applications: list[Application]) -> None:
    assert main(["fit", "--config", config_file({"oft.enabled": False, "trainer.limit_train_batches": 1})]) == 0
    (application,) = applications
    application.trainer.fit(application.model, datamodule=application.datamodule)
    assert oft_layers(application.model) == {}
    assert all(parameter.requires_grad for parameter in application.model.model.parameters())


def test_oft_stands_before_callbacks_that_copy_the_model(config_file: Write, applications: list[Application]) -> None:
    assert main(["fit", "--config", config_file({"trainer.callbacks": [{"class_path": "EMAWeightAveraging"}]})]) == 0
    kinds = [type(callback) for callback in applications[0].trainer.callbacks]
    assert kinds.index(OFTFinetuning) < kinds.index(EMAWeightAveraging)


def test_an_optimizer_from_the_command_line_trains_the_rotations(
    config_file: Write, applications: list[Application]
) -> None:
    # The stock LightningCLI hands it parameters taken before the injection: exit code 0, and every generator still zero.
    file = config_file({"model": PLAIN, "oft.oft_block_size": 4, "oft.merge_on_fit_end": False})
    assert main(["fit", "--config", file, "--optimizer", "AdamW", "--optimizer.lr", "0.01"]) == 0
    (application,) = applications
    application.trainer.fit(application.model, datamodule=application.datamodule)
    layers = oft_layers(application.model)
    assert list(layers) == ["net.0", "net.2"]
    assert all(bool(layer.oft_R["default"].weight.abs().max() > 0) for layer in layers.values())  # type: ignore[index]


def test_a_model_without_an_optimizer_is_asked_for_one(config_file: Write, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", "--config", config_file({"model": PLAIN})]) == 2
    assert "Plain configures no optimizer; give one, as in --optimizer AdamW" in capsys.readouterr().err


@pytest.mark.parametrize(("optimizer", "decays"), [("AdamW", [0.01, 0.0]), ("SGD", [0.0, 0.0]), ("LBFGS", [None])])
def test_rotations_never_decay(
    config_file: Write, applications: list[Application], optimizer: str, decays: list[float | None]
) -> None:
    file = config_file({"model": PLAIN, "optimizer": {"class_path": optimizer, "init_args": {"lr": 0.1}}})
    assert main(["fit", "--config", file]) == 0
    model = applications[0].model
    inject(model, OFTConfig(oft_block_size=4, modules_to_save=["net.2"]))
    groups = model.configure_optimizers().param_groups
    assert [group.get("weight_decay") for group in groups] == decays
    turned = [p for name, p in model.named_parameters() if "oft_R" in name]
    decayed = [p for group in groups if group.get("weight_decay") for p in group["params"]]
    assert not {id(p) for p in turned} & {id(p) for p in decayed}
    assert sum(len(group["params"]) for group in groups) == len(turned) + 2


def test_the_lazy_optimizer_travels_with_the_model(config_file: Write, applications: list[Application]) -> None:
    file = config_file({"model": PLAIN, "optimizer": {"class_path": "SGD", "init_args": {"lr": 0.1}}})
    assert main(["fit", "--config", file]) == 0
    for other in (copy.deepcopy(applications[0].model), pickle.loads(pickle.dumps(applications[0].model))):
        (group,) = other.configure_optimizers().param_groups
        assert {id(p) for p in group["params"]} == {id(p) for p in other.parameters()}


@pytest.mark.parametrize("command", COMMANDS)
def test_help_is_readable(command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert main([command, "--help"]) == 0
    said = capsys.readouterr()
    assert said.err == ""
    assert said.out.startswith(f"usage: lightning-oft {command} ")
    assert f"example:\n  lightning-oft {command} " in said.out
    noise = ("Union[", "Optional[", "<class '", "known subclasses", ":paramref:", "`~")
    assert [words for words in noise if words in said.out] == []
    assert len(said.out.splitlines()) < 150
    assert max(map(len, said.out.splitlines())) <= 120


def test_help_of_fit_explains_the_adapter_and_points_to_the_trainer(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", "--help"]) == 0
    text = capsys.readouterr().out
    places = [
        text.index(words) for words in ("--oft.oft_block_size", "--model ", "--data ", "--ckpt_path", "--trainer.help")
    ]
    assert places == sorted(places)
    assert "Number of rotation blocks" in text
    assert "ImageClassification" in text
    assert "--trainer.accelerator" not in text


def test_help_of_the_trainer_is_a_page_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", "--trainer.help"]) == 0
    text = capsys.readouterr().out
    assert "--trainer.accelerator" in text
    assert "--oft.oft_block_size" not in text


def test_help_of_the_program_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in ([], ["--help"], ["-h"]):
        assert main(arguments) == 0
        text = capsys.readouterr().out
        assert [command for command in COMMANDS if f"\n  {command} " not in text] == []


def test_help_of_a_class_lists_its_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", "--model.help", "ImageClassification"]) == 0
    text = capsys.readouterr().out
    assert "--model.label_smoothing" in text
    assert text.startswith("usage: lightning-oft ")


@pytest.mark.parametrize(
    ("before", "after", "table"),
    [
        ({"test/acc": 0.5}, {"test/acc": 1.0}, ["           acc", "before  0.5000", "after   1.0000"]),
        (
            {"test/new/accuracy": 0.1, "test/new/loss": 3.0},
            {"test/new/accuracy": 0.25, "test/new/loss": 2.0},
            ["        new/accuracy", "before        0.1000", "after         0.2500"],
        ),
        (
            {"test_loss/dataloader_idx_1": 12345.0},
            {"test_loss/dataloader_idx_1": 1.5, "test_other": 2.0},
            ["            loss 1", "before  12345.0000", "after       1.5000"],
        ),
    ],
)
def test_score_table_is_aligned(before: dict[str, float], after: dict[str, float], table: list[str]) -> None:
    assert score_table(before, after).splitlines() == table


def test_table_of_a_test_has_a_row_for_each_set() -> None:
    assert tables.test_table({"test/acc": 0.5, "test_loss": 1.0}).splitlines() == [
        "         acc    loss",
        "test  0.5000  1.0000",
    ]
    assert tables.test_table({"test/a/acc": 0.5, "test/b/loss": 1.0}).splitlines() == [
        "      acc    loss",
        "a  0.5000",
        "b          1.0000",
    ]


def test_a_wide_score_table_has_rows_for_each_test_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "WIDEST", 20)
    before = {"test/new/accuracy": 0.1, "test/new/loss": 1.0, "test/old/loss": 2.0}
    assert score_table(before, {name: value + 1 for name, value in before.items()}, ("acc", "loss")).splitlines() == [
        "            accuracy    loss",
        "new before    0.1000  1.0000",
        "new after     1.1000  2.0000",
        "old before            2.0000",
        "old after             3.0000",
    ]


@pytest.mark.parametrize(
    ("architecture", "auto"),
    [
        ("ViTForImageClassification", "AutoModelForImageClassification"),
        ("LlamaForCausalLM", "AutoModelForCausalLM"),
        ("BertModel", "AutoModel"),
        ("NobodysModel", "NobodysModel"),
    ],
)
def test_loader_is_the_auto_class_that_people_type(architecture: str, auto: str) -> None:
    assert auto_class(architecture) == auto


def test_loader_of_a_directory(tmp_path: Path) -> None:
    assert loader_of(tmp_path) == ""
    (tmp_path / "config.json").write_text('{"_class_name": "UNet2DConditionModel"}', encoding="utf-8")
    assert loader_of(tmp_path) == "UNet2DConditionModel"


def test_a_module_of_the_working_directory_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "own_task.py").write_text("import lightning as L\nclass Own(L.LightningModule):\n    pass\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    assert (
        main(["fit", "--model", "own_task.Own", "--data", "lightning_oft.data.DigitsDataModule", "--print_config"]) == 0
    )
    assert "own_task.Own" in capsys.readouterr().out
