"""One short fit of the shipped vision configuration, shared by every test that looks at what a fit leaves behind."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jsonargparse
import pytest
import yaml

from lightning_oft.cli import main

ROOT = Path(__file__).parents[2]
BASE = ROOT / "examples" / "bases" / "digits-vit"
SHORT = {
    "max_epochs": 1,
    "limit_train_batches": 3,
    "limit_val_batches": 1,
    "limit_test_batches": 1,
    "accelerator": "cpu",
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "logger": False,
}


@pytest.fixture(autouse=True)
def no_optimizers_of_bitsandbytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another test may have imported it into this process, after which `AdamW` has two meanings to jsonargparse; the
    command line never imports it before it has parsed its options."""
    every = jsonargparse._typehints.get_all_subclass_paths

    def own(*args: Any, **kwargs: Any) -> list[str]:
        return [path for path in every(*args, **kwargs) if not path.startswith("bitsandbytes.")]

    monkeypatch.setattr("jsonargparse._typehints.get_all_subclass_paths", own)


@dataclass(frozen=True)
class Fitted:
    """What a fit wrote and said."""

    directory: Path
    checkpoint: Path
    said: str


@pytest.fixture(scope="session")
def vision_config() -> dict[str, Any]:
    """configs/vision.yaml made three steps short, with the base's path made absolute."""
    config: dict[str, Any] = yaml.safe_load((ROOT / "configs" / "vision.yaml").read_text(encoding="utf-8"))
    config["model"]["init_args"]["pretrained"] = str(BASE)
    config["trainer"] = {**config["trainer"], **SHORT}
    config["oft"].pop("export_dir", None)
    return {**config, "test_before_and_after": False}


@pytest.fixture
def config_file(tmp_path: Path, vision_config: dict[str, Any]) -> Callable[..., str]:
    """Write the vision configuration with some dotted keys set to other values; returns its path."""

    def write(changes: dict[str, Any] | None = None) -> str:
        config = copy.deepcopy(vision_config)
        config["trainer"]["default_root_dir"] = str(tmp_path / "run")
        for path, value in (changes or {}).items():
            *parents, last = path.split(".")
            place = config
            for key in parents:
                place = place.setdefault(key, {})
            place[last] = value
        file = tmp_path / "config.yaml"
        file.write_text(yaml.safe_dump(config), encoding="utf-8")
        return str(file)

    return write


@pytest.fixture
def base() -> Path:
    """The folder of the base model that the vision configuration starts from."""
    return BASE


@pytest.fixture(scope="session")
def fitted(tmp_path_factory: pytest.TempPathFactory, vision_config: dict[str, Any]) -> Fitted:
    """The result of `lightning-oft fit`, three steps long, with `test_before_and_after`."""
    directory = tmp_path_factory.mktemp("fit")
    file = directory / "vision.yaml"
    file.write_text(yaml.safe_dump({**vision_config, "test_before_and_after": True}), encoding="utf-8")
    out = ["--trainer.default_root_dir", str(directory), "--oft.export_dir", str(directory / "export")]
    with pytest.MonkeyPatch.context() as patch:
        said: list[str] = []
        patch.setattr("builtins.print", lambda *lines, **_: said.append("\n".join(map(str, lines))))
        assert main(["fit", "--config", str(file), *out]) == 0
    (checkpoint,) = directory.rglob("*.ckpt")
    return Fitted(directory, checkpoint, "\n".join(said))
