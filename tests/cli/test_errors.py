"""A mistake is one line on standard error, exit code 2, no traceback; the line names the place and what would be right."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.utilities.exceptions import SIGTERMException

from lightning_oft.cli import main
from lightning_oft.cli.errors import UserError, is_user_error, one_line, suggestion

Write = Callable[..., str]


def error_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Run, expect exit code 2 and exactly one line on standard error; returns the line without its head."""
    capsys.readouterr()
    assert main(arguments) == 2
    said = capsys.readouterr()
    lines = said.err.splitlines()
    assert [line for line in lines if line.startswith("lightning-oft: error: ")] == lines
    assert len(lines) == 1
    assert "usage" not in said.out
    return lines[0].removeprefix("lightning-oft: error: ")


WRONG_VALUES: list[tuple[str, Any, list[str]]] = [
    ("oft.coft_epsilon", 1e-4, ["oft.coft_epsilon", "'oft.eps'"]),
    ("oft.target_module", "all-linear", ["oft.target_module", "'oft.target_modules'"]),
    ("oft.oft_block_size", "big", ["oft.oft_block_size", "whole number", "'big'"]),
    ("oft.target_modules", 3, ["oft.target_modules", "a string", "'3'"]),
    ("oft.keep_base", "alway", ["oft.keep_base", "did you mean 'always'"]),
    ("oft.enabled", "perhaps", ["oft.enabled", "true or false"]),
    ("oft.r", 4, ["r=4", "oft_block_size=16", "exclude each other"]),
    ("oft", 3, ["oft", "mapping", "3"]),
    ("oft", [1, 2], ["oft", "mapping", "a list"]),
    ("trainer", None, ["trainer", "mapping", "null"]),
    ("oft.task_type", "FOO", ["task_type='FOO'", "SEQ_CLS"]),
    ("model.init_args.optimizer.init_args.lr", -1.0, ["optimizer: Invalid learning rate: -1.0"]),
    ("otf.r", 3, ["otf.r", "did you mean 'oft'"]),
    ("optimizers.lr", 1, ["'optimizers.lr'", "'optimizer'"]),
    ("model.init_args.optimizer.class_path", "torch.optim.AdamV", ["model.init_args.optimizer", "AdamV", "'Adam'"]),
    ("model.init_args.optimizer.init_args.lrr", 3, ["optimizer.init_args.lrr", "AdamW", "'lr'"]),
    ("model.init_args.optimizer.init_args.lr", "fast", ["optimizer.init_args.lr", "a number", "'fast'"]),
    ("trainer.max_epoch", 3, ["trainer.max_epoch", "'trainer.max_epochs'"]),
    ("trainer.max_epochs", "three", ["trainer.max_epochs", "whole number", "'three'"]),
    ("trainer.logger", {"class_path": "CSVLoger"}, ["trainer.logger", "'CSVLogger'"]),
    ("trainer.callbacks", [{"class_path": "EarlyStoping"}], ["trainer.callbacks", "'EarlyStopping'"]),
    (
        "trainer.callbacks",
        [{"class_path": "ModelCheckpoint", "init_args": {"monitr": "val/loss"}}],
        ["monitr", "ModelCheckpoint", "'monitor'"],
    ),
    ("model.init_args.pretraned", "x", ["model.init_args.pretraned", "'pretrained'"]),
    ("model.pretrained", "x", ["model.pretrained", "'init_args.pretrained'"]),
    ("model.init_arg", {}, ["model.init_arg", "'init_args'"]),
    ("model.init_args.label_smoothing", "much", ["model.init_args.label_smoothing", "a number", "'much'"]),
    ("model.init_args.label_smoothing", 2.0, ["label_smoothing=2.0", "[0, 1)"]),
    ("model.init_args.pretrained", "no/such/folder", ["no/such/folder"]),
    ("model.class_path", "ImageClasification", ["model", "'ImageClassification'"]),
    ("model.class_path", "lightning_oft.tasks.ImageClass", ["model", "'ImageClassification'"]),
    ("model.class_path", "os.path.join", ["os.path.join", "LightningModule"]),
    ("data.init_args.batch_sise", 3, ["data.init_args.batch_sise", "'batch_size'"]),
    ("data.class_path", "DigitsModule", ["data", "'DigitsDataModule'"]),
    ("optimizer", {"class_path": "AdamWW"}, ["optimizer", "'AdamW'"]),
    ("optimizer", {"class_path": "AdamW", "init_args": {"lrr": 1}}, ["optimizer.init_args.lrr", "'lr'"]),
    ("seed_everything", "abc", ["seed_everything", "'abc'"]),
]


@pytest.mark.parametrize(("key", "value", "said"), WRONG_VALUES, ids=[f"{key}={v}"[:50] for key, v, _ in WRONG_VALUES])
def test_a_mistake_in_a_file_is_named(
    capsys: pytest.CaptureFixture[str], config_file: Write, key: str, value: Any, said: list[str]
) -> None:
    line = error_of(capsys, "fit", "--config", config_file({key: value}))
    assert [words for words in said if words not in line] == []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["fitt"], ["'fitt'", "'fit'"]),
        (["mrege", "--base", "x"], ["'mrege'", "'merge'"]),
        (["zzz"], ["'zzz'", "fit, validate, test, predict, merge, export, info"]),
        (["--verson"], ["'--verson'", "'--version'"]),
        (["--config", "x.yaml", "fit"], ["after the command", "fit --config"]),
        (["fit"], ["missing model", "--config FILE"]),
        (["fit", "--config"], ["--config", "expected one argument"]),
        (["fit", "--config", "no/such.yaml"], ["no/such.yaml"]),
        (["fit", "--model", "ImageClasification"], ["'ImageClassification'"]),
        (["fit", "--model.help", "ImageClasification"], ["'ImageClassification'"]),
        (["fit", "--trainer.max_epoch=3"], ["'trainer.max_epoch'", "'trainer.max_epochs'"]),
        (["fit", "--max_epochs", "3"], ["'max_epochs'", "'trainer.max_epochs'"]),
        (["fit", "three"], ["'three'", "--trainer.max_epochs 3"]),
        (["info"], ["info", "path"]),
        (["info", "no/such/place"], ["no/such/place"]),
        (["info", "x", "--layer-s"], ["'--layer-s'", "'--layers'"]),
        (["merge", "--bas", "x"], ["required", "--base"]),
        (["export", "--checkpoint", "no.ckpt", "--output", "x"], ["no.ckpt"]),
    ],
    ids=lambda value: " ".join(value)[:40],
)
def test_a_mistake_on_the_command_line_is_named(
    capsys: pytest.CaptureFixture[str], arguments: list[str], said: list[str]
) -> None:
    line = error_of(capsys, *arguments)
    assert [words for words in said if words not in line] == []


@pytest.mark.parametrize(("text", "said"), [("a: [1,", "not valid YAML at line"), ("words", "not a mapping")])
def test_a_file_that_is_no_configuration_is_named(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, text: str, said: str
) -> None:
    file = tmp_path / "broken.yaml"
    file.write_text(text, encoding="utf-8")
    line = error_of(capsys, "fit", "--config", str(file))
    assert said in line
    assert "broken.yaml" in line


def test_a_mistyped_file_name_gets_its_neighbour(capsys: pytest.CaptureFixture[str], config_file: Write) -> None:
    file = config_file()
    assert repr(file) in error_of(capsys, "fit", "--config", file.replace("config.yaml", "confg.yaml"))


def test_debug_brings_the_traceback_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIGHTNING_OFT_DEBUG", "1")
    with pytest.raises(UserError, match="unknown command"):
        main(["fitt"])


@pytest.mark.subprocess
def test_the_program_itself_fails_with_one_line(config_file: Write) -> None:
    command = [sys.executable, "-m", "lightning_oft.cli", "fit", "--config", config_file({"oft.coft_epsilon": 1})]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (run.returncode, run.stdout, run.stderr.count("\n")) == (2, "", 1)
    assert "oft.coft_epsilon" in run.stderr


@pytest.mark.parametrize(
    ("word", "candidates", "expected"),
    [
        ("trainer.max_epoch", ["trainer.max_epochs", "trainer.max_steps"], "'trainer.max_epochs'"),
        ("max_epochs", ["trainer.max_epochs", "oft.max_angle"], "'trainer.max_epochs'"),
        ("oft.coft_epsilon", ["oft.coft", "oft.eps", "oft.coft_radius", "oft.bias"], "'oft.coft' or 'oft.eps'"),
    ],
)
def test_suggestion_is_the_nearest(word: str, candidates: list[str], expected: str) -> None:
    assert suggestion(word, candidates) == f"; did you mean {expected}?"


@pytest.mark.parametrize("word", ["zzz", "", ".", "qqqqqqqq.wwwww"])
def test_nothing_near_suggests_nothing(word: str) -> None:
    assert suggestion(word, ["trainer.max_epochs", "oft.bias"]) == ""
    assert suggestion(word, []) == ""


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (UserError("x"), True),
        (FileNotFoundError(2, "No such file", "x"), True),
        (ModuleNotFoundError("diffusers"), True),
        (RuntimeError("shapes do not match"), False),
        (ValueError("from somebody's model"), False),
        (KeyError("x"), False),
    ],
)
def test_only_what_the_user_can_mend_loses_its_traceback(error: Exception, expected: bool) -> None:
    assert is_user_error(error) is expected


def test_an_error_that_the_package_raises_on_purpose_is_the_users() -> None:
    from lightning_oft import OFTConfig

    with pytest.raises(ValueError, match="exclude each other") as caught:
        OFTConfig(r=4, oft_block_size=8)
    assert is_user_error(caught.value)


def test_an_unexpected_error_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(arguments: list[str]) -> int:
        raise ZeroDivisionError

    monkeypatch.setattr("lightning_oft.cli._dispatch", fail)
    with pytest.raises(ZeroDivisionError):
        main(["fit"])


@pytest.mark.parametrize(
    ("stop", "code"),
    [(SystemExit(), 0), (SystemExit(1), 1), (SystemExit("why"), 1), (SIGTERMException(), 143)],
    ids=repr,
)
def test_a_stopped_run_has_an_exit_code(stop: SystemExit, code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def leave(arguments: list[str]) -> int:
        raise stop

    monkeypatch.setattr("lightning_oft.cli._dispatch", leave)
    assert main(["fit"]) == code


def test_one_line_is_one_line() -> None:
    assert one_line(ValueError("a\n  b\n\tc ")) == "a b c"
    assert one_line(FileNotFoundError(2, "No such file", "x")) == "x: No such file"
    assert one_line(ValueError()) == "ValueError"


@pytest.mark.parametrize("block", ["trainer: 3", "oft: [1, 2]", "oft: null"])
def test_a_later_file_does_not_throw_a_block_away(
    block: str, config_file: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "later.yaml").write_text(block + "\n")
    said = error_of(capsys, "fit", "--config", config_file(), "--config", str(tmp_path / "later.yaml"))
    assert f"later.yaml: {block.split(':')[0]}: expected a mapping of options" in said


@pytest.mark.parametrize("content", ["cut short", "text", "adapter"])
@pytest.mark.parametrize("command", ["validate", "fit"])
def test_a_file_that_is_no_checkpoint_is_one_line(
    command: str, content: str, config_file: Write, fitted: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "x.ckpt"
    whole = fitted.checkpoint.read_bytes()
    adapter = fitted.directory / "export" / "adapter" / "adapter_model.safetensors"
    file.write_bytes({"cut short": whole[:-500], "text": b"text", "adapter": adapter.read_bytes()}[content])
    said = error_of(capsys, command, "--config", config_file(), "--ckpt_path", str(file))
    assert "x.ckpt: is no checkpoint" in said


def test_an_adapters_checkpoint_without_oft_says_what_it_needs(
    config_file: Write, fitted: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    file = config_file({"oft.enabled": False})
    said = error_of(capsys, "validate", "--config", file, "--ckpt_path", str(fitted.checkpoint))
    assert "the checkpoint does not fit the model" in said
    assert "oft.enabled: true" in said


def test_the_configuration_wins_over_a_checkpoints_hyperparameters(
    config_file: Write, fitted: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    changes = {"model.init_args.pretrained": "no/such/folder"}
    said = error_of(capsys, "validate", "--config", config_file(changes), "--ckpt_path", str(fitted.checkpoint))
    assert "no/such/folder" in said
