"""A write is whole or nothing: errors leave what was there, and a kill at any point leaves nothing that lies."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import stat
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lightning_oft import OFTConfig, inject, save_adapter
from lightning_oft.formats import AdapterFileError, atomic, read_adapter
from lightning_oft.formats.peft import write_peft
from lightning_oft.model.adapter_state import take


def _model(value: float = 0.1, width: int = 8) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(width, 4))
    inject(model, OFTConfig(oft_block_size=4))
    model[0].oft_R["default"].weight.data.fill_(value)  # type: ignore[operator, union-attr, index]
    return model


def _value(directory: Path) -> float:
    return float(read_adapter(directory).generators()["0"][0, 0])


def _snapshot(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_a_new_directory_appears_with_its_parents_and_usual_permissions(tmp_path: Path) -> None:
    place = tmp_path / "runs" / "one"
    save_adapter(_model(), place)
    assert _value(place) == pytest.approx(0.1)
    (tmp_path / "ordinary").mkdir()
    assert stat.S_IMODE(place.stat().st_mode) == stat.S_IMODE((tmp_path / "ordinary").stat().st_mode)
    assert [path.name for path in place.parent.iterdir()] == ["one"]


def test_an_adapter_is_replaced_and_what_stands_beside_it_stays(tmp_path: Path) -> None:
    save_adapter(_model(0.1), tmp_path)
    (tmp_path / "README.md").write_text("mine")  # in place of ours
    save_adapter(_model(0.2), str(tmp_path))
    assert _value(tmp_path) == pytest.approx(0.2)
    assert sorted(_snapshot(tmp_path)) == ["README.md", "adapter_config.json", "adapter_model.safetensors"]
    assert (tmp_path / "README.md").read_text() == "mine"


def test_a_card_of_this_library_is_written_again_with_the_adapter(tmp_path: Path) -> None:
    place = save_adapter(_model(0.1), tmp_path / "adapter", metrics={"accuracy": 0.25})
    assert "0.25" in (place / "README.md").read_text()
    save_adapter(_model(0.2), place)
    assert "0.25" not in (place / "README.md").read_text()
    (place / "README.md").unlink()
    (place / "README.md").mkdir()  # which is not ours either
    save_adapter(_model(0.3), place)
    assert _value(place) == pytest.approx(0.3)
    assert (place / "README.md").is_dir()


def test_a_linked_directory_is_written_where_it_points(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    save_adapter(_model(), tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert _value(tmp_path / "real") == pytest.approx(0.1)


@pytest.mark.parametrize("there", [False, True], ids=["new", "over_another"])
def test_a_full_disk_is_one_error_and_changes_nothing(there: bool, tmp_path: Path) -> None:
    place = tmp_path / "adapter"
    if there:
        save_adapter(_model(0.1), place)
    before = _snapshot(place) if there else {}
    contents = take(_model(0.2, width=1024))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
    try:
        with pytest.raises(
            AdapterFileError, match=r"cannot be written \(File too large\); what was there is unchanged"
        ) as caught:
            write_peft(contents, place)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "\n" not in str(caught.value)
    assert (_snapshot(place) if there else {}) == before
    assert [path.name for path in tmp_path.iterdir()] == (["adapter"] if there else [])


def test_a_place_that_cannot_be_written_is_one_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for place in (tmp_path / "file", tmp_path / "file" / "adapter"):
        with pytest.raises(AdapterFileError, match="the adapter cannot be written"):
            save_adapter(_model(), place)
    assert _snapshot(tmp_path) == {"file": b"mine"}


def test_a_read_only_directory_is_one_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_adapter(_model(0.1), tmp_path)
    tmp_path.chmod(0o555)
    if os.geteuid() == 0:  # root writes anywhere: it is told what others are

        def mkdir(self: Path, *_: Any, **__: Any) -> None:
            raise PermissionError(errno.EACCES, "Permission denied", str(self))

        monkeypatch.setattr(Path, "mkdir", mkdir)
    with pytest.raises(AdapterFileError, match="Permission denied"):
        save_adapter(_model(0.2), tmp_path)
    tmp_path.chmod(0o755)
    assert _value(tmp_path) == pytest.approx(0.1)


@pytest.mark.parametrize("call", range(4))
def test_an_error_at_any_rename_puts_the_old_files_back(
    call: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_adapter(_model(0.1), tmp_path)
    before, calls, replace = _snapshot(tmp_path), iter(range(100)), os.replace

    def failing(source: Path, target: Path) -> None:
        if next(calls) == call:
            raise OSError(5, "Input/output error")
        replace(source, target)

    monkeypatch.setattr(os, "replace", failing)
    monkeypatch.setattr(atomic, "_exchanged", lambda *_: False)  # as on file systems that cannot
    with pytest.raises(AdapterFileError, match="Input/output error"):
        save_adapter(_model(0.2), tmp_path)
    assert _snapshot(tmp_path) == before
    monkeypatch.undo()
    save_adapter(_model(0.2), tmp_path)


KILLED = """
import json, os, pathlib, shutil, sys
import lightning_oft.formats.atomic as writing
from lightning_oft.formats.peft import write_peft
from lightning_oft.model.adapter_state import take
from test_writing import _model, _value
from lightning_oft.formats import AdapterFileError
root = pathlib.Path(sys.argv[1])
old, new = take(_model(0.1)), take(_model(0.2))
seen = set()
exchange = writing._exchanged
for kind in ("at_once", "ours", "peft", "new"):
    writing._exchanged = exchange if kind == "at_once" else lambda *_: False
    for step in range(100):
        place = root / f"{kind}{step}"
        if kind != "new":
            write_peft(old, place)
        if kind == "peft":
            raw = json.loads((place / "adapter_config.json").read_text())
            del raw["lightning_oft"]
            (place / "adapter_config.json").write_text(json.dumps(raw))
        child = os.fork()
        if child == 0:
            left = [step]
            def counted(function):
                def call(*args, **options):
                    if left[0] == 0:
                        os._exit(9)
                    left[0] -= 1
                    return function(*args, **options)
                return call
            for module, name in ((os, "replace"), (os, "fsync"), (pathlib.Path, "rename"), (pathlib.Path, "mkdir"), (shutil, "rmtree")):
                setattr(module, name, counted(getattr(module, name)))
            write_peft(new, place)
            os._exit(0)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        try:
            value = round(_value(place), 3)
        except AdapterFileError:
            value = None
        seen.add((kind, value))
        assert value in (0.1, 0.2, None), (kind, step, value)
        if code == 0:
            assert value == 0.2
            break
        write_peft(new, place)
        assert round(_value(place), 3) == 0.2
print(sorted(seen, key=str))
"""


@pytest.mark.subprocess
def test_a_kill_at_any_point_leaves_the_old_the_new_or_an_error(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path)], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert sys.platform != "linux" or "('at_once', None)" not in done.stdout
    for case in (
        "('at_once', 0.1)",
        "('at_once', 0.2)",
        "('new', None)",
        "('new', 0.2)",
        "('ours', 0.1)",
        "('ours', None)",
        "('ours', 0.2)",
        "('peft', 0.1)",
        "('peft', None)",
    ):
        assert case in done.stdout


def _seen(directory: Path) -> float | None:
    with contextlib.suppress(AdapterFileError):
        return round(_value(directory), 3)
    return None


def test_a_reader_beside_two_writers_never_sees_a_mixture(tmp_path: Path) -> None:
    contents = [take(_model(value)) for value in (0.1, 0.2)]
    place = tmp_path / "adapter"

    def write(which: int) -> None:
        for _ in range(20):
            with contextlib.suppress(AdapterFileError):
                write_peft(contents[which], place)

    threads = [threading.Thread(target=write, args=(which,)) for which in (0, 1)]
    for thread in threads:
        thread.start()
    seen = set()
    while any(thread.is_alive() for thread in threads):
        seen.add(_seen(place))
    for thread in threads:
        thread.join()
    assert seen <= {0.1, 0.2, None}
    write_peft(contents[0], place)
    assert _seen(place) == 0.1
    assert sorted(_snapshot(place)) == ["README.md", "adapter_config.json", "adapter_model.safetensors"]
