"""Every shipped configuration is one that the command line takes; those that need no download also run."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from lightning_oft.cli import main
from lightning_oft.cli.application import Application

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "configs"
FILES = sorted(path.relative_to(ROOT).as_posix() for path in CONFIGS.rglob("*.yaml"))
OFFLINE = [name for name in FILES if Path(name).parent == Path("configs")]
TINY = {
    "max_epochs": 1,
    "limit_train_batches": 1,
    "limit_val_batches": 1,
    "limit_test_batches": 1,
    "num_sanity_val_steps": 0,
    "accelerator": "cpu",
    "enable_progress_bar": False,
    "enable_model_summary": False,
}

FEWER = {
    "configs/diffusion.yaml": {
        "data.init_args.class_pictures": 1,
        "data.init_args.batch_size": 1,
        "model.init_args.sampling": '{"num_inference_steps": 1}',
    }
}
"""What else makes a configuration's run short, by its name."""
NEEDS = {"configs/diffusion.yaml": "diffusers"}
"""The package of an extra that a configuration needs."""


def command_of(name: str) -> list[str]:
    """The words of the command in a configuration's first line."""
    first = (ROOT / name).read_text(encoding="utf-8").splitlines()[0]
    return shlex.split(first.removeprefix("# "))


def parsed(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the real parser makes of a command line; no model, no data and no trainer is built."""
    found: list[Any] = []
    monkeypatch.setattr(Application, "_set_seed", lambda self: None)
    monkeypatch.setattr(Application, "instantiate_classes", lambda self: found.append(self.config[self.command]))
    monkeypatch.setattr(Application, "_run_subcommand", lambda self, _: None)
    assert main(arguments) == 0
    config: dict[str, Any] = found[0].as_dict()
    return config


def test_there_are_configurations() -> None:
    assert "configs/vision.yaml" in OFFLINE
    assert len(FILES) > len(OFFLINE)


@pytest.mark.parametrize("name", FILES)
def test_configuration_starts_with_the_command_that_runs_it(name: str) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    command = command_of(name)
    assert text.startswith("# ")
    assert "lightning-oft" in command or "lightning_oft.cli" in command
    assert command[command.index("--config") + 1] == name
    assert text.splitlines()[1] == "#"
    assert re.match(r"# \S", text.splitlines()[2]), "then what it does"


@pytest.mark.parametrize("name", FILES)
def test_configuration_parses(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    words = command_of(name)
    start = next(i for i, word in enumerate(words) if word in ("lightning-oft", "lightning_oft.cli"))
    found = parsed(words[start + 1 :], monkeypatch)
    written = yaml.safe_load((ROOT / name).read_text(encoding="utf-8"))
    assert {key: found["oft"][key] for key in written["oft"]} == written["oft"]
    assert found["model"]["class_path"] == written["model"]["class_path"]
    assert found["data"]["class_path"] == written["data"]["class_path"]


@pytest.mark.filterwarnings("ignore:PEFT cannot represent the rotations of")
@pytest.mark.parametrize("name", OFFLINE)
def test_configuration_runs(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if name in NEEDS:
        pytest.importorskip(NEEDS[name], reason=f"{name} needs {NEEDS[name]}, which is not installed")
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    changes = {f"trainer.{key}": str(value).lower() for key, value in TINY.items()} | FEWER.get(name, {})
    tiny = [word for key, value in changes.items() for word in (f"--{key}", str(value))]
    assert main(["fit", "--config", str(ROOT / name), *tiny]) == 0
    written = yaml.safe_load((ROOT / name).read_text(encoding="utf-8"))
    if "export_dir" in written["oft"]:
        exported = tmp_path / written["oft"]["export_dir"]
        assert {path.name for path in exported.iterdir()} >= {"adapter", "merged"}
        assert "load the adapter with" in capsys.readouterr().out
