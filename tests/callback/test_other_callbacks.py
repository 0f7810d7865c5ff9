"""Beside every other callback of Lightning a resumed fit equals one that never stopped, and the best is the best."""

from __future__ import annotations

import datetime
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    BatchSizeFinder,
    EarlyStopping,
    EMAWeightAveraging,
    GradientAccumulationScheduler,
    LearningRateFinder,
    LearningRateMonitor,
    ModelCheckpoint,
    ModelPruning,
    ModelSummary,
    Timer,
)
from lightning.pytorch.tuner import Tuner
from small import FEATURES, HIDDEN, Small, difference, inputs, loader, merged_layers, oft, state, trainer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

from lightning_oft import oft_layers, unmerge
from lightning_oft.callback.random_state import RandomState

pytestmark = [
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks used to create"),
    # Lightning, of a backbone whose rotations train already
    pytest.mark.filterwarnings("ignore:The provided params to be frozen already exist"),
    # torch.compile, of every autograd function
    pytest.mark.filterwarnings("ignore:.*should not be instantiated. Methods on autograd functions:DeprecationWarning"),
]


class Backboned(Small):
    """Has the `backbone` that BackboneFinetuning asks for, and an optimizer of what trains."""

    def build(self) -> None:
        if not hasattr(self, "backbone"):
            torch.manual_seed(1)
            layers = [nn.Linear(FEATURES, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, HIDDEN), nn.BatchNorm1d(HIDDEN)]
            self.backbone = nn.Sequential(*layers)
            self.net = nn.Linear(HIDDEN, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(self.backbone(x).relu())  # type: ignore[no-any-return]

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], self.lr)


class Manual(Small):
    """Two optimizers by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        optimizers: Any = self.optimizers()
        self.manual_backward(self.loss(batch))
        for optimizer in optimizers[: 1 + batch_idx % 2]:
            optimizer.step()
            optimizer.zero_grad()

    def on_train_epoch_end(self) -> None:
        schedulers: Any = self.lr_schedulers()
        for scheduler in schedulers:
            scheduler.step()

    def configure_optimizers(self) -> Any:
        net: Any = self.net
        optimizers = [torch.optim.AdamW(net[:3].parameters(), 0.02), torch.optim.Adam(net[3:].parameters(), 0.01)]
        return optimizers, [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9) for optimizer in optimizers]


class Compiled(Small):
    """A submodule compiled where it is built."""

    backend = "eager"

    def build(self) -> None:
        super().build()
        if not hasattr(self, "whole"):
            self.whole = torch.compile(self.net, backend=self.backend)

    def forward(self, x: Tensor) -> Tensor:
        return self.whole(x)  # type: ignore[no-any-return, operator]


class Checkpointed(Small):
    """Activations computed again in the backward, in the newer or the older way."""

    reentrant = False

    def forward(self, x: Tensor) -> Tensor:
        x = x.clone().requires_grad_(self.reentrant)
        net: Any = self.net
        hidden = checkpoint(net[:4], x, use_reentrant=self.reentrant)
        return net[4:](hidden)  # type: ignore[no-any-return]


class Reentrant(Checkpointed):
    reentrant = True


class AotCompiled(Compiled):
    backend = "aot_eager"


def backbone_oft() -> Any:
    return oft(target_modules=["backbone.0", "backbone.2"], modules_to_save=["net"])


def backbone() -> BackboneFinetuning:
    return BackboneFinetuning(unfreeze_backbone_at_epoch=1, lambda_func=lambda epoch: 1.1)


Row = tuple[Callable[[], Small], Callable[[], list[Any]]]
ROWS: dict[str, Row] = {
    "accumulation": (Small, lambda: [oft(), GradientAccumulationScheduler({0: 1, 1: 3, 3: 2})]),
    "stopped_early": (Small, lambda: [oft(), EarlyStopping("val", mode="max", patience=2)]),
    "backbone_behind": (Backboned, lambda: [backbone_oft(), backbone()]),
    "backbone_before": (Backboned, lambda: [backbone(), backbone_oft()]),
    "summary": (Small, lambda: [ModelSummary(-1), oft()]),
    "manual": (Manual, lambda: [oft(max_angle=20.0)]),
    "compiled_aot": (AotCompiled, lambda: [oft()]),
    "checkpointed": (Checkpointed, lambda: [oft()]),
    "reentrant": (Reentrant, lambda: [oft()]),
}


def fit(
    root: Path, row: Row, epochs: int, ckpt: Any = None, seed: int = 0, **options: Any
) -> tuple[pl.Trainer, Small, ModelCheckpoint]:
    torch.compiler.reset()
    model, callbacks = row[0](), row[1]()
    torch.manual_seed(seed)
    keeper = ModelCheckpoint(root, monitor="val", save_last=True, save_top_k=2, filename="{epoch}")
    run = trainer(root, *callbacks, RandomState(), keeper, max_epochs=epochs, **options)
    run.fit(model, loader(), loader(False), ckpt_path=ckpt)
    return run, model, keeper


@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
def test_a_resumed_fit_is_the_same_and_the_best_is_the_best(tmp_path: Path, row: Row) -> None:
    _, straight, _ = fit(tmp_path / "straight", row, 4)
    fit(tmp_path, row, 2)
    run, model, keeper = fit(tmp_path, row, 4, str(tmp_path / "last.ckpt"), seed=99)
    assert merged_layers(model) == oft_layers(model) != {}
    merged = state(model)
    assert difference(merged, state(straight)) == 0.0
    found = run.validate(model, loader(False), ckpt_path="best", verbose=False)[0]["val"]
    assert found == float(keeper.best_model_score or 0)
    assert list(state(model)) == list(row[0]().state_dict())
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert saved["lightning_oft"]["adapter_only"]


@pytest.mark.parametrize("first", [True, False], ids=["before", "behind"])
def test_what_backbone_finetuning_unfreezes_trains_and_is_in_the_checkpoint(tmp_path: Path, first: bool) -> None:
    row = ROWS["backbone_before" if first else "backbone_behind"]
    names = {f"backbone.{layer}.{kind}" for layer in (0, 2, 3) for kind in ("weight", "bias")}
    seen: dict[int, dict[str, Tensor]] = {}

    class Look(pl.Callback):
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            seen[trainer.current_epoch] = state(pl_module)

    fit(tmp_path, (row[0], lambda: [*row[1](), Look()]), 1)
    early = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert not names & early["state_dict"].keys()
    fit(tmp_path, (row[0], lambda: [*row[1](), Look()]), 3, str(tmp_path / "last.ckpt"))
    late = torch.load(tmp_path / "last.ckpt", weights_only=True)
    base = row[0]().state_dict()
    for name in names:
        assert torch.equal(seen[0][name], base[name])
        assert not torch.equal(seen[1][name], base[name])
        assert not torch.equal(seen[2][name], seen[1][name])
        assert torch.equal(late["state_dict"][name], seen[2][name])


def test_a_timer_that_is_over_at_once_leaves_the_base(tmp_path: Path) -> None:
    model, base = Small(), state(Small())
    run = trainer(tmp_path, oft(), Timer(datetime.timedelta(seconds=0)), max_epochs=3)
    run.fit(model, loader())
    assert run.global_step <= 1
    if run.global_step == 0:
        assert difference(state(model), base) == 0.0
    assert merged_layers(model) == oft_layers(model) != {}
    unmerge(model)
    assert all(torch.equal(state(model)[name], base[name]) for name in base if "net.6" not in name)


def test_the_summary_counts_what_trains(tmp_path: Path) -> None:
    seen: list[Any] = []

    class Summary(ModelSummary):
        def summarize(self, summary_data: Any, total: int, trainable: int, *_: Any, **__: Any) -> None:  # type: ignore[override]
            seen.append((total, trainable))

    trainer(tmp_path, Summary(), oft(), enable_model_summary=True).fit(Small(), loader())
    plain = sum(parameter.numel() for parameter in Small().parameters())
    rotations = 8 // 4 * 6 + 16 // 4 * 6
    assert seen == [(plain + rotations + 2 * 16 + 2, rotations + 2 * 16 + 2)] or seen == [
        (plain + rotations, rotations + 34)
    ]


def test_the_learning_rates_are_monitored(tmp_path: Path) -> None:
    from lightning.pytorch.loggers import CSVLogger

    trainer(tmp_path, oft(), LearningRateMonitor(), logger=CSVLogger(tmp_path)).fit(Small(), loader())


def test_the_top_k_are_kept_and_each_gives_its_own_number(tmp_path: Path) -> None:
    run, model, keeper = fit(tmp_path, (lambda: Small(lr=0.05), lambda: [oft()]), 4)
    assert len(keeper.best_k_models) == 2
    for path, score in keeper.best_k_models.items():
        assert run.validate(model, loader(False), ckpt_path=path, verbose=False)[0]["val"] == float(score)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        [*(Path(p).name for p in keeper.best_k_models), "last.ckpt"]
    )


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended")
def test_a_checkpoint_of_an_exception_is_the_state_it_was_raised_in(tmp_path: Path) -> None:
    class Failing(Small):
        def on_train_batch_end(self, *_: Any) -> None:
            if self.global_step == 11:
                raise RuntimeError("plug pulled")

    class Look(pl.Callback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            assert difference(state(pl_module), broken) == 0.0
            assert trainer.global_step == 11

    model, keeper = Failing(), ModelCheckpoint(tmp_path, save_on_exception=True, filename="late", every_n_epochs=10)
    with pytest.raises(RuntimeError, match="plug pulled"):
        trainer(tmp_path, oft(), keeper, max_epochs=4).fit(model, loader(), loader(False))
    broken = state(model)
    saved = torch.load(tmp_path / "late.ckpt", weights_only=True)
    assert saved["lightning_oft"]["adapter_only"]
    assert not saved["lightning_oft"]["merged"]
    other = Small()
    trainer(tmp_path, oft(), Look(), max_epochs=4).fit(
        other, loader(), loader(False), ckpt_path=str(tmp_path / "late.ckpt")
    )
    assert merged_layers(other) == oft_layers(other) != {}


def test_another_trainer_resumes(tmp_path: Path) -> None:
    row: Row = (Small, lambda: [oft()])
    _, straight, _ = fit(tmp_path / "straight", row, 4)
    fit(tmp_path, row, 2)
    options: dict[str, Any] = {"gradient_clip_val": 1e9, "log_every_n_steps": 1, "num_sanity_val_steps": 0}
    other = Small()
    run = trainer(
        tmp_path / "other",
        ModelSummary(),
        oft(),
        RandomState(),
        Timer(),
        max_epochs=4,
        enable_model_summary=True,
        **options,
    )
    run.fit(other, loader(), loader(False), ckpt_path=str(tmp_path / "last.ckpt"))
    assert difference(state(other), state(straight)) == 0.0


class Batched(Small):
    """Makes its own loader, as the tuner wants it."""

    def __init__(self) -> None:
        super().__init__(dropout=0.0)
        self.batch_size = 2

    def train_dataloader(self) -> Any:
        return DataLoader(TensorDataset(*inputs()), self.batch_size)

    val_dataloader = train_dataloader


class Untouched(pl.Callback):
    """When training starts, every rotation is the identity and nothing is merged."""

    def __init__(self) -> None:
        self.asked = 0

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.asked += 1
        rotations = [layer.oft_R["default"].weight for layer in oft_layers(pl_module).values()]
        assert len(rotations) == 2
        assert not any(bool(weight.any()) for weight in rotations)
        assert not merged_layers(pl_module)


@pytest.mark.parametrize(("finder", "order"), [("rate", 1), ("size", -1)], ids=["rate behind", "size before"])
def test_finders_leave_no_trace(tmp_path: Path, finder: str, order: int) -> None:
    callback: Any = LearningRateFinder(num_training_steps=24, early_stop_threshold=None)
    if finder == "size":
        callback = BatchSizeFinder(steps_per_trial=1, max_trials=2)
    torch.manual_seed(0)
    model, base, look = Batched(), state(Batched()), Untouched()
    run = trainer(tmp_path, *[oft(), callback][::order], look, enable_checkpointing=True)
    run.fit(model)
    assert (model.lr, model.batch_size) != (0.01, 2)
    assert look.asked == 1
    plain = Batched()
    plain.lr, plain.batch_size = model.lr, model.batch_size
    trainer(tmp_path, oft()).fit(plain)
    assert difference(state(model), state(plain)) == 0.0
    assert list(state(model)) == list(base)


def test_the_tuner_leaves_no_trace(tmp_path: Path) -> None:
    model, base = Batched(), state(Batched())
    run = trainer(tmp_path, oft(), enable_checkpointing=True)
    Tuner(run).lr_find(model, num_training=24, early_stop_threshold=None)
    now = state(model)
    assert all(torch.equal(now[name], base[name]) for name in base)
    assert not any(bool(now[name].any()) for name in now.keys() - base.keys())
    assert not merged_layers(model)
    run.fit(model)
    plain = Batched()
    plain.lr, plain.batch_size = model.lr, model.batch_size
    trainer(tmp_path, oft()).fit(plain)
    assert difference(state(model), state(plain)) == 0.0


class Skipping(Small):
    """Skips batches, as Lightning lets a training_step do, and may never call one of its layers."""

    def __init__(self, skipped: int, calls_all: bool) -> None:
        super().__init__(batch_norm=False)
        self.skipped, self.calls_all = skipped, calls_all

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.loss(batch)
        return None if batch_idx < self.skipped else loss

    def forward(self, x: Tensor) -> Tensor:
        net: Any = self.net
        return net(x) if self.calls_all else net[6](net[:2](x))  # type: ignore[no-any-return]


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
@pytest.mark.parametrize("skipped", [0, 1, 8], ids=["none", "the first", "all"])
def test_a_skipped_batch_is_no_layer_without_gradient(tmp_path: Path, skipped: int) -> None:
    model, base = Skipping(skipped, True), state(Skipping(skipped, True))
    trainer(tmp_path, oft()).fit(model, loader())
    assert (difference(state(model), base) > 0) is (skipped < 8)
    if skipped < 8:
        with pytest.raises(RuntimeError, match=r"net\.3.*got no gradient"):
            trainer(tmp_path, oft()).fit(Skipping(skipped, False), loader())


class Rebuilding(Small):
    """Builds its layers anew whenever it is asked to, as no configure_model should."""

    def __init__(self) -> None:
        super().__init__("configure_model")

    def configure_model(self) -> None:
        self.net = Small(batch_norm=False).net


@pytest.mark.filterwarnings("ignore:You're using the WeightAveraging callback with a model that overrides")
def test_layers_that_an_average_had_built_before_lightning_are_adapted_again(tmp_path: Path) -> None:
    model, average = Rebuilding(), EMAWeightAveraging(decay=0.8)
    trainer(tmp_path, oft(merge_on_fit_end=False), average).fit(model, loader())
    rotations: Any = {name: layer.oft_R["default"].weight for name, layer in oft_layers(model).items()}
    assert list(rotations) == ["net.0", "net.3"]
    assert all(bool(weight.any()) for weight in rotations.values())
    assert "configure_model" not in model.__dict__


def test_a_configure_model_set_on_the_instance_is_called_and_stays(tmp_path: Path) -> None:
    model: Any = Small("late")
    model.configure_model = own = functools.partial(Small.build, model)
    trainer(tmp_path, oft(merge_on_fit_end=False)).fit(model, loader())
    assert list(oft_layers(model)) == ["net.0", "net.3"]
    assert model.__dict__["configure_model"] is own


def test_a_merged_model_is_pruned_in_a_fit_of_its_own(tmp_path: Path) -> None:
    model: Any = Small(batch_norm=False)
    trainer(tmp_path, oft()).fit(model, loader())
    trainer(tmp_path, ModelPruning("l1_unstructured", amount=0.5)).fit(model, loader())
    weights = torch.cat([model.net[layer].weight.flatten() for layer in (0, 3)])
    assert 0.4 < float((weights == 0).float().mean()) < 0.6
    assert list(state(model)) == list(state(Small(batch_norm=False)))
