"""Stop, resume, test the best, load elsewhere: the numbers are those of a run that never stopped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from small import Small, difference, inputs, loader, oft, state, trainer
from torch import Tensor

from lightning_oft import load_adapter, load_from_checkpoint, unload
from lightning_oft.callback.random_state import RandomState
from lightning_oft.formats import AdapterFileError
from lightning_oft.formats.checkpoint import NOTE, content_of
from lightning_oft.formats.checkpoint_file import CheckpointError

pytestmark = [
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`"),
    pytest.mark.filterwarnings("ignore:`.fit\\(ckpt_path=None\\)` was called without a model"),
    pytest.mark.filterwarnings('ignore:.fit\\(ckpt_path="last"\\) is set, but there is no last checkpoint'),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks used to create"),
]

ADAPTER = {"net.0.oft_R.default.weight", "net.3.oft_R.default.weight", "net.6.weight", "net.6.bias"}
BUFFERS = {"net.4.running_mean", "net.4.running_var", "net.4.num_batches_tracked"}


def fit(
    root: Path, epochs: int, ckpt: Any = None, model: Small | None = None, seed: int = 0, **options: Any
) -> tuple[pl.Trainer, Small]:
    """Fit with shuffled data, dropout, a scheduler and accumulation; `seed` is that of the process."""
    model = model or Small(options.pop("built_in", "init"))
    torch.manual_seed(seed)
    checkpoint = ModelCheckpoint(root, monitor="val", save_last=True, save_top_k=2)
    callbacks = [oft(**options.pop("oft", {})), RandomState(), checkpoint, *options.pop("callbacks", [])]
    run = trainer(root, *callbacks, max_epochs=epochs, accumulate_grad_batches=3, **options)
    run.fit(model, loader(), loader(False), ckpt_path=ckpt)
    return run, model


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    """The merged weights after four epochs in one go."""
    torch.manual_seed(0)
    return state(fit(tmp_path_factory.mktemp("straight"), 4)[1])


@pytest.mark.parametrize("built_in", ["setup", "configure_model"])
def test_two_and_two_epochs_are_four_to_the_bit(tmp_path: Path, built_in: str) -> None:
    _, straight = fit(tmp_path / "straight", 4, built_in=built_in)
    fit(tmp_path, 2, built_in=built_in)
    _, model = fit(tmp_path, 4, str(tmp_path / "last.ckpt"), seed=99, built_in=built_in)
    assert difference(state(model), state(straight)) == 0.0


@pytest.mark.parametrize(("adapter_only", "keep_base"), [(True, "always"), (False, "never")])
def test_resume_on_the_merged_model(
    tmp_path: Path, straight: dict[str, Tensor], adapter_only: bool, keep_base: str
) -> None:
    options = {"keep_base": keep_base, "save_adapter_only": adapter_only}
    _, model = fit(tmp_path, 2, oft=options)
    _, model = fit(tmp_path, 4, "last", model=model, seed=99, oft=options)
    assert difference(state(model), straight) <= (0.0 if keep_base == "always" else 2e-6)


def test_checkpoints_hold_what_trained_and_nothing_that_can_run(tmp_path: Path) -> None:
    fit(tmp_path, 1)
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert set(saved["state_dict"]) == ADAPTER | BUFFERS | {NOTE}
    fit(tmp_path / "full", 1, oft={"save_adapter_only": False})
    full = torch.load(tmp_path / "full" / "last.ckpt", weights_only=True)
    assert set(full["state_dict"]) == ADAPTER | BUFFERS | set(Small().state_dict())


def test_weights_only_checkpoints_are_adapter_only_too(tmp_path: Path) -> None:
    run, model = fit(tmp_path, 1, oft={"merge_on_fit_end": False})
    run.save_checkpoint(tmp_path / "weights.ckpt", weights_only=True)
    saved = torch.load(tmp_path / "weights.ckpt", weights_only=True)
    assert set(saved["state_dict"]) == ADAPTER | BUFFERS | {NOTE}
    assert "optimizer_states" not in saved
    expected = run.validate(model, loader(False), verbose=False)
    fresh = Small()
    again = trainer(tmp_path, oft())
    found = again.validate(fresh, loader(False), ckpt_path=str(tmp_path / "weights.ckpt"), verbose=False)
    assert found == expected


def test_a_merged_model_is_saved_whole_and_plain(tmp_path: Path) -> None:
    run, model = fit(tmp_path, 1)
    for weights_only in (False, True):
        run.save_checkpoint(tmp_path / "merged.ckpt", weights_only=weights_only)
        saved = torch.load(tmp_path / "merged.ckpt", weights_only=True)
        assert content_of(saved) == "merged"
        assert difference(saved["state_dict"], state(model)) == 0.0
        assert difference(state(Small.load_from_checkpoint(tmp_path / "merged.ckpt")), state(model)) == 0.0


@pytest.mark.parametrize(("what", "precision"), [("best", "32-true"), ("last", "32-true"), ("best", "bf16-true")])
def test_test_after_the_merge_gives_the_logged_number(tmp_path: Path, what: str, precision: Any) -> None:
    run, model = fit(tmp_path, 3, precision=precision)
    merged = state(model)
    checkpoint: Any = run.checkpoint_callback
    logged = float(checkpoint.best_model_score) if what == "best" else float(run.callback_metrics["val"])
    found = run.validate(model, loader(False), ckpt_path=what, verbose=False)[0]["val"]
    assert found == pytest.approx(logged, abs=0.0 if precision == "32-true" else 1e-6)
    assert list(model.state_dict()) == list(Small().state_dict())
    if what == "last":
        assert difference(state(model), merged) == 0.0


def test_no_double_rotation_whatever_is_loaded_into_a_merged_model(tmp_path: Path) -> None:
    run, model = fit(tmp_path, 2)
    merged = state(model)
    x = inputs()[0]
    output = model.eval()(x)
    run.save_checkpoint(tmp_path / "merged.ckpt")
    for path in (tmp_path / "last.ckpt", tmp_path / "merged.ckpt"):
        run.test(model, loader(False), ckpt_path=str(path), verbose=False)
        torch.testing.assert_close(model.eval()(x), output)
        assert difference(state(model), merged) < 1e-6


def test_a_plain_checkpoint_becomes_the_base(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    plain = Small()
    torch.manual_seed(4)
    run = trainer(tmp_path, ModelCheckpoint(tmp_path / "plain", save_last=True))
    run.fit(plain, loader())
    base = state(plain)
    with caplog.at_level("INFO"):
        _, model = fit(tmp_path, 1, str(tmp_path / "plain" / "last.ckpt"))
    lines = [r.getMessage() for r in caplog.records if "the checkpoint is a plain model" in r.getMessage()]
    assert len(lines) == 1
    unload(model)  # the merged model: what the base was rotated to
    for name in ("net.0.weight", "net.3.weight"):
        torch.testing.assert_close(state(model)[name].norm(dim=1), base[name].norm(dim=1))
        assert not torch.equal(state(model)[name], base[name])
    assert torch.equal(state(model)["net.4.weight"], base["net.4.weight"])


class SetUp(Small):
    """Reads a weight of its base in `setup`, when the rotations are there already."""

    def setup(self, stage: str) -> None:
        self.load_state_dict({"net.3.weight": torch.eye(16)}, strict=False)


class LoadLate(Small):
    """Reads it when the fit starts; before its checkpoint or after it, nobody can tell."""

    def on_fit_start(self) -> None:
        self.load_state_dict({"net.3.weight": torch.eye(16)}, strict=False)


class TrainBeside(Small):
    """Trains it beside its rotation."""

    def configure_optimizers(self) -> Any:
        self.net.get_parameter("3.weight").requires_grad_(True)
        return super().configure_optimizers()


def _fit_kind(kind: type[Small], root: Path, epochs: int, ckpt: Path | None = None) -> Small:
    model = kind(batch_norm=False)
    keeper = ModelCheckpoint(root, save_last=True, save_top_k=0)
    trainer(root, oft(merge_on_fit_end=False), keeper, max_epochs=epochs).fit(model, loader(), ckpt_path=ckpt)
    return model


@pytest.mark.parametrize("kind", [SetUp, TrainBeside])
def test_a_checkpoint_belongs_to_the_base_that_its_run_had(tmp_path: Path, kind: type[Small]) -> None:
    x, path = inputs()[0], tmp_path / "last.ckpt"
    expected = _fit_kind(kind, tmp_path, 1).eval()(x)
    _fit_kind(kind, tmp_path / "resumed", 2, path)
    if kind is TrainBeside:
        torch.testing.assert_close(load_from_checkpoint(Small, path)(x), expected)
        said = pytest.warns(
            UserWarning, match=r"net.3.weight: trained or changed beside the adapter.* load_from_checkpoint reads"
        )
        with said, pytest.raises(AdapterFileError, match=r"another base, net.3 differ"):
            load_adapter(Small(batch_norm=False), path)


def test_a_base_that_a_checkpoint_will_not_find_again_is_said_when_it_is_written(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"weights of net.3 changed after the injection: set save_adapter_only=False"):
        _fit_kind(LoadLate, tmp_path, 1)
    with pytest.raises(CheckpointError, match=r"another base: net.3 differ"):
        _fit_kind(LoadLate, tmp_path, 2, tmp_path / "last.ckpt")


def test_another_base_is_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    fit(tmp_path, 1)
    other = Small()
    other.net[3].weight.data.mul_(1.01)  # type: ignore[index, operator, union-attr]
    before = state(other)
    with pytest.raises(CheckpointError, match=r"another base: net.3 differ"):
        fit(tmp_path, 2, str(tmp_path / "last.ckpt"), model=other)
    after = state(other)
    assert all(torch.equal(after[name], value) for name, value in before.items())
    load_adapter(other, tmp_path / "last.ckpt", ignore_mismatched_base=True)
    trained = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    assert all(torch.equal(state(other)[name], trained[name]) for name in ADAPTER)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"oft_block_size": 8}, r"other sizes of net.0.oft_R.default.weight"),
        ({"target_modules": ["net.3"]}, r"has net.0.oft_R.default.weight, which the model lacks"),
        ({"adapter_name": "other"}, r"lacks net.0.oft_R.other.weight"),
    ],
)
def test_another_adapter_is_refused(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    fit(tmp_path, 1)
    with pytest.raises(CheckpointError, match=message):
        fit(tmp_path, 2, str(tmp_path / "last.ckpt"), oft=options)


def test_an_exception_checkpoint_resumes(tmp_path: Path, straight: dict[str, Tensor]) -> None:
    class Failing(Small):
        def on_train_epoch_start(self) -> None:
            if self.current_epoch == 2:
                raise RuntimeError("plug pulled")

    keeper = OnExceptionCheckpoint(tmp_path, filename="exception")
    with pytest.raises(RuntimeError, match="plug pulled"):
        fit(tmp_path, 4, model=Failing(), callbacks=[keeper])
    saved = torch.load(tmp_path / "exception.ckpt", weights_only=True)
    assert content_of(saved) == "adapter"
    _, model = fit(tmp_path, 4, str(tmp_path / "last.ckpt"), seed=3)
    assert difference(state(model), straight) == 0.0
