import json
import sys
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor

from lightning_oft.data import ImageDataModule
from lightning_oft.data.vision.pixels import image_transform, model_files


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


def files(data: ImageDataModule, split: str) -> list[str]:
    part: Any = data.splits[split]
    return ["/".join(Path(row["image"]["path"]).parts[-2:]) for row in part.with_format(None)]


def sizes(data: ImageDataModule) -> dict[str, int]:
    return {split: len(part) for split, part in data.splits.items()}  # type: ignore[arg-type]


def test_folders_are_classes(tree: Path) -> None:
    data = made(tree)
    assert (data.class_names, data.num_classes, data.test_names) == (["cat", "dog"], 2, ["test"])
    assert sizes(data) == {"train": 24, "test": 3, "val": 3}
    batch = next(iter(data.train_dataloader()))
    assert tuple(batch) == ("pixel_values", "labels")
    assert (batch["pixel_values"].shape, batch["pixel_values"].dtype) == ((24, 3, 8, 8), torch.float32)
    assert sorted(batch["labels"].tolist()) == [0] * 16 + [1] * 8


def test_split_folders_are_the_splits(tmp_path: Path) -> None:
    for split, count in (("train", 4), ("val", 2), ("test", 3), ("test-night", 1)):
        write_images(tmp_path / split / "cat", count)
        write_images(tmp_path / split / "dog", count)
    data = made(tmp_path)
    assert sizes(data) == {"train": 8, "val": 4, "test": 6, "test_night": 2}
    assert data.test_names == ["test", "test_night"]


def test_missing_split_folder_is_taken_out_of_training(tmp_path: Path) -> None:
    write_images(tmp_path / "train" / "a", 10)
    write_images(tmp_path / "train" / "b", 10)
    write_images(tmp_path / "test" / "a", 2)
    assert sizes(made(tmp_path, val_fraction=0.2)) == {"train": 16, "val": 4, "test": 2}


def test_split_repeats_and_seeds_differ(tree: Path) -> None:
    everything = files(made(tree, val_fraction=0, test_fraction=0), "train")
    assert everything == sorted(everything)  # on every file system
    assert files(made(tree), "test") == files(made(tree), "test")
    assert files(made(tree), "test") != files(made(tree, seed=1), "test")


@pytest.mark.parametrize("workers", [0, 2])
def test_training_batches_repeat_with_the_seed(tree: Path, workers: int) -> None:
    def batches(seed: int) -> list[torch.Tensor]:
        torch.manual_seed(seed)
        loader = made(tree, seed=seed, num_workers=workers).train_dataloader()
        return [batch["pixel_values"] for _ in range(2) for batch in loader]

    first, again, other = batches(0), batches(0), batches(1)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], first[1])  # another epoch, another augmentation
    assert not torch.equal(first[0], other[0])


def test_only_training_is_augmented(tree: Path) -> None:
    data = made(tree)
    for split, same in (("val", True), ("test", True), ("train", False)):
        once, again = ([data.splits[split][i]["pixel_values"] for i in range(3)] for _ in range(2))
        assert torch.equal(torch.stack(once), torch.stack(again)) == same


@pytest.mark.parametrize("damage", ["cut", "text", "empty"])
def test_unreadable_images_are_counted_named_and_left_out(tree: Path, damage: str) -> None:
    for name in ("cat/3.png", "dog/1.png"):
        content = (tree / name).read_bytes()
        (tree / name).write_bytes({"cut": content[: len(content) // 2], "text": b"no image", "empty": b""}[damage])
    with pytest.warns(UserWarning, match=r"2 of 30 images cannot be read and are left out: cat/3.png, dog/1.png$"):
        data = made(tree)
    assert sum(sizes(data).values()) == 28
    assert len(list(data.train_dataloader())) == 1


def test_image_cut_short_is_left_out_of_its_batch_where_none_are_checked_before(tree: Path) -> None:
    for name in files(made(tree), "val")[:1]:
        (tree / name).write_bytes((tree / name).read_bytes()[:300])
    data = made(tree, verify=False)
    assert sum(sizes(data).values()) == 30
    with pytest.warns(UserWarning, match="left out of its batch"):
        batch = next(iter(data.val_dataloader()[0]))
    assert len(batch["labels"]) == 2


def test_cameras_orientation_is_respected(tree: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    image = Image.open(tree / "cat/0.png")
    turned = image.transpose(Image.Transpose.ROTATE_180)
    image.save(tree / "cat/0.png", exif=exif)
    data = made(tree, val_fraction=0, test_fraction=0, min_crop=1, horizontal_flip=0)
    turned.save(tree / "upright.png")
    pixels = data.splits["train"][files(data, "train").index("cat/0.png")]["pixel_values"]
    expected = image_transform(*model_files(None), image_size=8).pixels(Image.open(tree / "upright.png"))
    torch.testing.assert_close(pixels, expected)


def one_class(folder: Path) -> None:
    write_images(folder / "cat", 2)


def no_images(folder: Path) -> None:
    (folder / "cat").mkdir()
    (folder / "dog").mkdir()
    (folder / "dog" / "notes.txt").touch()


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


def too_few_to_split(folder: Path) -> None:
    write_images(folder / "cat", 2)
    write_images(folder / "dog", 2)


@pytest.mark.filterwarnings("ignore:.*cannot be read:UserWarning")
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (one_class, "only one class, cat; classification needs two"),
        (no_images, "no images found"),
        (all_damaged, "train: no readable image of cat, dog; add some"),
        (one_class_damaged, "train: no readable image of dog"),
        (unknown_class_in_test, "train: no readable image of bird"),
        (no_train, r"has the splits \[\'test\', \'val\'\] but none named train; add one"),
        (too_few_to_split, "test_fraction=0.1 of 4 images: .*; raise it, or set it to 0"),
    ],
)
def test_impossible_folder_is_one_clear_line(tmp_path: Path, make: object, message: str) -> None:
    make(tmp_path)  # type: ignore[operator]
    with pytest.raises((ValueError, OSError), match=rf"^[^\n]*{message}[^\n]*$"):
        made(tmp_path)


@pytest.mark.parametrize("name", ["/no/such/folder", "./no-such-folder", "a/b/c"])
def test_missing_folder_is_one_clear_line(name: str) -> None:
    with pytest.raises(OSError, match=rf"^{name}: no images found \([^\n]*\); give a folder with a subfolder[^\n]*$"):
        ImageDataModule(name).setup("fit")


def table(labels: list[object], names: list[str] | None = None) -> datasets.Dataset:
    images = [Image.new("RGB", (6, 6), (i, i, i)) for i in range(len(labels))]
    features = datasets.Features(
        image=datasets.Image(), label=datasets.ClassLabel(names=names) if names else datasets.Value("string")
    )
    return datasets.Dataset.from_dict({"image": images, "label": labels}, features=features)


def test_saved_data_set_with_class_labels(tmp_path: Path) -> None:
    both = {"train": table([0, 1] * 10, ["dog", "cat"]), "validation": table([1], ["dog", "cat"])}
    datasets.DatasetDict(both).save_to_disk(tmp_path / "d")
    data = made(tmp_path / "d", test_fraction=0.2)
    assert (data.class_names, sizes(data)) == (["dog", "cat"], {"train": 16, "val": 1, "test": 4})
    assert next(iter(data.train_dataloader()))["pixel_values"].shape == (16, 3, 8, 8)


def test_saved_data_set_with_names_and_other_columns(tmp_path: Path) -> None:
    renamed = table(["x", "y"] * 10).rename_columns({"image": "img", "label": "kind"})
    renamed.save_to_disk(tmp_path / "d")
    data = made(tmp_path / "d", image_column="img", label_column="kind")
    assert (data.class_names, sizes(data)) == (["x", "y"], {"train": 16, "test": 2, "val": 2})
    with pytest.raises(ValueError, match=r"no column 'image' among \['img', 'kind'\]"):
        made(tmp_path / "d")


def test_empty_cells_are_left_out(tmp_path: Path) -> None:
    filled = table(["x", "y"] * 10)
    columns = {"image": [None, *filled["image"][1:]], "label": filled["label"]}
    datasets.Dataset.from_dict(columns, features=filled.features).save_to_disk(tmp_path / "d")
    with pytest.warns(UserWarning, match=r"1 of 20 images cannot be read and are left out: row 0$"):
        made(tmp_path / "d")


def test_missing_datasets_names_the_extra(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'lightning_oft\[data\]'$"):
        made(tree)


def test_classes_are_numbered_as_the_model_numbers_them(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("model")
    (folder / "config.json").write_text(
        json.dumps({"model_type": "vit", "label2id": {"dog": 0, "cat": 1}, "id2label": {0: "dog", 1: "cat"}})
    )
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_processor_type": "ViTImageProcessor"}))
    data = made(tree, pretrained=str(folder))
    assert data.class_names == ["dog", "cat"]
    assert sum(int(data.splits["train"][i]["labels"]) for i in range(24)) == 16


@pytest.mark.parametrize("arguments", [{"val_fraction": 1.0}, {"val_fraction": 0.5, "test_fraction": 0.5}])
def test_fractions_leave_a_training_set(arguments: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="leave a training set"):
        ImageDataModule("anywhere", **arguments)  # type: ignore[arg-type]


def test_processor_of_the_run_is_written_beside_an_export(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    companion = made(tree, channels=1).processor
    companion.save_pretrained(folder := tmp_path_factory.mktemp("export"))
    again: Any = AutoImageProcessor.from_pretrained(folder)  # type: ignore[no-untyped-call]
    assert again(Image.new("L", (20, 20)), return_tensors="pt")["pixel_values"].shape == (1, 1, 8, 8)
