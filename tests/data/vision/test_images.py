import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from lightning_oft.data import ImageDataModule
from lightning_oft.data.vision.images import ImageSamples


def write_images(folder: Path, count: int, seed: int = 0) -> None:
    folder.mkdir(parents=True)
    for i in range(count):
        pixels = np.random.default_rng(seed * 1000 + i).integers(0, 256, (10, 12, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    write_images(tmp_path / "cat", 20, 0)
    write_images(tmp_path / "dog", 10, 1)
    return tmp_path


def made(folder: Path, **arguments: object) -> ImageDataModule:
    data = ImageDataModule(str(folder), image_size=8, **arguments)  # type: ignore[arg-type]
    data.setup("fit")
    return data


def names(data: ImageDataModule, split: str) -> list[str]:
    part = data.splits[split]
    assert isinstance(part, ImageSamples)
    return [sample.name for sample in part.samples]


def test_folders_are_classes(tree: Path) -> None:
    data = made(tree)
    assert (data.class_names, data.num_classes, data.test_names) == (["cat", "dog"], 2, ["test"])
    assert [len(names(data, split)) for split in ("train", "val", "test")] == [24, 3, 3]
    batch = next(iter(data.train_dataloader()))
    assert (batch["pixel_values"].shape, batch["pixel_values"].dtype) == ((24, 3, 8, 8), torch.float32)
    assert sorted(batch["labels"].tolist()) == [0] * 16 + [1] * 8


def test_grayscale_is_one_channel(tree: Path) -> None:
    assert next(iter(made(tree, channels=1).val_dataloader()[0]))["pixel_values"].shape == (3, 1, 8, 8)


def test_split_folders_are_the_splits(tmp_path: Path) -> None:
    for split, count in (("train", 4), ("valid", 2), ("test", 3), ("test_night", 1)):
        write_images(tmp_path / split / "cat", count)
        write_images(tmp_path / split / "dog", count)
    data = made(tmp_path)
    assert {split: len(names(data, split)) for split in data.splits} == {
        "train": 8,
        "val": 4,
        "test": 6,
        "test_night": 2,
    }
    assert data.test_names == ["test", "test_night"]


def test_missing_split_folder_is_taken_out_of_training(tmp_path: Path) -> None:
    write_images(tmp_path / "train" / "a", 10)
    write_images(tmp_path / "train" / "b", 10)
    write_images(tmp_path / "test" / "a", 2)
    data = made(tmp_path, val_fraction=0.2)
    assert {split: len(names(data, split)) for split in data.splits} == {"train": 16, "val": 4, "test": 2}


def test_splits_repeat_and_seeds_differ(tree: Path) -> None:
    assert names(made(tree), "test") == names(made(tree), "test")
    assert names(made(tree), "test") != names(made(tree, seed=1), "test")


@pytest.mark.parametrize("workers", [0, 2])
def test_training_batches_repeat_with_the_seed(tree: Path, workers: int) -> None:
    first, again, other = (
        [batch["pixel_values"] for _ in range(2) for batch in loader]
        for loader in (made(tree, seed=s, num_workers=workers, color_jitter=0.2).train_dataloader() for s in (0, 0, 1))
    )
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], first[1])  # another epoch, another augmentation
    assert not torch.equal(first[0], other[0])


def test_evaluation_is_not_augmented(tree: Path) -> None:
    data = made(tree)
    assert torch.equal(data.splits["val"][0]["pixel_values"], data.splits["val"][0]["pixel_values"])
    assert not torch.equal(data.splits["train"][0]["pixel_values"], data.splits["train"][0]["pixel_values"])


def test_worker_settings_reach_the_loader(tree: Path) -> None:
    loader = made(tree, num_workers=1, persistent_workers=True, batch_size=5).train_dataloader()
    assert (loader.num_workers, loader.persistent_workers, loader.batch_size) == (1, True, 5)
    assert not made(tree, num_workers=0, persistent_workers=True).train_dataloader().persistent_workers


@pytest.mark.parametrize("damage", ["cut", "text", "empty"])
def test_unreadable_images_are_counted_named_and_left_out(tree: Path, damage: str) -> None:
    for name in ("cat/3.png", "dog/1.png"):
        content = (tree / name).read_bytes()
        (tree / name).write_bytes({"cut": content[: len(content) // 2], "text": b"no image", "empty": b""}[damage])
    with pytest.warns(UserWarning, match=r"2 of 30 images cannot be read and are left out: cat/3.png, dog/1.png$"):
        data = made(tree)
    assert sum(len(names(data, split)) for split in data.splits) == 28
    assert len(list(data.train_dataloader())) == 1


def test_image_damaged_later_is_left_out_of_its_batch(tree: Path) -> None:
    data = made(tree, verify="header")
    (tree / names(data, "val")[0]).write_bytes(b"no image")
    with pytest.warns(UserWarning, match="left out of its batch"):
        batch = next(iter(data.val_dataloader()[0]))
    assert len(batch["labels"]) == 2


def test_cameras_orientation_is_respected(tree: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    image = Image.open(tree / "cat/0.png")
    upright = np.asarray(image).copy()
    image.save(tree / "cat/0.png", exif=exif)
    data = made(tree, val_fraction=0, test_fraction=0, min_crop=1, horizontal_flip=0)
    pixels = data.splits["train"][names(data, "train").index("cat/0.png")]["pixel_values"]
    Image.fromarray(upright[::-1, ::-1].copy()).save(tree / "cat/0.png")
    torch.testing.assert_close(data.splits["train"][names(data, "train").index("cat/0.png")]["pixel_values"], pixels)


def one_class(folder: Path) -> None:
    write_images(folder / "cat", 2)


def no_images(folder: Path) -> None:
    (folder / "cat").mkdir()
    (folder / "dog").mkdir()
    (folder / "dog" / "notes.txt").touch()


def no_folders(folder: Path) -> None:
    (folder / "cat.png").touch()


def all_damaged(folder: Path) -> None:
    for name in ("cat", "dog"):
        (folder / name).mkdir()
        (folder / name / "0.png").write_bytes(b"no image")


def one_class_damaged(folder: Path) -> None:
    write_images(folder / "cat", 2)
    (folder / "dog").mkdir()
    (folder / "dog" / "0.png").write_bytes(b"no image")


def unknown_class_in_test(folder: Path) -> None:
    write_images(folder / "train" / "cat", 1)
    write_images(folder / "train" / "dog", 1)
    write_images(folder / "test" / "bird", 1)


def no_train(folder: Path) -> None:
    write_images(folder / "val" / "cat", 1)
    write_images(folder / "test" / "cat", 1)


def two_val(folder: Path) -> None:
    for name in ("train", "val", "valid"):
        write_images(folder / name / "cat", 1)


@pytest.mark.filterwarnings("ignore:.*cannot be read:UserWarning")
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (one_class, "only one class, cat; classification needs two"),
        (no_images, "no images in class folders"),
        (no_folders, "no images in class folders"),
        (all_damaged, "train: none of its 2 images can be read"),
        (one_class_damaged, "train: no readable image of dog"),
        (unknown_class_in_test, r"classes \['bird'\] have no images in"),
        (no_train, "has test, val but no train folder"),
        (two_val, "val and valid both stand for val"),
    ],
)
def test_impossible_folder_is_one_clear_line(tmp_path: Path, make: object, message: str) -> None:
    make(tmp_path)  # type: ignore[operator]
    with pytest.raises(ValueError, match=rf"^[^\n]*{message}[^\n]*$"):
        made(tmp_path)


@pytest.mark.parametrize("name", ["/no/such/folder", "./no-such-folder", "a/b/c"])
def test_missing_folder_is_one_clear_line(name: str) -> None:
    with pytest.raises(FileNotFoundError, match=r"no such folder; data is a folder with one subfolder per class"):
        ImageDataModule(name).setup("fit")


def table(labels: list[object], names: list[str] | None = None) -> datasets.Dataset:
    images = [Image.new("RGB", (6, 6), (i, i, i)) for i in range(len(labels))]
    features = datasets.Features(
        image=datasets.Image(), label=datasets.ClassLabel(names=names) if names else datasets.Value("string")
    )
    return datasets.Dataset.from_dict({"image": images, "label": labels}, features=features)


def test_saved_data_set_with_class_labels(tmp_path: Path) -> None:
    both = {"train": table([0, 1] * 5, ["dog", "cat"]), "validation": table([1], ["dog", "cat"])}
    datasets.DatasetDict(both).save_to_disk(tmp_path / "d")
    data = made(tmp_path / "d", test_fraction=0.2)
    assert (data.class_names, {split: len(names(data, split)) for split in data.splits}) == (
        ["dog", "cat"],
        {"train": 8, "test": 2, "val": 1},
    )
    assert next(iter(data.train_dataloader()))["pixel_values"].shape == (8, 3, 8, 8)


def test_saved_data_set_with_names(tmp_path: Path) -> None:
    table(["x", "y"] * 5).save_to_disk(tmp_path / "d")
    assert made(tmp_path / "d").class_names == ["x", "y"]


def test_data_set_without_the_column_is_refused(tmp_path: Path) -> None:
    table(["x", "y"]).save_to_disk(tmp_path / "d")
    with pytest.raises(ValueError, match=r"no column 'img' among \['image', 'label'\]"):
        made(tmp_path / "d", image_column="img")


def test_missing_datasets_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table(["x", "y"]).save_to_disk(tmp_path / "d")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'lightning_oft\[data\]'$"):
        made(tmp_path / "d")


def test_classes_are_numbered_as_the_model_numbers_them(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("model")
    (folder / "config.json").write_text('{"model_type": "vit", "label2id": {"dog": 0, "cat": 1}}')
    data = made(tree, pretrained=str(folder))
    assert data.class_names == ["dog", "cat"]
    assert sum(int(data.splits["train"][i]["labels"]) for i in range(24)) == 16
