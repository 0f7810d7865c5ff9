"""DreamBooth: a subject beside its class, whose pictures the model makes where they are missing."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import LightningModule, Trainer
from PIL import Image
from torch import Tensor, nn

from lightning_oft.data import DreamBoothDataModule

pytest.importorskip("datasets", reason="datasets is not installed: pip install 'lightning_oft[data]'")


class Painter(LightningModule):
    """Paints each seed in its own grey; what it sees in training is kept."""

    def __init__(self, breaks_at: int | None = None) -> None:
        super().__init__()
        self.layer, self.seen, self.asked, self.breaks_at = nn.Linear(1, 1), [], [], breaks_at

    def sample(self, prompts: Sequence[str], seeds: Sequence[int]) -> list[Any]:
        if self.breaks_at in seeds:
            raise RuntimeError("stopped")
        self.asked += [*zip(seeds, prompts, strict=True)]
        return [Image.new("RGB", (8, 8), (seed,) * 3) for seed in seeds]

    def training_step(self, batch: dict[str, Any]) -> Tensor:
        self.seen.append(batch)
        return self.layer.weight.sum()  # type: ignore[no-any-return]

    def validation_step(self, batch: dict[str, Any]) -> None:
        assert "prior" not in batch

    def configure_optimizers(self) -> Any:
        from torch.optim import SGD

        return SGD(self.parameters())


def fit(model: Painter, data: DreamBoothDataModule) -> Painter:
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    Trainer(accelerator="cpu", max_epochs=1, **quiet).fit(model, datamodule=data)  # type: ignore[arg-type]
    return model


@pytest.fixture
def subject(tmp_path: Path) -> str:
    (tmp_path / "subject").mkdir()
    for number in range(2):
        Image.new("RGB", (8, 8), "red").save(tmp_path / "subject" / f"{number}.png")
    return str(tmp_path / "subject")


def data(subject: str, folder: Path, **options: Any) -> DreamBoothDataModule:
    options = {"class_prompt": ["a cat", "a dog"], "class_pictures": 5, "batch_size": 2, "size": 8, **options}
    return DreamBoothDataModule(subject, "a sks", class_data=str(folder), **options)


def test_missing_pictures_are_made_once_with_prompts_in_turn(subject: str, tmp_path: Path) -> None:
    model = fit(Painter(), data(subject, tmp_path / "class"))
    assert model.asked == [(0, "a cat"), (1, "a dog"), (2, "a cat"), (3, "a dog"), (4, "a cat")]
    first, *_, last = model.seen
    assert len(model.seen) == 3
    assert set(first["prompt"]) == {"a sks"}
    assert first["prior"]["pixel_values"].shape == first["pixel_values"].shape == (2, 3, 8, 8)
    priors = [batch["prior"] for batch in model.seen]
    greys = [round(float(one[0, 0, 0] + 1) * 127.5) for prior in priors for one in prior["pixel_values"]]
    assert sorted(zip(greys, [said for prior in priors for said in prior["prompt"]], strict=True)) == model.asked
    assert fit(Painter(), data(subject, tmp_path / "class")).asked == []
    assert last["prompt"] == ["a sks"]


def test_pictures_that_are_there_stay_and_count(subject: str, tmp_path: Path) -> None:
    (tmp_path / "class").mkdir()
    Image.new("RGB", (8, 8), "blue").save(tmp_path / "class" / "mine.png")
    (tmp_path / "class" / "mine.txt").write_text("a blue cat")
    model = fit(Painter(), data(subject, tmp_path / "class", class_pictures=3))
    assert model.asked == [(1, "a dog"), (2, "a cat")]
    said = [prompt for batch in model.seen for prompt in batch["prior"]["prompt"]]
    assert sorted(said) == ["a blue cat", "a cat", "a dog"]


def test_an_interrupted_making_leaves_what_was_there(subject: str, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="stopped"):
        fit(Painter(breaks_at=3), data(subject, tmp_path / "class"))
    assert not (tmp_path / "class").exists()
    assert len(fit(Painter(), data(subject, tmp_path / "class")).asked) == 5


def test_without_a_class_there_is_the_subject_alone_and_validation_shows_it(subject: str) -> None:
    alone = DreamBoothDataModule(subject, "a sks", size=8)
    alone.setup("fit")
    assert [len(alone.splits[name]) for name in ("train", "val")] == [2, 2]  # type: ignore[arg-type]
    assert "prior" not in alone.splits["train"][0]
