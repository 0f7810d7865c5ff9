"""A map that stays orthogonal: what a run does when rotations turn further than their series can."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.plugins import MixedPrecision
from small import Small, inputs, loader, oft, state, trainer
from torch import Tensor, nn

from lightning_oft import OFTFinetuning, load_adapter, load_from_checkpoint, oft_layers, save_adapter
from lightning_oft.callback.strategies import steps
from lightning_oft.functional import SERIES_TOLERANCE, orthogonality_error
from lightning_oft.layers import Rotation

peft = pytest.importorskip("peft")

pytestmark = [
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
    pytest.mark.filterwarnings("ignore:Unexpected keyword arguments .'lightning_oft'"),
]
SERIES: dict[str, Any] = {"use_cayley_neumann": True, "modules_to_save": None}


def _rotations(model: nn.Module) -> dict[str, Rotation]:
    return {name: layer.oft_R["default"] for name, layer in oft_layers(model).items()}  # type: ignore[index, union-attr, operator]


class Errors(pl.Callback):
    """Logs the error of every layer's rotation at every step, and which layers have left their series by then."""

    def __init__(self) -> None:
        self.errors: list[float] = []
        self.left: list[set[str]] = []
        self.losses: list[float] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, *_: Any) -> None:
        rotations = _rotations(pl_module)
        matrices = [rotation.matrix().detach().double() for rotation in rotations.values()]
        self.errors.append(max(float(orthogonality_error(r_nbb).max()) for r_nbb in matrices))
        self.left.append({name for name, rotation in rotations.items() if rotation.terms is None})
        self.losses.append(float(outputs["loss"]) if outputs else 0.0)


class Diverging(Small):
    """Steps that throw the first layer far beyond anything that converges, and move the second one a little."""

    def __init__(self, lr: float = 1e4) -> None:
        super().__init__(lr=lr, dropout=0.0, batch_norm=False)

    def configure_optimizers(self) -> Any:
        first, second = self.net[0].parameters(), self.net[3].parameters()  # type: ignore[index]
        return torch.optim.SGD([{"params": first}, {"params": second, "lr": 0.01}], self.lr, momentum=0.9)


class Boring(BoringModel):
    def __init__(self, optimizer: str) -> None:
        super().__init__()
        self.by = optimizer
        self.automatic_optimization = optimizer != "manual"

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if self.automatic_optimization:
            return super().training_step(batch, batch_idx)
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        loss = self.loss(self.layer(batch))
        self.manual_backward(loss)
        optimizer.step()
        return {"loss": loss}

    def configure_optimizers(self) -> Any:
        if self.by == "lbfgs":
            return torch.optim.LBFGS(self.layer.parameters())
        return super().configure_optimizers() if self.by == "sgd" else torch.optim.SGD(self.layer.parameters(), 0.1)


class Skipping(torch.amp.GradScaler):
    """A scaler that skips every second step, as one that met an overflow does."""

    calls = 0

    def step(self, optimizer: Any, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        return super().step(optimizer, *args, **kwargs) if self.calls % 2 else None


@pytest.mark.parametrize("by", ["sgd", "manual", "lbfgs", "scaler"])
def test_lightnings_boring_model_trains_with_default_settings(tmp_path: Path, by: str) -> None:
    torch.manual_seed(0)
    errors, model = Errors(), Boring(by)
    plugins = [MixedPrecision("16-mixed", "cpu", scaler=Skipping("cpu"))] if by == "scaler" else None
    trainer(tmp_path, OFTFinetuning(), errors, plugins=plugins, limit_train_batches=16, limit_val_batches=1).fit(model)
    assert len(errors.losses) == 16
    assert all(0 <= loss < 10 for loss in errors.losses)
    assert max(errors.errors) <= SERIES_TOLERANCE
    assert errors.left[-1] == {"layer"}  # it is the map that keeps it finite


GUARDS: dict[str, dict[str, Any]] = {
    "exact": {},
    "project": {"series_guard": "project"},
    "odd": {"num_cayley_neumann_terms": 5},
    "shared": {"block_share": True},
    "constrained within the reach": {"max_angle": 20.0},
}


@pytest.mark.parametrize("options", GUARDS.values(), ids=GUARDS)
def test_a_run_built_to_diverge_stays_orthogonal_and_its_file_is_the_same_in_peft(
    tmp_path: Path, options: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    errors, model = Errors(), Diverging()
    callback = oft(**SERIES, **options, merge_on_fit_end=False, export_dir=str(tmp_path / "out"))
    with caplog.at_level("INFO"):
        trainer(tmp_path, callback, errors, max_epochs=2).fit(model, loader(False))
    said = [record.message for record in caplog.records if "go on with the exact" in record.message]
    assert max(errors.errors) <= SERIES_TOLERANCE
    if options.get("series_guard") == "project" or "max_angle" in options:
        assert errors.left[-1] == set()
        assert said == []
    else:
        assert errors.left[0] == {"net.0"}  # in the first step, and alone
        assert re.match(r"OFT: net.0 turned as far as .*use_cayley_neumann=false", said[0])
        assert len(said) == len(errors.left[-1])
    again = Diverging()
    theirs = peft.PeftModel.from_pretrained(again, tmp_path / "out" / "adapter")
    x = inputs()[0]
    torch.testing.assert_close(theirs(x), model(x), rtol=0, atol=1e-5)
    fresh = Diverging()
    load_adapter(fresh, tmp_path / "out" / "adapter")
    torch.testing.assert_close(fresh(x), model(x), rtol=0, atol=1e-6)


def test_on_an_accelerator_a_rotation_is_held_for_a_step_and_then_leaves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(steps, "_is_on_host", lambda _: False)  # as if reading meant waiting
    errors, model = Errors(), Diverging()
    trainer(tmp_path, oft(**SERIES, merge_on_fit_end=False), errors).fit(model, loader(False))
    assert max(errors.errors) <= SERIES_TOLERANCE
    assert errors.left[:2] == [set(), {"net.0"}]


def test_code_that_is_compiled_is_made_anew_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steps, "has_compiled_code", lambda: True)
    errors = Errors()
    trainer(tmp_path, oft(**SERIES, merge_on_fit_end=False), errors, max_steps=1).fit(Diverging(), loader(False))
    assert errors.left == [{"net.0", "net.3"}]


@pytest.mark.parametrize("adapter_only", [True, False])
@pytest.mark.parametrize("on_host", [True, False])
def test_a_run_resumed_after_a_layer_left_its_series_ends_to_the_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, adapter_only: bool, on_host: bool
) -> None:
    monkeypatch.setattr(steps, "_is_on_host", lambda _: on_host)

    def run(root: Path, ckpt: str | None = None) -> Diverging:
        model = Diverging(lr=50.0)
        callback = oft(**SERIES, merge_on_fit_end=False, save_adapter_only=adapter_only)
        keeper = ModelCheckpoint(root, filename="{step}", save_top_k=-1)
        trainer(root, callback, keeper, max_epochs=5).fit(model, loader(False, 64), ckpt_path=ckpt)
        return model

    whole = run(tmp_path)
    assert {name for name, one in _rotations(whole).items() if one.terms is None} == {"net.0"}
    for step in (1, 3):  # at the very step, on an accelerator before the process has learned of it; and after it
        resumed = run(tmp_path / str(step), str(tmp_path / f"step={step}.ckpt"))
        assert {name for name, one in _rotations(resumed).items() if one.terms is None} == {"net.0"}
        assert all(torch.equal(value, state(whole)[name]) for name, value in state(resumed).items())
    x, again = inputs()[0], load_from_checkpoint(Diverging, tmp_path / "step=5.ckpt")
    assert torch.equal(again(x), whole.eval()(x))


def test_an_adapter_loaded_from_beyond_its_reach_keeps_its_series_and_is_warned_of(tmp_path: Path) -> None:
    model = Small()
    torch.manual_seed(0)
    theirs = peft.get_peft_model(model.net, peft.OFTConfig(oft_block_size=4, target_modules=["0", "3"]))
    for name, parameter in theirs.named_parameters():
        if "oft_R" in name:
            nn.init.normal_(parameter, std=0.1)
    theirs.save_pretrained(tmp_path / "theirs")
    expected = theirs.eval()(inputs()[0]).detach()
    ours = Small(lr=0.0)
    callback = OFTFinetuning(module="net", pretrained_adapter=str(tmp_path / "theirs"), merge_on_fit_end=False)
    with pytest.warns(UserWarning, match=r"net|\d: its rotation has grown.*that was loaded like this keeps its series"):
        trainer(tmp_path, callback).fit(ours, loader())
    torch.testing.assert_close(ours.eval()(inputs()[0]), expected)
    save_adapter(ours.net, tmp_path / "again")
    assert '"use_cayley_neumann": true' in (tmp_path / "again" / "adapter_config.json").read_text()


ADVICE: dict[str, dict[str, Any]] = {
    "lower the learning rate": {"lr": 1e-3},
    "gradient_clip_val": {"gradient_clip_val": 0.01},
    "use_cayley_neumann=false": {"use_cayley_neumann": False},
    "max_angle=20": {"max_angle": 20.0},
}


class Unbounded(Diverging):
    """A loss that falls as features grow, so that a series beyond its reach ends in NaN."""

    def loss(self, batch: Any) -> Tensor:
        loss: Tensor = -self(batch[0]).square().mean()
        return loss


def test_generators_that_became_nan_are_named_with_advice_that_helps(tmp_path: Path) -> None:
    def fit(lr: float = 1e4, gradient_clip_val: float | None = None, **options: Any) -> Errors:
        found = Errors()
        callback = oft(**{**SERIES, "series_guard": "warn", "merge_on_fit_end": False, **options})
        run = trainer(tmp_path, callback, gradient_clip_val=gradient_clip_val)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*its rotation has grown")
            run.fit(Unbounded(lr), loader(False))
        return found

    with pytest.raises(RuntimeError, match=r"generators of net\.0.* became NaN or infinite") as caught:
        fit()
    for words, remedy in ADVICE.items():
        assert words in str(caught.value)
        fit(**remedy)
