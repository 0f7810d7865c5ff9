import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from torch import nn
from torch.utils.data import DataLoader
from transformers import ViTConfig, ViTForImageClassification

from lightning_oft.data import DigitsDataModule
from lightning_oft.tasks import ImageClassification

SMALL = ViTConfig(
    image_size=8, patch_size=4, num_channels=1, hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
    intermediate_size=16, num_labels=10,
)  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("vit")
    torch.manual_seed(0)
    ViTForImageClassification(SMALL).save_pretrained(folder)
    return str(folder)


def trainer(**arguments: Any) -> Trainer:
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    return Trainer(accelerator="cpu", max_epochs=1, **quiet, **arguments)


def batch(labels: list[int]) -> dict[str, torch.Tensor]:
    return {"pixel_values": torch.randn(len(labels), 1, 8, 8), "labels": torch.tensor(labels)}


def test_fit_logs_and_trains(base: str) -> None:
    task = ImageClassification(base, optimizer=partial(torch.optim.AdamW, lr=1e-2))
    before = task.model.classifier.weight.clone()
    run = trainer(limit_train_batches=3)
    run.fit(task, DigitsDataModule())
    assert not torch.equal(before, task.model.classifier.weight)
    assert {f"{split}/{name}" for split in ("train", "val") for name in ("loss", "accuracy", "f1")} <= {
        *run.callback_metrics
    }
    assert int(task.confusion["val"].sum()) == 143


def test_every_test_set_is_logged_by_its_name(base: str) -> None:
    task = ImageClassification(base)
    found = [name for scores in trainer().test(task, DigitsDataModule(), verbose=False) for name in scores]
    assert set(found) == {f"test/{s}/{n}" for s in ("new", "original") for n in ("loss", "accuracy", "f1")}
    assert int(task.confusion["test/new"].sum()) == 359


def test_test_scores_are_the_models(base: str) -> None:
    task, data = ImageClassification(base), DigitsDataModule(rotation=180)
    scores = {k: v for one in trainer().test(task, data, verbose=False) for k, v in one.items()}
    loaded = [data.splits["original"][i] for i in range(359)]  # type: ignore[arg-type]
    predicted = task(torch.stack([one["pixel_values"] for one in loaded])).argmax(-1)
    expected = (predicted == torch.stack([one["labels"] for one in loaded])).float().mean()
    assert scores["test/original/accuracy"] == pytest.approx(float(expected))


def test_one_test_set_needs_no_name(base: str) -> None:
    data = DigitsDataModule()
    data.setup("test")
    (scores,) = trainer().test(ImageClassification(base), data.test_dataloader()[0], verbose=False)
    assert set(scores) == {"test/loss", "test/accuracy", "test/f1"}


def test_test_sets_without_names_are_numbered(base: str) -> None:
    data = DigitsDataModule()
    data.setup("test")
    scores = trainer().test(ImageClassification(base), data.test_dataloader(), verbose=False)
    assert {name.rpartition("/")[0] for one in scores for name in one} == {"test/0", "test/1"}


def test_image_processor_is_written_beside_an_export(base: str, tmp_path: Path) -> None:
    shutil.copytree(base, tmp_path / "base")
    (tmp_path / "base" / "preprocessor_config.json").touch()
    (tmp_path / "export").mkdir()
    ImageClassification(str(tmp_path / "base")).processor.save_pretrained(tmp_path / "export")
    assert {file.name for file in (tmp_path / "export").iterdir()} == {"preprocessor_config.json"}


def test_predictions_are_probabilities_and_their_labels(base: str) -> None:
    predicted = trainer(limit_predict_batches=1).predict(ImageClassification(base), DigitsDataModule(batch_size=5))
    assert predicted is not None
    first: Any = predicted[0][0]  # type: ignore[index]
    assert first["logits"].shape == first["probabilities"].shape == (5, 10)
    torch.testing.assert_close(first["probabilities"].sum(-1), torch.ones(5))
    assert torch.equal(first["labels"], first["logits"].argmax(-1))


def test_checkpoint_restores_the_task(base: str, tmp_path: Path) -> None:
    task = ImageClassification(base, num_classes=10, class_weights=[1.0] * 10)
    run = trainer(limit_train_batches=1, limit_val_batches=1)
    run.fit(task, DigitsDataModule())
    run.save_checkpoint(tmp_path / "last.ckpt")
    again = ImageClassification.load_from_checkpoint(tmp_path / "last.ckpt", weights_only=True)
    torch.testing.assert_close(again.state_dict(), task.state_dict())
    assert all(name.startswith("model.") for name in task.state_dict())


def test_same_number_of_classes_keeps_the_head(base: str, capsys: pytest.CaptureFixture[str]) -> None:
    task = ImageClassification(base, num_classes=10)
    assert task.new_head == []
    original = ViTForImageClassification.from_pretrained(base)
    torch.testing.assert_close(task.model.state_dict(), original.state_dict())


def test_another_number_of_classes_makes_a_new_head_and_says_so(base: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        task = ImageClassification(base, num_classes=3)
    assert (task.new_head, task.num_classes) == (["classifier"], 3)
    assert task(torch.zeros(2, 1, 8, 8)).shape == (2, 3)
    (line,) = [record.getMessage() for record in caplog.records if "new head" in record.getMessage()]
    assert "new head classifier for 3 classes; OFT trains it whole unless oft.modules_to_save" in line
    assert "\n" not in line


def test_new_head_takes_the_names_of_the_datas_classes(base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data = DigitsDataModule()
    data.setup("test")
    task = ImageClassification(base, num_classes=4)
    data.class_names = ["a", "b", "c", "d"]
    monkeypatch.setattr(data, "setup", lambda stage: None)
    with pytest.raises(ValueError, match="found class"):
        trainer().test(task, data, verbose=False)
    assert task.model.config.id2label == {0: "a", 1: "b", 2: "c", 3: "d"}


def test_other_number_of_classes_in_the_data_is_refused(base: str) -> None:
    task = ImageClassification(base, num_classes=3)
    with pytest.raises(ValueError, match=r"the data has 10 classes, the model 3; set model.init_args.num_classes: 10"):
        trainer().fit(task, DigitsDataModule())


@pytest.mark.parametrize("label", [10, -1])
def test_label_that_is_no_class_is_refused(label: int, base: str) -> None:
    loader: DataLoader[Any] = DataLoader([batch([1, label])], batch_size=None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=rf"^labels: found class {label}, the model has 0 to 9; set num_classes$"):
        trainer().validate(ImageClassification(base), loader)


@pytest.mark.parametrize(
    ("wrong", "found"), [([torch.zeros(1)], "list"), ({"pixel_values": torch.zeros(1)}, r"\['pixel_values'\]")]
)
def test_batch_of_another_shape_is_refused(wrong: Any, found: str, base: str) -> None:
    with pytest.raises(ValueError, match=f"found {found}; a batch is a dict of pixel_values"):
        ImageClassification(base).validation_step(wrong, 0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_classes": 1}, "num_classes=1: classification needs at least 2"),
        ({"label_smoothing": 1.0}, "label_smoothing=1.0"),
        ({"class_weights": [1.0, 2.0]}, "class_weights has 2 values; the model has 10 classes"),
    ],
)
def test_impossible_arguments_are_refused(base: str, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ImageClassification(base, **arguments)


def test_weights_in_half_precision_give_float32_logits(base: str) -> None:
    task = ImageClassification(base, dtype="bfloat16")
    assert task.model.dtype == torch.bfloat16
    assert task(torch.zeros(2, 1, 8, 8)).dtype == torch.float32


def test_weights_and_smoothing_are_in_the_loss(base: str) -> None:
    task = ImageClassification(base, label_smoothing=0.1, class_weights=[float(i) for i in range(10)])
    one = batch([1, 2, 3])
    expected = nn.CrossEntropyLoss(torch.arange(10.0), label_smoothing=0.1)(task(one["pixel_values"]), one["labels"])
    torch.testing.assert_close(task._score(one, task.train_metrics)[0], expected)
