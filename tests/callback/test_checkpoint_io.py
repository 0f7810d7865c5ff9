"""Checkpoint files: whole under their final name, or what was there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import AsyncCheckpointIO
from small import Small, loader, oft, trainer

from lightning_oft.callback.checkpoint_io import AtomicCheckpointIO

pytestmark = pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`")


class Mine(TorchCheckpointIO):
    """A way of writing that a user chose."""


@pytest.mark.parametrize(
    ("plugins", "expected"),
    [([], AtomicCheckpointIO), ([Mine()], Mine), ([AsyncCheckpointIO()], AsyncCheckpointIO)],
    ids=["default", "own", "async"],
)
def test_only_the_default_way_is_replaced(tmp_path: Path, plugins: list[Any], expected: type) -> None:
    run = trainer(tmp_path, oft(), ModelCheckpoint(tmp_path, save_last=True), plugins=plugins)
    run.fit(Small(), loader())
    assert type(run.strategy.checkpoint_io) is expected
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["lightning_oft"]["adapter_only"]


def test_checkpoints_written_in_the_background_are_whole_and_resume(tmp_path: Path) -> None:
    states = []
    for plugins in ([], [AsyncCheckpointIO()]):
        place = tmp_path / str(len(plugins))
        every = ModelCheckpoint(place, filename="{epoch}", save_top_k=-1, enable_version_counter=False)
        run = trainer(place, oft(), every, plugins=plugins, max_epochs=2)
        run.fit(Small(), loader())
        inner = getattr(run.strategy.checkpoint_io, "_checkpoint_io", run.strategy.checkpoint_io)
        assert type(inner) is AtomicCheckpointIO
        model = Small()
        trainer(place, oft(), every, plugins=plugins, max_epochs=2).fit(
            model, loader(), ckpt_path=str(place / "epoch=0.ckpt")
        )
        states.append(model.state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_without_oft_lightning_writes_as_ever(tmp_path: Path) -> None:
    run = trainer(tmp_path, oft(enabled=False), ModelCheckpoint(tmp_path, save_last=True))
    run.fit(Small(), loader())
    assert type(run.strategy.checkpoint_io) is TorchCheckpointIO


def test_a_write_that_fails_names_the_file_and_leaves_what_was_there(tmp_path: Path) -> None:
    way, place = AtomicCheckpointIO(), tmp_path / "last.ckpt"
    way.save_checkpoint({"a": torch.zeros(3)}, place)
    before = place.read_bytes()
    with pytest.raises(AttributeError):
        way.save_checkpoint({"a": lambda: None}, place)  # torch's own message says what cannot be pickled
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OSError, match=r"file/last\.ckpt: the checkpoint cannot be written \(.*\); what was there is"):
        way.save_checkpoint({}, tmp_path / "file" / "last.ckpt")
    assert place.read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "last.ckpt"]


def test_what_a_killed_run_left_is_written_over(tmp_path: Path) -> None:
    (tmp_path / ".last.ckpt.part").write_bytes(b"torn")
    AtomicCheckpointIO().save_checkpoint({"a": 1}, tmp_path / "last.ckpt")
    assert [path.name for path in tmp_path.iterdir()] == ["last.ckpt"]
    assert torch.load(tmp_path / "last.ckpt") == {"a": 1}


def test_a_link_is_replaced_and_not_what_it_leads_to(tmp_path: Path) -> None:
    way = AtomicCheckpointIO()
    way.save_checkpoint({"a": 1}, tmp_path / "best.ckpt")
    (tmp_path / "last.ckpt").symlink_to("best.ckpt")
    way.save_checkpoint({"a": 2}, tmp_path / "last.ckpt")
    assert torch.load(tmp_path / "best.ckpt") == {"a": 1}
    assert torch.load(tmp_path / "last.ckpt") == {"a": 2}


def test_last_as_a_link_resumes(tmp_path: Path) -> None:
    for epochs in (1, 2):
        keeper = ModelCheckpoint(tmp_path, save_last="link")
        ckpt = str(tmp_path / "last.ckpt") if epochs == 2 else None
        trainer(tmp_path, oft(), keeper, max_epochs=epochs).fit(Small(), loader(), ckpt_path=ckpt)
    assert (tmp_path / "last.ckpt").is_symlink()
