"""A mistake is one line on standard error and exit code 2; the line names the key and, where one is near, the right one."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.utilities.exceptions import SIGTERMException

from lightning_oft import OFTConfig
from lightning_oft.cli import main
from lightning_oft.cli.errors import UserError, is_user_error, one_line, suggestion
from lightning_oft.data import TextDataModule

Write = Callable[..., str]


def error_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Run, expect exit code 2 and exactly one line on standard error; returns that line."""
    capsys.readouterr()
    assert main(arguments) == 2
    said = capsys.readouterr()
    (line,) = said.err.splitlines()
    assert line.startswith("lightning-oft: error: ")
    assert "usage" not in said.out
    return line


MISTAKES: list[tuple[str, Any, list[str]]] = [
    # an unknown key
    ("oft.coft_epsilon", 1e-4, ["oft.coft_epsilon", "'oft.eps'"]),
    ("otf.r", 3, ["otf.r", "'oft.r'"]),
    ("optimizers.lr", 1, ["optimizers.lr", "'optimizer'"]),
    ("trainer.max_epoch", 3, ["trainer.max_epoch", "'trainer.max_epochs'"]),
    # an unknown argument of a class
    ("model.init_args.pretraned", "x", ["model", "'pretraned'", "'pretrained'"]),
    ("model.init_args.optimizer.init_args.lrr", 3, ["optimizer", "'lrr'", "'lr'"]),
    ("optimizer", {"class_path": "AdamW", "init_args": {"lrr": 1}}, ["optimizer", "'lrr'", "'lr'"]),
    (
        "optimizer",
        {"class_path": "AdamW", "init_args": {"learning_rate": 1}},
        ["'learning_rate'", "AdamW takes lr, betas"],
    ),
    ("model.init_args.optimizer.init_args.learning_rate", 1, ["'learning_rate'", "AdamW takes lr, betas"]),
    ("trainer.callbacks", [{"class_path": "ModelCheckpoint", "init_args": {"monitr": "x"}}], ["'monitr'", "'monitor'"]),
    ("model.pretrained", "x", ["model", "'pretrained'"]),
    ("model.init_arg", {}, ["model", "'init_arg'"]),
    # an unknown class
    ("model.class_path", "ImageClasification", ["model", "'ImageClassification'"]),
    ("model.class_path", "os.path.join", ["model", "os.path.join", "LightningModule"]),
    ("data.class_path", "DigitsModule", ["data", "'DigitsDataModule'"]),
    ("optimizer", {"class_path": "AdamWW"}, ["optimizer", "'AdamW'"]),
    ("optimizer", {"class_path": "adamw"}, ["optimizer", "did you mean 'AdamW'?"]),
    ("model.init_args.optimizer.class_path", "torch.optim.AdamV", ["optimizer", "AdamV", "'Adam'"]),
    ("trainer.callbacks", [{"class_path": "EarlyStoping"}], ["trainer.callbacks", "'EarlyStopping'"]),
    # a wrong type
    ("oft.oft_block_size", "big", ["oft.oft_block_size", "int", "big"]),
    ("oft.keep_base", "alway", ["oft.keep_base", "'always'", "alway"]),
    ("model.init_args.label_smoothing", "much", ["label_smoothing", "float", "much"]),
    ("model.init_args.optimizer.init_args.lr", "fast", ['"lr"', "float", "fast"]),
    ("oft", 3, ["config.yaml: oft", "mapping"]),
    # a value that the class refuses
    ("oft.r", 4, ["r=4", "oft_block_size=16", "exclude each other"]),
    ("model.init_args.label_smoothing", 2.0, ["label_smoothing=2.0", "[0, 1)"]),
    ("model.init_args.optimizer.init_args.lr", -1.0, ["optimizer: Invalid learning rate: -1.0"]),
    ("model.init_args.pretrained", "no/such/folder", ["no/such/folder"]),
]


@pytest.mark.parametrize(("key", "value", "said"), MISTAKES, ids=[f"{key}={v}"[:50] for key, v, _ in MISTAKES])
def test_a_mistake_in_a_file_is_named(
    capsys: pytest.CaptureFixture[str], config_file: Write, key: str, value: Any, said: list[str]
) -> None:
    line = error_of(capsys, "fit", "--config", config_file({key: value}))
    assert [words for words in said if words not in line] == []
    assert len(line) < 800


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["fitt"], ["'fitt'", "'fit'"]),
        (["zzz"], ["'zzz'", "fit, validate, test, predict, merge, export, info"]),
        (["--verson"], ["'--verson'", "'--version'"]),
        (["--config", "x.yaml", "fit"], ["after the command", "fit --config"]),
        (["fit"], ["model", "fit --help"]),
        (["fit", "--config"], ["--config"]),
        (["fit", "--config", "no/such.yaml"], ["no/such.yaml"]),
        (["fit", "--model.help", "ImageClasification"], ["'ImageClassification'"]),
        (["fit", "--max_epochs", "3"], ["--max_epochs", "'trainer.max_epochs'"]),
        (
            ["fit", "--config", "configs/vision.yaml", "--optimizer.lr", "1"],
            ["'lr'", "name a class first, as in --optimizer AdamW"],
        ),
        (["fit", "three"], ["three"]),
        (["info"], ["info", "path"]),
        (["info", "no/such/place"], ["no/such/place"]),
        (["info", "x", "--layer-s"], ["--layer-s", "'--layers'"]),
        (["merge", "--bas", "x"], ["required", "--base"]),
    ],
    ids=lambda value: " ".join(value)[:40],
)
def test_a_mistake_on_the_command_line_is_named(
    capsys: pytest.CaptureFixture[str], arguments: list[str], said: list[str]
) -> None:
    line = error_of(capsys, *arguments)
    assert [words for words in said if words not in line] == []


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b"a: [1,", "line 1"),
        (b"words", "mapping"),
        (b"", "mapping"),
        (b"\xff\xfe", "utf-8"),
        (b"trainer: 3", "trainer: expected a mapping"),
        (b"oft: null", "oft: expected a mapping"),
        (b"config: x.yaml", "another"),
        (b"oft: &o {r: *o}", "aliases"),
        (b"[" * 2000, "nested"),
        (b"#" * 2**19, "larger than"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_a_later_file_that_is_no_configuration_is_named(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, config_file: Write, text: bytes, said: str
) -> None:
    file = tmp_path / "later.yaml"
    file.write_bytes(text)
    line = error_of(capsys, "fit", "--config", config_file(), f"--config={file}")
    assert "later.yaml: " in line
    assert said in line


def test_debug_raises_the_error_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIGHTNING_OFT_DEBUG", "1")
    with pytest.raises(UserError, match="unknown command"):
        main(["fitt"])


@pytest.mark.subprocess
def test_the_program_itself_fails_with_one_line(config_file: Write) -> None:
    command = [sys.executable, "-m", "lightning_oft.cli", "fit", "--config", config_file({"oft.coft_epsilon": 1})]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (run.returncode, run.stdout, run.stderr.count("\n")) == (2, "", 1)
    assert "oft.coft_epsilon" in run.stderr


@pytest.mark.subprocess
def test_the_version_imports_neither_lightning_nor_torch() -> None:
    code = (
        "import sys; from lightning_oft.cli import main; assert main(['--version']) == 0\n"
        "assert not {'torch', 'lightning', 'jsonargparse'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("word", "candidates", "expected"),
    [
        ("trainer.max_epoch", ["trainer.max_epochs", "trainer.min_epochs"], "; did you mean 'trainer.max_epochs'?"),
        ("max_epochs", ["trainer.max_epochs", "oft.max_angle"], "; did you mean 'trainer.max_epochs'?"),
        ("oft.coft_epsilon", ["oft.coft", "oft.eps", "oft.bias"], "; did you mean 'oft.coft' or 'oft.eps'?"),
        ("adamw", ["Adam", "AdamW", "NAdam"], "; did you mean 'AdamW'?"),
        ("zzz", ["trainer.max_epochs", "oft.bias"], ""),
        ("", ["oft.bias"], ""),
        ("oft", [], ""),
    ],
)
def test_suggestion_is_the_nearest(word: str, candidates: list[str], expected: str) -> None:
    assert suggestion(word, candidates) == expected


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


@pytest.mark.parametrize("completion", ["", None])
def test_a_bad_row_that_a_loaders_process_meets_is_one_line(completion: str | None, tmp_path: Path) -> None:
    rows = [{"prompt": "Say", "completion": " it"}, {"prompt": "Say", "completion": completion}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    base = str(Path(__file__).parents[2] / "examples" / "bases" / "docs-llama")
    data = TextDataModule(str(tmp_path / "rows.jsonl"), pretrained=base, streaming=True, num_workers=1)
    data.setup("fit")
    with pytest.raises(ValueError, match="in DataLoader worker process") as caught:
        list(data.train_dataloader())
    assert is_user_error(caught.value)
    assert one_line(caught.value).startswith("train, row 2: completion is ")


def test_an_error_that_the_package_raises_on_purpose_is_the_users() -> None:
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


@pytest.mark.parametrize(
    ("command", "content"), [("validate", "cut short"), ("validate", "text"), ("validate", "adapter"), ("fit", "text")]
)
def test_a_file_that_is_no_checkpoint_is_one_line(
    command: str, content: str, config_file: Write, fitted: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "x.ckpt"
    whole = fitted.checkpoint.read_bytes()
    adapter = fitted.directory / "export" / "adapter" / "adapter_model.safetensors"
    file.write_bytes({"cut short": whole[:-500], "text": b"text", "adapter": adapter.read_bytes()}[content])
    said = error_of(capsys, command, "--config", config_file(), "--ckpt_path", str(file))
    assert "x.ckpt: cannot be read as a checkpoint" in said


def test_an_adapters_checkpoint_without_oft_says_what_it_needs(
    config_file: Write, fitted: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    file = config_file({"oft.enabled": False})
    said = error_of(capsys, "validate", "--config", file, "--ckpt_path", str(fitted.checkpoint))
    assert "holds an adapter (default)" in said
    assert "set enabled=True" in said


def test_the_configuration_wins_over_a_checkpoints_hyperparameters(
    config_file: Write, fitted: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    changes = {"model.init_args.pretrained": "no/such/folder"}
    said = error_of(capsys, "validate", "--config", config_file(changes), "--ckpt_path", str(fitted.checkpoint))
    assert "no/such/folder" in said
