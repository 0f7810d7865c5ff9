"""Whatever fails, the model in memory is merged or not, never in between, files are old or new, and a fit works again."""

from __future__ import annotations

import contextlib
import copy
import os
import resource
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from safetensors.torch import load_file
from small import Small, difference, loader, merged_layers, oft, state, trainer
from torch import Tensor

from lightning_oft import oft_layers
from lightning_oft.callback.checkpoint_io import AtomicCheckpointIO
from lightning_oft.formats import read_adapter
from lightning_oft.formats.checkpoint_file import read

pytestmark = [
    pytest.mark.filterwarnings("ignore:Found .* module.* in eval mode"),  # as a failed run leaves it
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks used to create"),
]


def _words(text: str) -> list[str]:
    return text.split()


BEHIND = _words("""setup on_fit_start on_sanity_check_end on_train_batch_start on_before_optimizer_step on_validation_end
    on_save_checkpoint on_train_end on_fit_end teardown""")
BEFORE = _words("setup on_fit_start on_fit_end teardown")
"""Hooks of a callback that stands behind ours or before it: one of every stretch of a fit, and those that we have."""
RESUME = ["on_load_checkpoint", "load_state_dict"]
EVALUATE = _words("setup on_test_start on_test_batch_end on_test_end teardown")
MODULE_FIT = _words("""prepare_data setup configure_model configure_optimizers on_fit_start training_step backward
    optimizer_step validation_step on_save_checkpoint on_train_end on_fit_end teardown""")


class Boom(RuntimeError):
    """What the tests raise."""


def raising(base: type, hook: str) -> Any:
    """A subclass whose hook raises when `armed`."""

    def raiser(self: Any, *args: Any, **kwargs: Any) -> Any:
        cls.calls += 1
        if cls.armed:
            raise Boom(hook)
        return getattr(base, hook)(self, *args, **kwargs)

    cls: Any = type("Raising", (base,), {hook: raiser, "armed": True, "calls": 0})
    return cls


def run_with(root: Path, *callbacks: Any) -> pl.Trainer:
    keeper = ModelCheckpoint(root, save_last=True, save_top_k=0)
    return trainer(root, *callbacks, keeper, gradient_clip_val=1.0, limit_train_batches=2, limit_val_batches=1)


def fit(run: pl.Trainer, model: Small, ckpt: Any = None) -> None:
    run.fit(model, loader(), loader(False), ckpt_path=ckpt)


def assert_whole(run: pl.Trainer, model: Small, base: dict[str, Tensor]) -> None:
    """Merged or not, nothing in between, and nothing registered."""
    layers, merged = oft_layers(model), merged_layers(model)
    assert merged in ({}, layers)
    assert "configure_model" not in model.__dict__
    assert not any(optimizer._optimizer_step_post_hooks for optimizer in run.optimizers)
    if not merged:
        frozen = [name for name in base if "net.6" not in name]
        now = state(model)
        assert all(torch.equal(now[name], base[name]) for name in frozen)


def assert_fits(root: Path, model: Small, base: dict[str, Tensor]) -> None:
    """A fit works, and what it leaves is the base, rotated."""
    run = run_with(root, oft())
    fit(run, model)
    after = state(model)
    assert list(after) == list(base)
    assert merged_layers(model) == oft_layers(model)
    for name in ("net.0.weight", "net.3.weight"):
        assert not torch.equal(after[name], base[name])
        torch.testing.assert_close(after[name].norm(dim=1), base[name].norm(dim=1))


@pytest.mark.parametrize(("first", "hook"), [*((True, hook) for hook in BEFORE), *((False, hook) for hook in BEHIND)])
def test_a_callback_that_fails_in_a_fit(tmp_path: Path, first: bool, hook: str) -> None:
    model, base = Small(), state(Small())
    failing = raising(pl.Callback, hook)()
    run = run_with(tmp_path, *([failing, oft()] if first else [oft(), failing]))
    with pytest.raises(Boom, match=hook):
        fit(run, model)
    assert_whole(run, model, base)
    merged = hook == "teardown" or (hook == "on_fit_end" and not first)
    assert bool(merged_layers(model)) == merged
    assert_fits(tmp_path, model, base)


@pytest.mark.parametrize("hook", MODULE_FIT)
def test_a_module_that_fails_in_a_fit(tmp_path: Path, hook: str) -> None:
    cls = raising(Small, hook)
    model, base = cls(), state(Small())
    run = run_with(tmp_path, oft())
    with pytest.raises(Boom, match=hook):
        fit(run, model)
    assert_whole(run, model, base)
    assert bool(merged_layers(model)) == (hook in ("teardown", "on_fit_end"))
    cls.armed = False
    assert_fits(tmp_path, model, base)


@pytest.mark.parametrize("hook", RESUME)
def test_a_resume_that_fails(tmp_path: Path, hook: str) -> None:
    base = state(Small())
    failing = raising(pl.Callback, hook)
    failing.armed, failing.state_dict = False, lambda self: {"some": 1}
    fit(run_with(tmp_path, oft(), failing()), Small())
    model, failing.armed = Small(), True
    run = run_with(tmp_path, oft(), failing())
    with pytest.raises(Boom, match=hook):
        fit(run, model, str(tmp_path / "last.ckpt"))
    assert_whole(run, model, base)
    assert_fits(tmp_path, model, base)


def test_a_run_that_fails_leaves_a_merged_model_merged(tmp_path: Path) -> None:
    model, base = Small(), state(Small())
    fit(run_with(tmp_path, oft()), model)
    merged = state(model)
    for hook in EVALUATE:
        failing = raising(pl.Callback, hook)()
        for callbacks in ([failing, oft()], [oft(), failing]):
            run = trainer(tmp_path, *callbacks)
            with pytest.raises(Boom, match=hook):
                run.test(model, loader(False))
            assert difference(state(model), merged) == 0.0
            assert_whole(run, model, base)
    with pytest.raises(FileNotFoundError):
        trainer(tmp_path, oft()).test(model, loader(False), ckpt_path=str(tmp_path / "absent.ckpt"))
    assert difference(state(model), merged) == 0.0


def test_a_failure_while_failing_is_forgotten_by_the_next_run(tmp_path: Path) -> None:
    class Worse(pl.Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            raise Boom("first")

        def on_exception(self, *_: Any) -> None:
            raise Boom("second")

    model, base, adapter = Small(), state(Small()), oft()
    run = run_with(tmp_path, Worse(), adapter)
    with pytest.raises(Boom, match="second"):
        fit(run, model)
    hooked = run.optimizers
    fit(run_with(tmp_path, adapter), model)
    assert not any(optimizer._optimizer_step_post_hooks for optimizer in hooked)
    assert list(state(model)) == list(base)


@pytest.mark.parametrize(("value", "export"), [(float("nan"), True), (float("inf"), False)])
def test_a_generator_that_is_not_finite_is_not_merged(tmp_path: Path, value: float, export: bool) -> None:
    class Spoil(pl.Callback):
        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            pl_module.net[3].oft_R["default"].weight.data[0, 0] = value

    model, base = Small(), state(Small())
    run = run_with(tmp_path, oft(export_dir=str(tmp_path / "export") if export else None), Spoil())
    with pytest.raises(ValueError, match=r"net\.3.*NaN or infinite") as error:
        fit(run, model)
    assert "\n" not in str(error.value)
    assert_whole(run, model, base)
    assert not merged_layers(model)
    assert not list(tmp_path.glob("export/*"))
    model.net[3].oft_R["default"].weight.data.zero_()  # type: ignore[index, operator, union-attr]
    assert_fits(tmp_path, model, base)


def test_a_loss_that_is_nan_is_stopped_before_a_checkpoint_of_it_is_written(tmp_path: Path) -> None:
    class Broken(Small):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return super().training_step(batch, batch_idx) * float("nan")

    model, base = Broken(), state(Small())
    run = run_with(tmp_path, oft())
    with pytest.raises(RuntimeError, match=r"net\.0, net\.3 became NaN or infinite"):
        fit(run, model)
    assert_whole(run, model, base)
    assert not list(tmp_path.rglob("*.ckpt"))


@contextlib.contextmanager
def file_limit(size: int) -> Iterator[None]:
    """No file of this process grows beyond `size` bytes, as on a disk that is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


class FullFrom(pl.Callback):
    """The disk is full from a hook on."""

    def __init__(self, hook: str) -> None:
        self.open = contextlib.ExitStack()
        setattr(self, hook, lambda *_: self.open.enter_context(file_limit(600)))


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize(
    ("hook", "what"),
    [("on_train_epoch_start", r"last\.ckpt"), ("on_fit_end", "export/adapter")],
    ids=["ckpt", "adapter"],
)
def test_a_full_disk_leaves_what_was_there(tmp_path: Path, hook: str, what: str) -> None:
    base, adapter = state(Small()), {"export_dir": str(tmp_path / "export")}
    fit(run_with(tmp_path, oft(**adapter)), Small())
    before = files(tmp_path)
    model, full = Small(), FullFrom(hook)
    keeper = ModelCheckpoint(tmp_path, save_last=True, save_top_k=0)
    run = trainer(tmp_path, full, oft(**adapter), keeper, plugins=[AtomicCheckpointIO()], max_epochs=2)
    with full.open, pytest.raises((OSError, ValueError), match=what):
        fit(run, model, str(tmp_path / "last.ckpt"))
    if hook == "on_train_epoch_start":
        assert files(tmp_path) == before
    else:
        assert {k: v for k, v in files(tmp_path).items() if "export" in k} == {
            k: v for k, v in before.items() if "export" in k
        }
    assert_whole(run, model, base)
    assert not merged_layers(model)
    again = trainer(tmp_path, oft(**adapter), max_epochs=3)
    fit(again, model, str(tmp_path / "last.ckpt"))
    assert difference(load_file(tmp_path / "export" / "merged" / "model.safetensors"), state(model)) == 0.0


def test_a_full_disk_at_the_merged_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning_oft.callback import export

    def full(*args: Any, **kwargs: Any) -> Any:
        with file_limit(600):
            return save(*args, **kwargs)

    options = {"export_dir": str(tmp_path / "export")}
    model, save = Small(), export.write_pretrained
    fit(run_with(tmp_path, oft(**options)), model)
    before = files(tmp_path / "export" / "merged")
    monkeypatch.setattr(export, "write_pretrained", full)
    run = run_with(tmp_path, oft(**options))
    with pytest.raises(OSError, match="export/merged"):
        fit(run, model)
    assert files(tmp_path / "export" / "merged") == before
    assert [path.name for path in (tmp_path / "export").iterdir() if path.name.startswith(".")] == []
    assert merged_layers(model) == oft_layers(model)  # the fit itself is whole: only the file is missing
    read_adapter(tmp_path / "export" / "adapter")
    read(tmp_path / "last.ckpt")


@pytest.fixture
def read_only(tmp_path: Path) -> Iterator[Path]:
    """A directory where nobody can write."""
    place = tmp_path / "read_only"
    place.mkdir()
    if os.geteuid():
        place.chmod(0o500)
        yield place
        place.chmod(0o700)
        return
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", str(place)], capture_output=True, check=False
    ).returncode:
        pytest.skip("root writes everywhere, and cannot mount here")
    yield place
    subprocess.run(["umount", str(place)], check=True)


@pytest.mark.parametrize("what", ["ckpt", "export"])
def test_a_read_only_directory_is_named(tmp_path: Path, read_only: Path, what: str) -> None:
    model, base = Small(), state(Small())
    options = {"export_dir": str(read_only / "export")} if what == "export" else {}
    keeper = ModelCheckpoint((read_only if what == "ckpt" else tmp_path) / "ckpt", save_last=True)
    run = trainer(tmp_path, oft(**options), keeper)
    with pytest.raises((OSError, ValueError), match=f"read_only/{what}") as error:
        fit(run, model)
    assert "\n" not in str(error.value)
    assert_whole(run, model, base)
    assert_fits(tmp_path, copy.deepcopy(model), base)
