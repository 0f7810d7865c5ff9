"""Nothing that is loaded can run code, reach outside its directory, or take memory that it does not bring along."""

from __future__ import annotations

import io
import json
import os
import pickle
import re
import resource
import struct
import sys
import tracemalloc
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from bad_inputs.table import CONFIG, TENSORS, Bench, Exit, Net, fields
from small import Small, loader, oft, trainer

from lightning_oft import OFTFinetuning, load_adapter, load_from_checkpoint
from lightning_oft.cli import main
from lightning_oft.formats import AdapterFileError, checkpoint_file, read_adapter
from lightning_oft.formats.checkpoint import CheckpointError

MIB = 2**20
RAN = "LIGHTNING_OFT_BOMB_WENT_OFF"


class Bomb:
    """Unpickling this leaves a mark."""

    def __reduce__(self) -> Any:
        return exec, (f"import os; os.environ[{RAN!r}] = '1'",)


@pytest.fixture(autouse=True)
def _nothing_ran() -> Iterator[None]:
    os.environ.pop(RAN, None)
    yield
    assert RAN not in os.environ


def test_the_bomb_of_these_tests_goes_off() -> None:
    pickle.loads(pickle.dumps(Bomb()))
    assert os.environ.pop(RAN) == "1"


@contextmanager
def at_most(mib: float) -> Iterator[None]:
    """Fail where Python allocates more at any one time, and where torch, outside tracemalloc, takes 256 MiB beyond it."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + int((mib + 256) * MIB), before[1]))
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < mib * MIB
    finally:
        tracemalloc.stop()
        resource.setrlimit(resource.RLIMIT_AS, before)


# ---- code ------------------------------------------------------------------------------------------------------------


def _zipped(content: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


BOMBS: dict[str, Callable[[], bytes]] = {
    "pickle": lambda: pickle.dumps(Bomb()),
    "protocol 0": lambda: pickle.dumps(Bomb(), protocol=0),
    "torch.save": lambda: _zipped(Bomb()),
    "inside a checkpoint": lambda: _zipped({"state_dict": {"w": torch.zeros(2)}, "callbacks": Bomb()}),
    "inside our entry": lambda: _zipped({"state_dict": {}, "lightning_oft": {"version": 1, "adapters": Bomb()}}),
    "in the hyperparameters": lambda: _zipped({"state_dict": {}, "hyper_parameters": {"lr": Bomb()}}),
}


@pytest.mark.parametrize("name", [TENSORS, "adapter_model.bin", CONFIG])
def test_a_pickle_in_an_adapter_directory_is_never_executed(name: str, tmp_path: Path) -> None:
    place = Bench(tmp_path).adapter(fields())
    if name == "adapter_model.bin":
        (place / TENSORS).unlink()
    for bomb in BOMBS.values():
        (place / name).write_bytes(bomb())
        with pytest.raises(AdapterFileError):
            load_adapter(Net(), place)
        assert main(["info", str(place)]) == 2


@pytest.mark.parametrize("bomb", BOMBS.values(), ids=BOMBS)
def test_a_pickle_in_a_checkpoint_is_never_executed(bomb: Callable[[], bytes], tmp_path: Path) -> None:
    path = tmp_path / "x.ckpt"
    path.write_bytes(bomb())
    with pytest.raises(CheckpointError):
        load_from_checkpoint(Small, path)
    assert main(["info", str(path)]) == 2
    assert main(["export", "--checkpoint", str(path), "--output", str(tmp_path / "out")]) == 2
    assert main(["merge", "--base", "x", "--adapter", str(path), "--output", str(tmp_path / "out")]) == 2
    assert list(tmp_path.iterdir()) == [path]


def test_a_run_does_not_execute_the_checkpoint_it_starts_from(tmp_path: Path) -> None:
    path = tmp_path / "x.ckpt"
    path.write_bytes(BOMBS["inside a checkpoint"]())
    with pytest.raises(pickle.UnpicklingError):  # torch's own refusal, through Lightning
        trainer(tmp_path, oft()).fit(Small(), loader(), loader(), ckpt_path=str(path))


@pytest.mark.parametrize("maker", ["os.system", "lightning.pytorch.cli.instantiate_module2", ["os.system"]])
def test_a_checkpoint_cannot_name_what_builds_it(maker: Any, tmp_path: Path) -> None:
    torch.save({"state_dict": {}, "hyper_parameters": {"_instantiator": maker, "lr": 0.1}}, tmp_path / "x.ckpt")
    with pytest.raises(CheckpointError, match="which is not Lightning's own"):
        load_from_checkpoint(Small, tmp_path / "x.ckpt")


@pytest.mark.parametrize("command", ["merge", "fit"])
def test_a_base_that_brings_code_is_refused_without_asking(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tmp_path / "base"
    base.mkdir()
    names = {"AutoConfig": "evil.Config", "AutoModelForImageClassification": "evil.Model"}
    (base / "config.json").write_text(json.dumps({"model_type": "evil", "auto_map": names, "architectures": ["Model"]}))
    (base / "evil.py").write_text(f"import os; os.environ[{RAN!r}] = '1'")
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    bench = Bench(tmp_path)
    if command == "merge":
        arguments = ["merge", "--base", base, "--adapter", bench.adapter(), "--output", tmp_path / "out"]
    else:
        arguments = ["fit", "--config", bench.yaml({"model.init_args.pretrained": str(base)})]
    with pytest.raises(Exit, match="load") as stopped:
        bench.command(*arguments)
    assert stopped.value.code == 2


def test_nothing_unpickles_without_weights_only() -> None:
    """Every torch.load of the package says weights_only=True, and nothing imports pickle to load."""
    package = Path(checkpoint_file.__file__).parents[1]
    for file in package.rglob("*.py"):
        text = file.read_text(encoding="utf-8")
        assert text.count("torch.load(") == text.count("weights_only=True") or "torch.load(" not in text, file
        assert not re.search(r"pickle\.load|(?<![\w.])(eval|exec)\(|trust_remote_code=True", text), file


# ---- paths -----------------------------------------------------------------------------------------------------------

OUTSIDE = ["../../secret", "/etc/passwd", "..", "~/secret", "file:///etc/passwd", "\\\\host\\share"]


@contextmanager
def opened() -> Iterator[list[str]]:
    """The paths that are opened meanwhile."""
    paths: list[str] = []
    _Opened.paths = paths
    if not _Opened.hooked:
        sys.addaudithook(_Opened.note)  # a hook stays for the life of the process
        _Opened.hooked = True
    try:
        yield paths
    finally:
        _Opened.paths = None


class _Opened:
    paths: list[str] | None = None
    hooked = False

    @classmethod
    def note(cls, event: str, arguments: tuple[Any, ...]) -> None:
        if cls.paths is not None and event in ("open", "os.listdir", "os.scandir") and isinstance(arguments[0], str):
            cls.paths.append(arguments[0])


def test_a_path_in_a_configuration_is_never_followed(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("{}")
    for path in OUTSIDE:
        keys = ("base_model_name_or_path", "revision", "auto_mapping", "layers_pattern", "corda_config")
        lists = {"target_modules": [path], "exclude_modules": [path], "layers_to_transform": [0]}
        place = Bench(tmp_path).adapter(fields(**dict.fromkeys(keys, path), **lists))
        model = Net()
        with opened() as paths:
            assert load_adapter(model, place) == ["body"]
        assert {str(Path(other).parent) for other in paths} <= {str(place), "/dev"}


def test_the_root_of_the_names_is_no_path(tmp_path: Path) -> None:
    path = "../../secret"

    def own_root(place: Path) -> None:
        raw = json.loads((place / CONFIG).read_text())
        raw["lightning_oft"]["root"] = path
        (place / CONFIG).write_text(json.dumps(raw))

    model = Net()
    with opened() as paths:
        load_adapter(model, Bench(tmp_path).adapter(own_root))
    assert all(other.startswith((str(tmp_path), "/dev/")) for other in paths)


@pytest.mark.parametrize("name", ["../outside", "/tmp"])
def test_an_adapters_name_does_not_lead_out_of_the_directory(name: str, tmp_path: Path) -> None:
    Bench(tmp_path).adapter().rename(tmp_path / "outside")
    (tmp_path / "inside").mkdir()
    model = Net()
    with pytest.raises(AdapterFileError, match="no such file, so this is no adapter directory"):
        load_adapter(model, tmp_path / "inside", name)


def test_a_symbolic_link_is_read_like_a_file_and_shows_nothing_of_what_it_points_to(tmp_path: Path) -> None:
    """A hub's cache is made of links, so they are followed; what is no adapter is refused without a word of its content."""
    place = Bench(tmp_path).adapter()
    for name in (CONFIG, TENSORS):
        (place / name).rename(tmp_path / name)
        (place / name).symlink_to(tmp_path / name)
    assert load_adapter(Net(), place) == ["body"]
    (tmp_path / "secret").write_text("root:x:0:0:hunter2")
    for name in (CONFIG, TENSORS):
        Bench(tmp_path).adapter(fields())
        (place / name).unlink()
        (place / name).symlink_to(tmp_path / "secret")
        with pytest.raises(AdapterFileError) as caught:
            load_adapter(Net(), place)
        assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "target"), [(CONFIG, "/dev/zero"), (TENSORS, "/dev/zero"), (CONFIG, "itself"), (TENSORS, "a pipe")]
)
def test_a_link_to_something_endless_is_no_file(name: str, target: str, tmp_path: Path) -> None:
    place = Bench(tmp_path).adapter(fields())
    (place / name).unlink()
    if target == "a pipe":
        os.mkfifo(place / name)
    else:
        (place / name).symlink_to(place / name if target == "itself" else target)
    with pytest.raises(AdapterFileError, match="no such file"):
        read_adapter(place)


# ---- memory ----------------------------------------------------------------------------------------------------------


def _header(**entries: Any) -> bytes:
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text


def _declared(shape: list[int], dtype: str = "F32") -> bytes:
    count = 4 * shape[0] * shape[1]
    return _header(
        **{"base_model.model.body.oft_R.weight": {"dtype": dtype, "shape": shape, "data_offsets": [0, count]}}
    )


GIGANTIC = {
    "a shape of terabytes": _declared([2**30, 496]),
    "a shape beyond 64 bits": _declared([2**40, 2**40]),
    "a header of exabytes": struct.pack("<Q", 2**60) + b"{}",
    "a header of 99 MB that is not there": struct.pack("<Q", 99_000_000) + b"{}",
    "blocks without entries": _declared([2**40, 0]),
    "a name of ten million characters": _header(
        **{"oft_R." * 1_600_000: {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}}
    ),
}


@pytest.mark.parametrize("content", GIGANTIC.values(), ids=GIGANTIC)
def test_a_gigantic_declared_shape_is_refused_before_memory_is_taken(content: bytes, tmp_path: Path) -> None:
    place = Bench(tmp_path).adapter(fields())
    (place / TENSORS).write_bytes(content)
    model = Net()
    with at_most(8 + 4 * len(content) / MIB), pytest.raises(AdapterFileError) as caught:
        load_adapter(model, place)
    assert len(str(caught.value)) < 1100


def test_a_gigantic_configuration_is_not_read(tmp_path: Path) -> None:
    place = Bench(tmp_path).adapter()
    with (place / CONFIG).open("wb") as stream:
        stream.truncate(2**40)  # sparse: no byte of it is on the disk
    with at_most(8), pytest.raises(AdapterFileError, match="larger than 16777216 bytes"):
        read_adapter(place)


def _deflated(path: Path, size: int) -> None:
    """A checkpoint whose tensors are compressed: torch.save writes none, torch.load would read it."""
    buffer = io.BytesIO()
    torch.save({"state_dict": {"w": torch.zeros(size // 4)}}, buffer)
    with zipfile.ZipFile(buffer) as plain, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as packed:
        for item in plain.infolist():
            packed.writestr(item.filename, plain.read(item))


def test_a_checkpoint_that_grows_a_thousandfold_is_refused(tmp_path: Path) -> None:
    _deflated(tmp_path / "x.ckpt", 64 * MIB)
    assert (tmp_path / "x.ckpt").stat().st_size < MIB
    with at_most(8), pytest.raises(CheckpointError, match="declares 67"):
        checkpoint_file.read(tmp_path / "x.ckpt")


def test_a_tensor_larger_than_its_storage_is_refused(tmp_path: Path) -> None:
    """An expanded tensor is large without memory; what copies it would not be."""
    rotation = torch.zeros(1).expand(2**20, 2**20)
    adapter = {"config": {"r": 2}, "layers": {"net.0": {"": 4}}, "fingerprints": {}, "owned": []}
    entry = {
        "version": 1,
        "adapters": {"default": adapter},
        "active": ["default"],
        "merged": False,
        "adapter_only": True,
    }
    torch.save({"state_dict": {"net.0.oft_R.default.weight": rotation}, "lightning_oft": entry}, tmp_path / "x.ckpt")
    with at_most(16), pytest.raises(CheckpointError):
        load_from_checkpoint(Small, tmp_path / "x.ckpt")
    with at_most(16):
        assert main(["info", str(tmp_path / "x.ckpt")]) == 2


def test_the_limit_of_these_tests_is_one() -> None:
    with pytest.raises((RuntimeError, MemoryError)), at_most(8):
        torch.zeros(2**30)
    with pytest.raises(AssertionError), at_most(8):
        bytes(16 * MIB)


def test_a_pretrained_adapter_of_the_callback_is_read_by_the_same_rules(tmp_path: Path) -> None:
    place = Bench(tmp_path).adapter()
    (place / TENSORS).write_bytes(pickle.dumps(Bomb()))
    callback = OFTFinetuning(pretrained_adapter=str(place), target_modules=["net.0"])
    with pytest.raises(AdapterFileError):
        trainer(tmp_path, callback).fit(Small(), loader(), loader())
