"""Where images come from: a tree of folders, or a data set read with `datasets`. Both become lists of `Sample`."""

from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import import_module
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.pytorch.utilities import rank_zero_warn

from lightning_oft.data.vision.pixels import looks_local

if TYPE_CHECKING:
    from PIL.Image import Image

SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"})
VAL_NAMES = ("val", "valid", "validation", "dev")


@dataclass(frozen=True)
class Sample:
    """One labelled image: a file, or a row of a table."""

    name: str
    """Unique and the same on every machine: the path below the data folder, or split and row number."""
    label: int
    """Index into `Source.classes`."""
    path: Path | None = None
    rows: Any = None
    """The table (datasets.Dataset, its images not decoded), read at `row` when there is no path."""
    row: int = 0
    column: str = "image"

    def open(self) -> "Image":
        """The image, its pixels decoded later. Raises OSError where Pillow cannot read it."""
        image_module = require("PIL.Image", "pillow")
        if self.path is not None:
            image = image_module.open(self.path)
        else:
            cell = self.rows[self.row][self.column] or {}
            if not cell.get("bytes") and not cell.get("path"):
                raise OSError(f"{self.name}: an empty image")
            image = image_module.open(BytesIO(cell["bytes"]) if cell.get("bytes") else cell["path"])
        return image  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Source:
    """What was found: the classes in the order of their labels, and samples by split."""

    classes: list[str]
    splits: dict[str, list[Sample]]
    """Keys: "train", "val" where there is one, then the test sets: "test" or "test_<name>"."""


def require(module: str, package: str) -> Any:
    """Import an optional module, or say in one line what to install."""
    try:
        return import_module(module)
    except ImportError as error:
        raise ModuleNotFoundError(
            f"{package} is not installed; images and data sets need it: pip install 'lightning_oft[data]'"
        ) from error


def find_images(data: str, image_column: str = "image", label_column: str = "label") -> Source:
    """Read a folder tree, or failing that a `datasets` folder or hub id.

    Args:
        data: The folder with a subfolder per class, or with train/val/test folders of those; or a folder written by
            `Dataset.save_to_disk`; or a hub id.
        image_column: The column of a data set that holds the images.
        label_column: The column of a data set that holds class ids (ClassLabel) or names.

    Raises:
        OSError: When there is nothing at `data`.
        ValueError: When there are no images, no classes or one class only.
    """
    path = Path(data).expanduser()
    if path.is_dir() and not any((path / name).is_file() for name in ("dataset_info.json", "dataset_dict.json")):
        source = _read_folder(path)
    elif path.exists() or not looks_local(data):
        source = _read_dataset(data, image_column, label_column)
    else:
        raise FileNotFoundError(f"{data}: no such folder; data is a folder with one subfolder per class, or a hub id")
    if len(source.classes) < 2:
        raise ValueError(
            f"{data}: {'only one class, ' + source.classes[0] if source.classes else 'no images in class folders'};"
            " classification needs two or more subfolders (or labels) with images"
        )
    return source


def split_role(name: str) -> str | None:
    """The split a folder's or a table's name stands for: train, val, test, test_<name>; None for anything else."""
    lower = name.lower().replace("-", "_")
    if lower in ("train", "training"):
        return "train"
    if lower in VAL_NAMES:
        return "val"
    return lower if lower == "test" or lower.startswith("test_") else None


def _read_folder(root: Path) -> Source:
    folders = _subfolders(root)
    roles: dict[str, Path] = {}
    for folder in folders:
        role = split_role(folder.name)
        if role in roles:
            raise ValueError(f"{root}: {roles[role].name} and {folder.name} both stand for {role}; keep one")
        if role is not None:
            roles[role] = folder
    if "train" not in roles:  # folders named like splits are classes then: a class may be called "test"
        if roles and len(roles) == len(folders):
            raise ValueError(
                f"{root}: has {', '.join(sorted(roles))} but no train folder; add one, or put classes there"
            )
        roles = {"train": root}
    classes = [folder.name for folder in _subfolders(roles["train"]) if any(_images(folder))]
    splits: dict[str, list[Sample]] = {}
    for role, folder in sorted(roles.items()):
        unknown = {f.name for f in _subfolders(folder) if any(_images(f))} - set(classes)
        if unknown:
            raise ValueError(
                f"{folder}: classes {sorted(unknown)} have no images in {roles['train']}; move or remove them"
            )
        splits[role] = [
            Sample(image.relative_to(root).as_posix(), label, image)
            for label, name in enumerate(classes)
            for image in sorted(_images(folder / name))
        ]
    return Source(classes, splits)


def _subfolders(folder: Path) -> list[Path]:
    return sorted(f for f in folder.iterdir() if f.is_dir() and not f.name.startswith((".", "__")))


def _images(folder: Path) -> Iterable[Path]:
    return (p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES and not p.name.startswith(".") and p.is_file())


def _read_dataset(data: str, image_column: str, label_column: str) -> Source:
    tables = _load_tables(data)
    first = tables["train"]
    for column in (image_column, label_column):
        if column not in first.column_names:
            raise ValueError(
                f"{data}: no column {column!r} among {first.column_names}; set image_column and label_column"
            )
    image_type = require("datasets", "datasets").Image
    names = getattr(first.features[label_column], "names", None)
    classes = list(names) if names else sorted({str(value) for value in first[label_column]})
    label_of = {name: label for label, name in enumerate(classes)}
    splits: dict[str, list[Sample]] = {}
    for role, table in tables.items():
        values = table[label_column]
        labels = [value if names else label_of.get(str(value), -1) for value in values]
        bad = next((i for i, label in enumerate(labels) if label is None or not 0 <= label < len(classes)), None)
        if bad is not None:
            raise ValueError(
                f"{data}: {role} row {bad} has label {values[bad]!r}, which is none of the {len(classes)} classes"
            )
        rows = table.cast_column(image_column, image_type(decode=False))
        splits[role] = [Sample(f"{role}/{i}", n, None, rows, i, image_column) for i, n in enumerate(labels)]
    return Source(classes, splits)


def _load_tables(data: str) -> Mapping[str, Any]:
    """The tables of a data set by split role; a single unnamed table is `train`."""
    datasets = require("datasets", "datasets")
    try:
        found = datasets.load_from_disk(data) if Path(data).is_dir() else datasets.load_dataset(data)
    except Exception as error:  # its own classes differ from release to release; the reason is in the text
        reason = str(error).strip().split("\n")[0]
        raise OSError(
            f"{data}: cannot be read as a data set ({reason}); give a folder of images or a hub id"
        ) from error
    if not isinstance(found, dict):
        return {"train": found}
    roles = {role: table for name, table in found.items() if (role := split_role(str(name)))}
    if "train" not in roles:
        raise ValueError(f"{data}: has the splits {list(found)} but none named train; save it with one")
    return roles


def drop_unreadable(source: Source, decode: bool, threads: int = 8) -> Source:
    """Open every image once and leave out those that cannot be read, with one warning that counts and names them.

    Args:
        source: What was found.
        decode: Decode every pixel, which also finds files cut short: a few milliseconds an image. False reads the
            header only, about 0.1 ms.
        threads: Pillow decodes outside Python's lock.

    Raises:
        ValueError: When a split has no readable image, or a class none to train on.
    """
    samples = [sample for split in source.splits.values() for sample in split]
    with ThreadPoolExecutor(threads) as pool:
        good = list(pool.map(lambda sample: is_readable(sample, decode), samples))
    bad = {sample.name for sample, ok in zip(samples, good, strict=True) if not ok}
    if bad:
        named = ", ".join(sorted(bad)[:3]) + (", ..." if len(bad) > 3 else "")
        rank_zero_warn(f"{len(bad)} of {len(samples)} images cannot be read and are left out: {named}")
    splits = {role: [s for s in split if s.name not in bad] for role, split in source.splits.items()}
    for role, split in splits.items():
        if not split:
            raise ValueError(f"{role}: none of its {len(source.splits[role])} images can be read; check the files")
    missing = set(range(len(source.classes))) - {sample.label for sample in splits["train"]}
    if missing:
        raise ValueError(
            f"train: no readable image of {', '.join(source.classes[i] for i in sorted(missing))}; add some"
        )
    return Source(source.classes, splits)


def is_readable(sample: Sample, decode: bool = True) -> bool:
    """Whether Pillow can open (and decode) the image."""
    bomb = require("PIL.Image", "pillow").DecompressionBombError
    try:
        with sample.open() as image:
            if decode:
                image.draft("L", (1, 1))  # a JPEG is then read to its end but decoded at an eighth of its size
                image.load()
    except (OSError, SyntaxError, ValueError, bomb):  # Pillow's decoders raise all four on damaged files
        return False
    return True
