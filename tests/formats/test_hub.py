"""Adapters to and from a hub that is a folder here; nothing in this file asks a network."""

from __future__ import annotations

import shutil
from fnmatch import fnmatch
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from bad_inputs.table import CONFIG, TENSORS, Net, config
from huggingface_hub.errors import LocalEntryNotFoundError
from small import Small, loader, trainer
from torch import nn
from transformers import AutoModelForImageClassification

from lightning_oft import OFTConfig, OFTFinetuning, inject, load_adapter, oft_layers, push_adapter, save_adapter
from lightning_oft.cli import main
from lightning_oft.formats import AdapterFileError, read_adapter

VIT = Path(__file__).parents[2] / "examples" / "bases" / "digits-vit"
FILES = {"README.md", CONFIG, TENSORS}


class Hub:
    """Repositories in a folder, by `org/name`, which two of huggingface_hub's names are replaced with."""

    def __init__(self, root: Path) -> None:
        self.root, self.calls = root, list[Any]()

    def snapshot_download(self, repo_id: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        self.calls.append((repo_id, revision))
        if not (self.root / repo_id).is_dir():
            raise LocalEntryNotFoundError("no network\nand a second line")
        pulled = self.root / "cache" / repo_id
        pulled.mkdir(parents=True, exist_ok=True)
        for file in (self.root / repo_id).rglob("*"):
            name = str(file.relative_to(self.root / repo_id))
            if file.is_file() and any(fnmatch(name, pattern) for pattern in allow_patterns):
                shutil.copy(file, pulled / name)
        return str(pulled)

    def create_repo(self, repo_id: str, private: bool | None, exist_ok: bool) -> Any:
        self.calls.append(("create", private))
        repo_id = repo_id if "/" in repo_id else f"me/{repo_id}"
        (self.root / repo_id).mkdir(parents=True, exist_ok=exist_ok)
        return SimpleNamespace(repo_id=repo_id)

    def create_branch(self, repo_id: str, branch: str, exist_ok: bool) -> None:
        self.calls.append(("branch", branch))

    def file_exists(self, repo_id: str, name: str, revision: str | None) -> bool:
        return (self.root / repo_id / name).is_file()

    def hf_hub_download(self, repo_id: str, name: str, revision: str | None) -> str:
        return str(self.root / repo_id / name)

    def upload_folder(self, repo_id: str, folder_path: Path, ignore_patterns: Any, **options: Any) -> Any:
        self.calls.append(("commit", options["revision"]))
        for file in folder_path.iterdir():
            if file.name not in (ignore_patterns or ()):
                shutil.copy(file, self.root / repo_id / file.name)
        return SimpleNamespace(commit_url=f"hub/{repo_id}/commit/1")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    hub = Hub(tmp_path / "hub")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub.snapshot_download)
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda token: hub)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return hub


def adapted(value: float = 0.1) -> Net:
    model = Net()
    inject(model, config())
    oft_layers(model)["body"].oft_R["default"].weight.data.fill_(value)  # type: ignore[union-attr, index]
    return model


def value(path: Path | str) -> float:
    return float(read_adapter(path).generators()["body"][0, 0])


def test_what_is_pushed_is_what_is_pulled(hub: Hub) -> None:
    assert push_adapter(adapted(), "adapter", private=True, revision="v1") == "hub/me/adapter/commit/1"
    assert hub.calls == [("create", True), ("branch", "v1"), ("commit", "v1")]
    assert {file.name for file in (hub.root / "me" / "adapter").iterdir()} == FILES
    assert 'load_adapter(base, "me/adapter")' in (hub.root / "me" / "adapter" / "README.md").read_text()
    model = Net()
    assert load_adapter(model, "me/adapter@v1") == ["body"]
    assert hub.calls[-1] == ("me/adapter", "v1")
    assert value("me/adapter") == pytest.approx(0.1)


def test_a_repository_keeps_its_own_card_and_gets_ours_anew(hub: Hub) -> None:
    push_adapter(adapted(), "me/adapter", metrics={"accuracy": 0.25})
    card = hub.root / "me" / "adapter" / "README.md"
    assert "0.25" in card.read_text()
    push_adapter(adapted(), "me/adapter")
    assert "0.25" not in card.read_text()
    card.write_text("mine")
    push_adapter(adapted(0.2), "me/adapter")
    assert card.read_text() == "mine"
    assert value("me/adapter") == pytest.approx(0.2)


def test_no_folder_of_the_machine_is_pushed(hub: Hub, tmp_path: Path) -> None:
    model = AutoModelForImageClassification.from_pretrained(VIT)
    inject(model, OFTConfig(oft_block_size=8))
    push_adapter(model, "me/adapter")
    for name in ("README.md", CONFIG):
        assert str(VIT.parent) not in (hub.root / "me" / "adapter" / name).read_text()


def test_nothing_of_a_repository_but_its_two_files_is_pulled(hub: Hub) -> None:
    place = save_adapter(adapted(), hub.root / "org" / "adapter")
    (place / "adapter_model.bin").write_bytes(b"a pickle")
    (place / "modeling.py").write_text("raise SystemExit")
    shutil.copytree(place, place / "default")
    load_adapter(Net(), "org/adapter")
    assert {file.name for file in (hub.root / "cache" / "org" / "adapter").iterdir()} == {CONFIG, TENSORS}


def test_a_folder_below_a_repository_and_a_pickle_are_no_adapter(hub: Hub) -> None:
    """Not even where an earlier pull of all of it has left them in the cache."""
    place = save_adapter(adapted(), hub.root / "org" / "adapter")
    shutil.copytree(place, hub.root / "cache" / "org" / "adapter" / "default")
    (place / CONFIG).unlink()
    with pytest.raises(AdapterFileError, match=f"^org/adapter: the repository has no {CONFIG}"):
        load_adapter(Net(), "org/adapter")
    pickled = save_adapter(adapted(), hub.root / "org" / "pickled")
    (pickled / TENSORS).rename(pickled / "adapter_model.bin")
    shutil.copytree(pickled, hub.root / "cache" / "org" / "pickled")
    with pytest.raises(AdapterFileError, match=r"adapter_model\.bin is a pickle, which may run code"):
        load_adapter(Net(), "org/pickled")


@pytest.mark.parametrize(
    "path", ["runs/adapter", "runs/adapter@v1", "nothing", "a/b/c", "../x", "~/x", "file:///x/y", "org/last.ckpt"]
)
def test_a_path_is_not_asked_of_the_hub(path: str, hub: Hub) -> None:
    Path("runs").mkdir()
    with pytest.raises(AdapterFileError, match="no such file or directory"):
        load_adapter(Net(), path)
    assert hub.calls == []


def test_what_is_here_goes_first(hub: Hub) -> None:
    save_adapter(adapted(0.1), hub.root / "org" / "adapter")
    save_adapter(adapted(0.2), "org/adapter")
    assert value("org/adapter") == pytest.approx(0.2)
    assert hub.calls == []


def test_offline_is_one_line(hub: Hub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(AdapterFileError) as pulled:
        load_adapter(Net(), "org/adapter")
    assert str(pulled.value).startswith("org/adapter: not here, and the hub does not give it (no network); give")
    assert main(["merge", "--base", str(VIT), "--adapter", "org/adapter", "--output", "out"]) == 2
    assert capsys.readouterr().err.count("\n") == 1

    def offline(*args: Any, **options: Any) -> Any:
        raise ConnectionError("no network\nand a second line")

    monkeypatch.setattr(hub, "create_repo", offline)
    with pytest.raises(AdapterFileError, match=r"^org/adapter: the adapter cannot be pushed \(no network\); log in"):
        push_adapter(adapted(), "org/adapter")


def test_the_commands_take_a_hub_id(hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    model = AutoModelForImageClassification.from_pretrained(VIT)
    inject(model, OFTConfig(oft_block_size=8))
    save_adapter(model, hub.root / "org" / "adapter")
    assert main(["merge", "--base", str(VIT), "--adapter", "org/adapter", "--output", "out"]) == 0
    assert Path("out", "model.safetensors").is_file()
    assert main(["export", "--checkpoint", "org/adapter", "--output", "exported"]) == 0
    assert {file.name for file in Path("exported").iterdir()} == FILES
    assert main(["info", "org/adapter"]) == 0
    assert "layers" in capsys.readouterr().out
    named = ["--adapter-name", "other"]
    assert main(["merge", "--base", str(VIT), "--adapter", "org/adapter", "--output", "out2", *named]) == 2


def test_a_fit_starts_from_a_hub_id(hub: Hub) -> None:
    first: nn.Module = Small()
    inject(first, OFTConfig(oft_block_size=4, target_modules=["net.0"]))
    save_adapter(first, hub.root / "org" / "adapter")
    model = Small()
    run = trainer(Path(), OFTFinetuning(pretrained_adapter="org/adapter", merge_on_fit_end=False), max_steps=1)
    run.fit(model, loader(), loader(False))
    assert list(oft_layers(model)) == ["net.0"]
