"""Pictures and their prompts found: in folders, in data sets, and prompts to sample in files."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from lightning.pytorch.utilities import rank_zero_warn

from lightning_oft.data.base import require
from lightning_oft.data.vision.pixels import decode, image_name

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
METADATA = "metadata.jsonl"


class Captioned(NamedTuple):
    """A picture, not yet decoded, and what is in it."""

    cell: dict[str, Any]
    """{"bytes", "path"}, as `datasets` has undecoded images."""
    prompt: str
    control: dict[str, Any] | None = None
    """The image that it is drawn along, likewise; None where there are none."""


def find_pictures(
    data: str, prompt: str | None, image_column: str, prompt_column: str, control_column: str | None = None
) -> list[Captioned]:
    """The pictures of a folder, a data set written by save_to_disk, or the train split of one on a hub; those that cannot
    be read are left out, with one warning that names them.

    In a folder the prompts are in `metadata.jsonl`, rows of file_name and `prompt_column`, or in a text file beside each
    picture; `prompt` is that of all others. With a `control_column`, the pictures of a folder are those of the rows of
    `metadata.jsonl`, which name a control image each; where that cannot be read, both are left out.

    Raises:
        OSError: there is no folder and no data set at `data`.
        ValueError: there is no readable picture, a picture without prompt or control, or a row without its files.
    """
    folder = Path(data).expanduser()
    is_table = (
        not folder.is_dir() or (folder / "dataset_info.json").is_file() or (folder / "dataset_dict.json").is_file()
    )
    if is_table:
        found = _in_table(data, prompt, image_column, prompt_column, control_column)
    elif control_column is None:
        found = _in_folder(folder, prompt, prompt_column)
    else:
        found = _with_controls(folder, prompt, prompt_column, control_column)
    with ThreadPoolExecutor() as pool:  # Pillow decodes outside Python's lock
        broken = list(pool.map(_broken, found))
    readable = [one for one, cell in zip(found, broken, strict=True) if cell is None]
    if bad := [image_name(cell, row) for row, cell in enumerate(broken) if cell is not None]:
        named = ", ".join(bad[:3]) + (", ..." if len(bad) > 3 else "")
        rank_zero_warn(f"{len(bad)} of {len(found)} pictures cannot be read and are left out: {named}")
    if not readable:
        raise ValueError(f"{data}: no picture that can be read; give a folder of png, jpg or webp files")
    return readable


def _broken(one: Captioned) -> dict[str, Any] | None:
    """The picture or the control image that cannot be read."""
    cells = [one.cell] if one.control is None else [one.cell, one.control]
    return next((cell for cell in cells if decode(cell) is None), None)


def pictures_in(folder: Path) -> list[Path]:
    """The files of pictures in a folder and below it, in the order of their names."""
    return sorted(file for file in folder.rglob("*") if file.suffix.lower() in SUFFIXES)


def _in_folder(folder: Path, prompt: str | None, column: str) -> list[Captioned]:
    prompts = _metadata(folder, column)
    found = []
    for file in pictures_in(folder):
        name, text = file.relative_to(folder).as_posix(), file.with_suffix(".txt")
        beside = text.read_text(encoding="utf-8").strip() if text.is_file() else ""
        said = prompts.pop(name, "") or beside or prompt or ""
        if not said:
            raise ValueError(
                f"{file}: has no prompt; add a row for it to {METADATA}, a {text.name}, or give one for all"
            )
        found.append(Captioned({"bytes": None, "path": str(file)}, said))
    if prompts:
        raise ValueError(f"{folder / METADATA}: {next(iter(prompts))} is no picture there; correct its file_name")
    return found


def _with_controls(folder: Path, prompt: str | None, prompt_column: str, control_column: str) -> list[Captioned]:
    """What the rows of a folder's metadata name, a picture, its control image and its prompt in each."""
    file, found = folder / METADATA, []
    if not file.is_file():
        raise ValueError(f"{file}: is not there; write a row for each picture: file_name, {control_column}, prompt")
    for number, row in enumerate(read_rows(file), 1):
        row.setdefault(prompt_column, prompt)
        wanted = ("file_name", control_column, prompt_column)
        if lacking := [name for name in wanted if not isinstance(row.get(name), str) or not row[name]]:
            raise ValueError(f"{file}, line {number}: has no {lacking[0]}, which is text; has {sorted(row)}")
        cells = [cell_of(folder / row[name], f"{file}, line {number}", name) for name in wanted[:2]]
        found.append(Captioned(cells[0], row[prompt_column], cells[1]))
    return found


def cell_of(path: Path, where: str, column: str) -> dict[str, Any]:
    """An undecoded image of a file. Raises ValueError, saying where it is named, when it is not there."""
    if not path.is_file():
        raise ValueError(f"{where}: its {column}, {path.name}, is not there; correct the path")
    return {"bytes": None, "path": str(path)}


def _metadata(folder: Path, column: str) -> dict[str, str]:
    """By file name, the prompts of a folder's metadata; nothing where there is none."""
    file = folder / METADATA
    rows = read_rows(file) if file.is_file() else []
    for number, row in enumerate(rows, 1):
        if not all(isinstance(row.get(name), str) and row[name] for name in ("file_name", column)):
            raise ValueError(f"{file}, line {number}: needs a file_name and a {column}, both text; has {sorted(row)}")
    return {row["file_name"]: row[column] for row in rows}


def _in_table(
    data: str, prompt: str | None, image_column: str, prompt_column: str, control_column: str | None
) -> list[Captioned]:
    datasets, folder = require("datasets", "datasets"), Path(data).expanduser()
    try:
        found = datasets.load_from_disk(str(folder)) if folder.is_dir() else datasets.load_dataset(data)
    except Exception as error:  # its own classes differ from release to release; the reason is in the text
        reason = str(error).strip().split("\n")[0].rstrip(".")
        raise OSError(f"{data}: no pictures found ({reason}); give a folder of pictures, or a hub id") from error
    table = found["train"] if isinstance(found, dict) else found
    images = [column for column in (image_column, control_column) if column is not None]
    for column in (*images, *([] if prompt else [prompt_column])):
        if column not in table.column_names:
            options = "image_column, prompt_column" + (", control_column" if control_column else "")
            raise ValueError(f"{data}: no column {column!r} among {table.column_names}; set {options}")
    found = table[prompt_column] if prompt_column in table.column_names else [None] * len(table)
    prompts = [str(said or prompt or "") for said in found]
    if "" in prompts:
        raise ValueError(f"{data}: row {prompts.index('')} has no prompt; fill it in, or give one for all")
    cells = [table.cast_column(column, datasets.Image(decode=False))[column] for column in images]
    controls = cells[1] if control_column else [None] * len(table)
    return [Captioned(*row) for row in zip(cells[0], prompts, controls, strict=True)]


def read_prompts(path: str) -> list[dict[str, Any]]:
    """Prompts to sample, {"prompt", "seed", "labels"}, from a file of JSON lines: each a prompt and, by what is to be read
    off the sample, the class that it should show. A seed that is not given is the number of the line.

    Raises OSError when there is no such file, and ValueError, naming the line, when one has no prompt or the first's
    labels are not its own.
    """
    made: list[dict[str, Any]] = []
    for number, row in enumerate(read_rows(Path(path).expanduser())):
        prompt, seed = row.pop("prompt", None), row.pop("seed", number)
        if not isinstance(prompt, str) or not isinstance(seed, int):
            raise ValueError(f"{path}, line {number + 1}: needs a prompt, which is text, and a seed, if any, a number")
        made.append({"prompt": prompt, "seed": seed, "labels": {what: str(name) for what, name in row.items()}})
        if made[-1]["labels"].keys() != made[0]["labels"].keys():
            raise ValueError(f"{path}, line {number + 1}: has the labels {list(row)}, line 1 {list(made[0]['labels'])}")
    if not made:
        raise ValueError(f"{path}: is empty; write a prompt a line")
    return made


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The objects of a file of JSON lines. Raises ValueError, naming the line, where one is none."""
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number}: is no JSON ({error.msg}); write one object a line") from error
        if not isinstance(row, dict):
            raise ValueError(f"{path}, line {number}: is no JSON object; write one a line")
        rows.append(row)
    return rows
