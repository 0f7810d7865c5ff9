from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_oft.tasks import Task


class Words:
    """Stands for a tokenizer."""

    def save_pretrained(self, directory: str | Path) -> None:
        (Path(directory) / "words.txt").write_text("a b")


class Regression(Task):
    """A stranger's task: a model of its own under another attribute, a processor and several test sets."""

    model_attribute = "net"

    def __init__(self, pretrained: str | None = None, **arguments: Any) -> None:
        super().__init__(pretrained, **arguments)
        self.save_hyperparameters(ignore=["optimizer", "lr_scheduler"])
        blocks = [nn.Sequential(nn.Linear(2, 2), nn.ReLU()) for _ in range(2)]
        blocks[0][0].oft_R = nn.ParameterDict({"default": torch.zeros(1, 1)})
        self.net = nn.Sequential(nn.Sequential(*blocks), nn.Linear(2, 1))
        if pretrained is None:
            self.processor = Words()
        self.seen: list[str] = []

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss: Tensor = self.net(batch[0]).square().mean()
        return loss

    def test_step(self, batch: list[Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        self.seen.append(self.test_splits()[dataloader_idx])


def trainer() -> Trainer:
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    return Trainer(accelerator="cpu", max_epochs=1, **quiet)  # type: ignore[arg-type]


def numbers() -> DataLoader[Any]:
    return DataLoader(TensorDataset(torch.randn(4, 2)), batch_size=4)


def test_optimizer_and_schedule_come_with_the_base() -> None:
    schedule = partial(torch.optim.lr_scheduler.ConstantLR, factor=0.5)
    task = Regression(optimizer=partial(torch.optim.AdamW, weight_decay=0.1), lr_scheduler=schedule, lr_interval="step")
    before = task.net[-1].weight.clone()
    run = trainer()
    run.fit(task, numbers())
    assert not torch.equal(before, task.net[-1].weight)
    others, rotations = run.optimizers[0].param_groups
    assert (others["weight_decay"], rotations["weight_decay"]) == (0.1, 0.0)
    assert [id(p) for p in rotations["params"]] == [id(p) for n, p in task.named_parameters() if "oft_R" in n]
    assert run.lr_scheduler_configs[0].interval == "step"


def test_companions_write_themselves(tmp_path: Path) -> None:
    (companion,) = Regression().companions()
    companion.save_pretrained(tmp_path)
    assert (tmp_path / "words.txt").read_text() == "a b"


def test_companions_are_the_files_beside_a_pretrained_model(tmp_path: Path) -> None:
    for name in ("tokenizer.json", "preprocessor_config.json", "model.safetensors"):
        (tmp_path / "base" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "base" / name).touch()
    (tmp_path / "export").mkdir()
    for companion in Regression(str(tmp_path / "base")).companions():
        companion.save_pretrained(tmp_path / "export")
    assert {file.name for file in (tmp_path / "export").iterdir()} == {"tokenizer.json", "preprocessor_config.json"}


def test_repeated_blocks_of_the_library_model_are_sharded() -> None:
    task = Regression()
    assert task.library_model is task.net
    assert task.sharded_units() == list(task.net[0])


def test_every_test_set_has_a_name() -> None:
    task, run = Regression(), trainer()
    run.test(task, [numbers(), numbers()], verbose=False)
    run.test(task, numbers(), verbose=False)
    assert task.seen == ["test/0", "test/1", "test"]


def test_checkpoint_restores_a_task(tmp_path: Path) -> None:
    task, run = Regression(dtype="bfloat16"), trainer()
    run.fit(task, numbers())
    run.save_checkpoint(tmp_path / "last.ckpt")
    again = Regression.load_from_checkpoint(tmp_path / "last.ckpt", weights_only=True)
    assert again.load_dtype == "bfloat16"
    torch.testing.assert_close(again.state_dict(), task.state_dict())


def test_missing_model_names_the_attribute() -> None:
    with pytest.raises(ValueError, match=r"^Task: no module 'model'; assign one, or name it in model_attribute$"):
        _ = Task().library_model


def test_model_to_load_has_to_be_named() -> None:
    with pytest.raises(ValueError, match=r"^Task: pretrained is not given; give a folder or a hub id$"):
        Task().load_model(None)
