"""Labelled images found and split by `datasets`: folders, saved data sets and hub ids.

A table is a datasets.Dataset with the columns "image" (undecoded: {"bytes", "path"}) and "label" (ClassLabel). Tables are
kept by split: "train", "val" where there is one, then the test sets, "test" or "test_<name>".
"""

import glob
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn

from lightning_oft.data.base import require
from lightning_oft.data.vision.pixels import decode, image_name

Tables = dict[str, Any]


def load_images(data: str, image_column: str, label_column: str, label2id: Mapping[str, int] | None = None) -> Tables:
    """Tables of the images at `data`: a folder with a subfolder per class, or with train/val/test folders of those; a
    folder written by save_to_disk; or a hub id. Class ids are those of `label2id` where it names exactly these classes.

    Raises:
        OSError: When there is no data set at `data`.
        ValueError: When a column is missing, there are fewer than two classes, or a label is none of train's.
    """
    tables = _load_splits(data)
    for column in (image_column, label_column):
        if column not in (found := tables["train"].column_names):
            raise ValueError(f"{data}: no column {column!r} among {found}; set image_column and label_column")
    names = getattr(tables["train"].features[label_column], "names", None)
    name_of = dict(enumerate(names or []))
    labels = {split: [str(name_of.get(v, v)) for v in table[label_column]] for split, table in tables.items()}
    classes = list(names or sorted(set(labels["train"])))
    if len(classes) < 2:
        raise ValueError(f"{data}: only one class, {classes[0]}; classification needs two or more")
    if label2id and set(label2id) == set(classes):
        classes.sort(key=label2id.__getitem__)
    for split, table in tables.items():
        if unknown := sorted(set(labels[split]) - set(classes)):
            raise ValueError(f"{data}: {split} has the label {unknown[0]!r}, which is no class of train")
        tables[split] = _labelled(table, image_column, labels[split], classes)
    return tables


def _labelled(table: Any, image_column: str, labels: list[str], classes: list[str]) -> Any:
    """A table's images with a label column of its own: casting the one that is there would copy the images to a cache."""
    datasets = require("datasets", "datasets")
    images = table.select_columns([image_column]).rename_columns({image_column: "image"})
    images = images.cast_column("image", datasets.Image(decode=False))
    feature = datasets.ClassLabel(names=classes)
    return images.add_column("label", feature.str2int(labels), feature=feature)


def _load_splits(data: str) -> Tables:
    """The data set's own tables by split; a table without splits is "train"."""
    datasets = require("datasets", "datasets")
    path = Path(data).expanduser()
    if not path.is_dir() and (data.startswith(("/", ".", "~")) or data.count("/") > 1):
        raise FileNotFoundError(f"{data}: no such folder; data is a folder with one subfolder per class, or a hub id")
    saved = any((path / name).is_file() for name in ("dataset_info.json", "dataset_dict.json"))
    files = _split_files(path) if path.is_dir() and not saved else None
    try:
        if saved:
            found = datasets.load_from_disk(str(path))
        elif files is None:
            found = datasets.load_dataset(data)
        else:
            # drop_labels=False: by default one class, or folders of unequal depth, would have no labels at all.
            found = datasets.load_dataset("imagefolder", data_dir=str(path), data_files=files, drop_labels=False)
    except Exception as error:  # its own classes differ from release to release; the reason is in the text
        raise OSError(
            f"{data}: no images found ({_first_line(error)}); give a folder with a subfolder of images per class,"
            " a folder written by save_to_disk, or a hub id"
        ) from error
    tables = dict(found) if isinstance(found, dict) else {"train": found}
    named = {split: table for name, table in tables.items() if (split := split_of(name))}
    if "train" not in named:
        raise ValueError(f"{data}: has the splits {list(tables)} but none named train; save it with one")
    return named


def _split_files(root: Path) -> dict[str, list[str]]:
    """Patterns of each split's files: of the split folders where one is train, else of all files as train.

    `datasets` by itself would put test_<name> folders into one test set.
    """
    folders = [f.name for f in sorted(root.iterdir()) if f.is_dir() and not f.name.startswith((".", "__"))]
    splits: dict[str, list[str]] = {}
    for folder in folders:
        if split := split_of(folder):
            splits.setdefault(split, []).append(f"{glob.escape(folder)}/**")
    if splits and "train" not in splits and sum(map(len, splits.values())) == len(folders):
        raise ValueError(f"{root}: has {', '.join(sorted(splits))} but no train folder; add one")
    return splits if "train" in splits else {"train": ["**"]}  # a class may be called "test"


def split_of(name: str) -> str | None:
    """The split that a folder or table stands for: train, val, test or test_<name>; None for any other name."""
    lower = str(name).lower().replace("-", "_")
    aliases = {"training": "train", "valid": "val", "validation": "val", "dev": "val"}
    known = aliases.get(lower, lower)
    return known if known in ("train", "val", "test") or known.startswith("test_") else None


def drop_unreadable(tables: Tables, threads: int = 8) -> Tables:
    """Decode every image once, and leave out those that cannot be read, with one warning that counts and names them.

    Pillow decodes outside Python's lock, in `threads`. Raises ValueError when a split has no readable image, or a class
    none to train on.
    """
    bad: list[str] = []
    kept: Tables = {}
    for split, table in tables.items():
        with ThreadPoolExecutor(threads) as pool:
            good = list(pool.map(lambda row, table=table: decode(table[row]["image"]) is not None, range(len(table))))
        bad += [image_name(table[row]["image"], row) for row, ok in enumerate(good) if not ok]
        if not any(good):
            raise ValueError(f"{split}: none of its {len(table)} images can be read; check the files")
        kept[split] = table.select([row for row, ok in enumerate(good) if ok])
    if bad:
        named = ", ".join(bad[:3]) + (", ..." if len(bad) > 3 else "")
        total = sum(map(len, tables.values()))
        rank_zero_warn(f"{len(bad)} of {total} images cannot be read and are left out: {named}")
    names = kept["train"].features["label"].names
    if missing := set(range(len(names))) - set(kept["train"]["label"]):
        raise ValueError(f"train: no readable image of {', '.join(names[i] for i in sorted(missing))}; add some")
    return kept


def split_train(tables: Tables, fractions: Mapping[str, float], seed: int) -> Tables:
    """Take "val" and "test" out of train where they are missing, the same share of every class; 0 takes nothing.

    Raises ValueError, one line, when there are too few images.
    """
    train = tables["train"]
    # Row numbers are split rather than images: a table that came from files would write a cache beside them.
    rest = train.from_dict({"row": range(len(train)), "label": train["label"]})
    rest = rest.cast_column("label", train.features["label"])
    taken: Tables = {}
    for split, fraction in fractions.items():
        if not fraction or any(name.startswith(split) for name in tables):
            continue
        try:
            size = max(1, round(fraction * len(train)))
            parts = rest.train_test_split(size, stratify_by_column="label", seed=seed)
        except ValueError as error:
            raise ValueError(
                f"{split}_fraction={fraction} of {len(train)} images: {_first_line(error)}; raise it, or set it to 0"
            ) from error
        rest, taken[split] = parts["train"], train.select(parts["test"]["row"])
    return {**tables, "train": train.select(rest["row"]), **taken}


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0].rstrip(".")
