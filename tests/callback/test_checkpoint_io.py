"""Checkpoint files: whole under their final name, or what was there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import AsyncCheckpointIO
from small import Small, difference, loader, state, trainer

from lightning_oft.callback.checkpoint_io import AtomicCheckpointIO

pytestmark = pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`")


@pytest.mark.parametrize(
    "plugin", [AtomicCheckpointIO, lambda: AsyncCheckpointIO(AtomicCheckpointIO())], ids=["alone", "in the background"]
)
def test_a_fit_without_oft_writes_whole_files_and_resumes(tmp_path: Path, plugin: Any) -> None:
    for epochs in (1, 2):
        keeper = ModelCheckpoint(tmp_path, save_last=True, enable_version_counter=False)
        model, last = Small(), str(tmp_path / "last.ckpt") if epochs == 2 else None
        trainer(tmp_path, keeper, plugins=[plugin()], max_epochs=epochs).fit(model, loader(False), ckpt_path=last)
        saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
        assert difference(saved["state_dict"], state(model)) == 0.0
    assert not list(tmp_path.glob(".*"))


def test_a_write_that_fails_names_the_file_and_leaves_what_was_there(tmp_path: Path) -> None:
    way, place = AtomicCheckpointIO(), tmp_path / "last.ckpt"
    way.save_checkpoint({"a": torch.zeros(3)}, place)
    before = place.read_bytes()
    with pytest.raises(AttributeError):
        way.save_checkpoint({"a": lambda: None}, place)  # torch's own message says what cannot be pickled
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OSError, match=r"file/last\.ckpt: the checkpoint cannot be written"):
        way.save_checkpoint({}, tmp_path / "file" / "last.ckpt")
    assert place.read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "last.ckpt"]


def test_what_a_killed_run_left_is_written_over(tmp_path: Path) -> None:
    (tmp_path / ".last.ckpt.part").write_bytes(b"torn")
    AtomicCheckpointIO().save_checkpoint({"a": 1}, tmp_path / "last.ckpt")
    assert [path.name for path in tmp_path.iterdir()] == ["last.ckpt"]
    assert AtomicCheckpointIO().load_checkpoint(tmp_path / "last.ckpt") == {"a": 1}


def test_a_link_is_replaced_and_not_what_it_leads_to(tmp_path: Path) -> None:
    way = AtomicCheckpointIO()
    way.save_checkpoint({"a": 1}, tmp_path / "best.ckpt")
    (tmp_path / "last.ckpt").symlink_to("best.ckpt")
    way.save_checkpoint({"a": 2}, tmp_path / "last.ckpt")
    assert way.load_checkpoint(tmp_path / "best.ckpt") == {"a": 1}
    assert way.load_checkpoint(tmp_path / "last.ckpt") == {"a": 2}


@pytest.mark.parametrize("damage", ["cut short", "text", "a folder"])
def test_a_damaged_file_is_named_in_one_line(tmp_path: Path, damage: str) -> None:
    place = tmp_path / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint({"a": torch.zeros(1000)}, place)
    whole = place.read_bytes()
    place.unlink()
    place.mkdir() if damage == "a folder" else place.write_bytes(whole[:-500] if damage == "cut short" else b"text")
    with pytest.raises(ValueError, match=r"last\.ckpt: cannot be read as a checkpoint file") as error:
        AtomicCheckpointIO().load_checkpoint(place)
    assert "\n" not in str(error.value)


def test_only_damage_is_called_damage(tmp_path: Path) -> None:
    class Gone:
        pass

    globals()["Gone"], Gone.__qualname__ = Gone, "Gone"
    torch.save({"thing": Gone()}, tmp_path / "x.ckpt")
    del globals()["Gone"]
    with pytest.raises(AttributeError, match="Gone"):
        AtomicCheckpointIO().load_checkpoint(tmp_path / "x.ckpt", weights_only=False)
    with pytest.raises(FileNotFoundError):
        AtomicCheckpointIO().load_checkpoint(tmp_path / "absent.ckpt")
