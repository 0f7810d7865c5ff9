"""Rows of text found and read by `datasets`: local files, folders, saved data sets and hub ids.

A table is a datasets.Dataset, or an IterableDataset when it is streamed. Tables are kept by split: "train", "val" where
there is one, then the test sets under their own names.
"""

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch.utils.data import IterableDataset
from typing_extensions import override

from lightning_oft.data.base import require

Tables = dict[str, Any]

READERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet", ".txt": "text"}
"""datasets' reader of a file, by the file's suffix."""
_OWN = {"validation": "val", "valid": "val", "dev": "val"}


def load_tables(data: str | Mapping[str, str], subset: str | None = None, streaming: bool = False) -> Tables:
    """The tables of a data set by split.

    `data` is one source, or a source for each split. A source is a file, a folder of files whose names begin with a
    split's, a folder written by save_to_disk, or a hub id; a table without splits is "train".

    Raises:
        OSError: One line, when there is no such source.
        ValueError: One line that names file and row, when a file cannot be read as what its suffix says.
    """
    if isinstance(data, str):
        return _load(data, subset, streaming)
    tables: Tables = {}
    for split, source in data.items():
        found = _load(source, subset, streaming)
        tables[_OWN.get(split, split)] = found[split] if split in found else next(iter(found.values()))
    return tables


def _load(source: str, subset: str | None, streaming: bool) -> Tables:
    datasets, path = require("datasets", "datasets"), Path(source).expanduser()
    if any((path / name).is_file() for name in ("dataset_info.json", "dataset_dict.json")):
        found = datasets.load_from_disk(str(path))
        return _named(found if isinstance(found, dict) else {"train": found})
    files = _files(source, path)
    try:
        if not files:
            return _named(datasets.load_dataset(source, subset, streaming=streaming))
        (reader,) = {READERS[file.suffix] for group in files.values() for file in group}
        options: dict[str, Any] = {"delimiter": "\t"} if next(iter(files.values()))[0].suffix == ".tsv" else {}
        names = {split: [str(file) for file in group] for split, group in files.items()}
        found = datasets.load_dataset(reader, data_files=names, streaming=streaming, **options)
        for table in found.values():
            columns_of(table)  # a streamed file that cannot be read says so now
        return _named(found)
    except Exception as error:  # datasets wraps what its readers raise, and raises many kinds itself
        for file in (file for group in files.values() for file in group):
            check_lines(file)
        reason = str(error.__cause__ or error).strip().split("\n")[0][:300] or "it holds no row"
        raise (ValueError if files else OSError)(
            f"{source}: could not be read ({reason}); give a file, a folder or a hub id"
        ) from error


def _named(tables: Mapping[Any, Any]) -> Tables:
    return {_OWN.get(str(split), str(split)): table for split, table in tables.items()}


def columns_of(table: Any) -> list[str]:
    """The names of a table's columns; those of a streamed file are often not known before a row of it is read. Raises
    ValueError where it holds none."""
    if table.column_names is not None:
        return list(table.column_names)
    if (row := next(iter(table), None)) is None:
        raise ValueError("it holds no row")
    return list(row)


def _files(source: str, path: Path) -> dict[str, list[Path]]:
    """The files of a local source by split; none for a hub id. Raises OSError, one line, when there is nothing."""
    if path.is_file() or path.suffix in READERS:
        if not path.is_file():
            raise FileNotFoundError(f"{source}: no such file")
        if path.suffix not in READERS:
            raise OSError(f"{source}: {path.suffix or 'no suffix'} is none of {', '.join(READERS)}")
        return {"train": [path]}
    if not path.is_dir():
        if source.startswith(("/", ".", "~")) or source.count("/") > 1:
            raise FileNotFoundError(f"{source}: no such file or folder; data is one of those, or a hub id")
        return {}
    files: dict[str, list[Path]] = {}
    found = sorted(file for file in path.rglob("*") if file.suffix in READERS)
    for file in found:
        parts = [*file.relative_to(path).parts[:-1], file.stem]
        split = next((part.split("-")[0].lower() for part in parts if _is_split(part)), "train")
        files.setdefault(split, []).append(file)
    if len(kinds := sorted({file.suffix for file in found})) != 1:
        raise OSError(
            f"{source}: holds {', '.join(kinds) or 'no file of text'}; give files of one kind of {', '.join(READERS)}"
        )
    return files


def _is_split(name: str) -> bool:
    return name.lower().split("-")[0].split("_")[0] in ("train", "val", "test", *_OWN)


@contextlib.contextmanager
def naming_lines(data: str | Mapping[str, str]) -> Iterator[None]:
    """Within, what a reader raises for a line of the local files of a data set becomes check_lines' ValueError."""
    try:
        yield
    except Exception as error:
        if type(error) is not ValueError:  # those are ours, and name a row
            for source in [data] if isinstance(data, str) else data.values():
                for file in (file for group in _files(source, Path(source).expanduser()).values() for file in group):
                    check_lines(file)
        raise


class Stream(IterableDataset[Any]):
    """The rows of a streamed table; a line that cannot be read is named when it is reached."""

    def __init__(self, table: Any, data: str | Mapping[str, str]) -> None:
        self.table, self.data = table, data

    @override
    def __iter__(self) -> Iterator[Any]:
        with naming_lines(self.data):
            yield from self.table


def check_lines(file: Path) -> None:
    """Raise ValueError, one line that names the first line of a file that is not UTF-8, or in a .jsonl no JSON object."""
    if READERS.get(file.suffix) == "parquet":
        _check_cells(file)
        return
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            try:
                text = line.decode("utf-8")
                if file.suffix == ".jsonl" and text.strip() and not isinstance(json.loads(text), dict):
                    raise ValueError("no JSON object")
            except UnicodeDecodeError as error:
                raise ValueError(
                    f"{file}, line {number}: byte {error.start + 1} is not UTF-8; convert the file, as with iconv"
                ) from None
            except ValueError as error:
                raise ValueError(f"{file}, line {number}: not a JSON object ({error})") from None


def _check_cells(file: Path) -> None:
    """Raise ValueError, one line that names the first row of a parquet file in which a text is not UTF-8."""
    arrow, parquet = require("pyarrow", "datasets"), require("pyarrow.parquet", "datasets")
    with contextlib.suppress(arrow.ArrowException, OSError):  # of no parquet file, which its reader has said already
        number = 0
        for batch in parquet.ParquetFile(file).iter_batches():
            for row in range(batch.num_rows):
                number += 1
                for name, column in zip(batch.schema.names, batch.columns, strict=True):
                    try:
                        column[row].as_py()
                    except UnicodeDecodeError:
                        raise ValueError(f"{file}, row {number}: {name} is not UTF-8; write the file anew") from None
