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
    """Tables of the images at `data`, with the class ids of `label2id` where it names exactly these classes.

    Raises OSError when there is no data set, and ValueError when it lacks a column or has labels of no use.
    """
    tables, datasets = _load_splits(data), require("datasets", "datasets")
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
    feature = datasets.ClassLabel(names=classes)
    for split, table in tables.items():
        if unknown := sorted(set(labels[split]) - set(classes)):
            raise ValueError(f"{data}: {split} has the label {unknown[0]!r}, which is no class of train")
        images = table.select_columns([image_column]).rename_columns({image_column: "image"})
        images = images.cast_column("image", datasets.Image(decode=False))
        # A column of its own: casting the one that is there would copy the images to a cache.
        tables[split] = images.add_column("label", feature.str2int(labels[split]), feature=feature)
    return tables


def _load_splits(data: str) -> Tables:
    """The data set's own tables by split; a table without splits is "train"."""
    datasets = require("datasets", "datasets")
    path = Path(data).expanduser()
    try:
        if not path.is_dir():
            found = datasets.load_dataset(data)
        elif any((path / name).is_file() for name in ("dataset_info.json", "dataset_dict.json")):
            found = datasets.load_from_disk(str(path))
        else:
            files = _split_files(path)
            # drop_labels=False: by default one class, or folders of unequal depth, would have no labels at all.
            found = datasets.load_dataset("imagefolder", data_dir=str(path), data_files=files, drop_labels=False)
    except Exception as error:  # its own classes differ from release to release; the reason is in the text
        raise OSError(
            f"{data}: no images found ({_first_line(error)}); give a folder with a subfolder of images per class,"
            " a folder written by save_to_disk, or a hub id"
        ) from error
    tables = dict(found) if isinstance(found, dict) else {"train": found}
    named = {split: table for name, table in tables.items() if (split := _split_of(name))}
    if "train" not in named:
        raise ValueError(f"{data}: has the splits {list(tables)} but none named train; add one")
    return named


def _split_files(root: Path) -> dict[str, str]:
    """A pattern of each split's files: of the split folders where there are some, else of all files as train.

    `datasets` by itself would put test_<name> folders into one test set.
    """
    folders = [f.name for f in sorted(root.iterdir()) if f.is_dir() and not f.name.startswith((".", "__"))]
    splits = {_split_of(folder): f"{glob.escape(folder)}/**" for folder in folders}
    if "train" in splits or (folders and None not in splits):
        return {split: files for split, files in splits.items() if split}
    return {"train": "**"}  # a class may be called "test"


def _split_of(name: str) -> str | None:
    """The split that a folder or table stands for: train, val, test or test_<name>; None for any other name."""
    lower = str(name).lower().replace("-", "_")
    known = {"training": "train", "valid": "val", "validation": "val", "dev": "val"}.get(lower, lower)
    return known if known in ("train", "val", "test") or known.startswith("test_") else None


def drop_unreadable(tables: Tables) -> Tables:
    """Leave out, with one warning, images that cannot be read. Raises ValueError when a class has none to train on."""
    bad: list[str] = []
    kept: Tables = {}
    for split, table in tables.items():
        with ThreadPoolExecutor() as pool:  # Pillow decodes outside Python's lock
            good = list(pool.map(lambda row, table=table: decode(table[row]["image"]) is not None, range(len(table))))
        bad += [image_name(table[row]["image"], row) for row, ok in enumerate(good) if not ok]
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
    """Take the same share of every class out of train for missing splits. Raises ValueError for too few images."""
    train, taken = tables["train"], {}
    # Row numbers are split rather than images: a table that came from files would write a cache beside them.
    rows = train.from_dict({"row": range(len(train)), "label": train["label"]})
    rows = rows.cast_column("label", train.features["label"])
    for split, fraction in fractions.items():
        if not fraction or any(name.startswith(split) for name in tables):
            continue
        size = max(1, round(fraction * len(train)))
        try:
            parts = rows.train_test_split(size, stratify_by_column="label", seed=seed)
        except ValueError as error:
            raise ValueError(
                f"{split}_fraction={fraction} of {len(train)} images: {_first_line(error)}; raise it, or set it to 0"
            ) from error
        rows, taken[split] = parts["train"], train.select(parts["test"]["row"])
    return {**tables, "train": train.select(rows["row"]), **taken}


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0].rstrip(".")
