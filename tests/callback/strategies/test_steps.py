"""After every real optimizer step, and never otherwise: the projection; and the checks that belong there."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
from small import Small, loader, oft, state, trainer
from torch import Tensor, nn

from lightning_oft import OFTFinetuning, oft_layers
from lightning_oft.functional import angle_radius, frobenius_norm

pytestmark = pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`")


def _norms(model: nn.Module) -> dict[str, Tensor]:
    return {
        name: frobenius_norm(layer.oft_R["default"].weight.detach())  # type: ignore[index, union-attr, operator]
        for name, layer in oft_layers(model).items()
    }


class InBall(pl.Callback):
    """Checks the ball after every batch, and counts the steps that changed anything."""

    def __init__(self, radius: float) -> None:
        self.radius, self.checked, self.largest = radius, 0, 0.0

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        for norms in _norms(pl_module).values():
            assert bool((norms <= self.radius * (1 + 1e-6)).all())
            self.largest = max(self.largest, float(norms.max()))
        self.checked += 1


class Manual(Small):
    """Two optimizers by hand, one for each layer."""

    def __init__(self, raw: bool = False) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.raw = raw

    def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        optimizers: Any = self.optimizers(use_pl_optimizer=not self.raw)
        loss = self.loss(batch)
        for optimizer in optimizers:
            optimizer.zero_grad()
        self.manual_backward(loss)
        optimizers[batch_idx % 2].step()

    def configure_optimizers(self) -> Any:
        return [torch.optim.Adam(layer.parameters(), 0.3) for layer in (self.net[0], self.net[3])]  # type: ignore[index]


class Skipping(torch.amp.GradScaler):
    """A scaler that skips every third step, as one that met an overflow does."""

    calls = 0

    def step(self, optimizer: Any, *args: Any, **kwargs: Any) -> Any:
        Skipping.calls += 1
        return None if Skipping.calls % 3 == 0 else super().step(optimizer, *args, **kwargs)


RUNS: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulation": {"accumulate_grad_batches": 3},
    "clipping": {"gradient_clip_val": 0.5},
    "manual": {"model": lambda: Manual()},
    "manual_raw": {"model": lambda: Manual(raw=True)},
    "skipping_scaler": {"plugins": lambda: [MixedPrecision("16-mixed", "cpu", scaler=Skipping("cpu"))]},
}


@pytest.mark.parametrize(
    ("run", "by"), [(RUNS["plain"], "eps"), *((run, "max_angle") for run in RUNS.values())], ids=["plain_eps", *RUNS]
)
def test_every_block_lies_in_its_ball_after_every_step(tmp_path: Path, run: dict[str, Any], by: str) -> None:
    options = {key: value() if callable(value) else value for key, value in run.items()}
    model = options.pop("model", None) or Small(lr=0.3)
    # eps by the paper's radius: eps b^2 / sqrt(n); net.0 has 2 blocks of 4, net.3 has 4: the larger ball is net.0's
    constraint: dict[str, Any] = {"coft": True, "eps": 0.01} if by == "eps" else {"max_angle": 5.0}
    radius = 0.01 * 16 / math.sqrt(2) if by == "eps" else angle_radius(5.0)
    ball = InBall(radius)
    trainer(tmp_path, oft(**constraint, modules_to_save=None), ball, **options).fit(model, loader())
    assert ball.checked == 8
    assert ball.largest == pytest.approx(radius, rel=1e-5)  # the learning rate is large: the sphere is reached


class Teacher(pl.LightningModule):
    """Learns a rotation: the targets are those of a base rotated by `angle` in every plane of 64."""

    def __init__(self, size: float) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.layer = nn.Linear(64, 64, bias=False)
        self.layer.weight.data = torch.randn(64, 64, generator=generator) / 8
        upper = torch.randn(64, 64, generator=generator).triu(1)
        q = upper - upper.T
        q *= size / q.norm()
        eye = torch.eye(64)
        self.register_buffer("target", self.layer.weight.data @ torch.linalg.solve(eye - q, eye + q).T)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x = batch[0]
        return nn.functional.mse_loss(self.layer(x), x @ self.target.T)  # type: ignore[operator, union-attr]

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.parameters(), 0.02)
        return [optimizer], [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 5)]


@pytest.mark.parametrize(("size", "inside"), [(2.0, True), (12.0, False)], ids=["inside", "outside"])
def test_a_solution_in_the_ball_is_found_and_one_outside_ends_on_the_sphere(
    tmp_path: Path, size: float, inside: bool
) -> None:
    model = Teacher(size)
    data = torch.utils.data.TensorDataset(torch.randn(1024, 64))
    callback = OFTFinetuning(oft_block_size=64, coft=True, eps=1e-3, use_cayley_neumann=False, merge_on_fit_end=False)
    run = trainer(tmp_path, callback, max_epochs=5)
    first = float(nn.functional.mse_loss(model.layer.weight.detach(), model.target))  # type: ignore[arg-type]
    run.fit(model, torch.utils.data.DataLoader(data, 16))
    radius = 1e-3 * 64**2
    norm = float(_norms(model)["layer"].max())
    weight = model.layer.oft_R["default"](model.layer.weight, transpose=True)  # type: ignore[index, operator, union-attr]
    last = float(nn.functional.mse_loss(weight.detach(), model.target))  # type: ignore[arg-type]
    if inside:
        assert norm < 0.9 * radius
        assert last < 1e-3 * first
    else:
        assert norm == pytest.approx(radius, rel=1e-5)
        assert last < first


def test_the_start_warns_of_a_ball_that_allows_nothing(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"at most 0.00\d+ degrees.*raise eps"):
        trainer(tmp_path, oft(coft=True, eps=1e-6)).fit(Small(), loader())


def test_the_start_warns_of_a_ball_that_is_too_large_for_the_series(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="no longer orthogonal.*use_cayley_neumann=false"):
        trainer(tmp_path, oft(max_angle=90.0, use_cayley_neumann=True, series_guard="warn")).fit(Small(), loader())
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="the constraint lets")
        trainer(tmp_path, oft(max_angle=90.0, use_cayley_neumann=True)).fit(Small(lr=1e-3), loader())


def test_a_series_that_leaves_its_tolerance_says_so_once(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"net\.[03]: its rotation has grown.*exact map") as caught:
        trainer(tmp_path, oft(use_cayley_neumann=True, series_guard="warn"), max_epochs=3).fit(Small(lr=0.2), loader())
    assert len([w for w in caught if "has grown" in str(w.message)]) == 1


def test_parameters_cached_before_the_injection_are_refused(tmp_path: Path) -> None:
    class Cached(Small):
        def build(self) -> None:
            super().build()
            self.cached = list(self.net.parameters())

        def configure_optimizers(self) -> Any:
            return torch.optim.Adam(self.cached, 0.01)

    with pytest.raises(RuntimeError, match=r"net.0, net.3 are in no optimizer.*configure_optimizers"):
        trainer(tmp_path, oft()).fit(Cached(), loader())


def test_a_layer_that_is_never_called_is_named(tmp_path: Path) -> None:
    class Bypassing(Small):
        def forward(self, x: Tensor) -> Tensor:
            layer: Any = self.net[0]  # type: ignore[index]
            output: Tensor = self.net[1:](nn.functional.linear(x, layer.weight, layer.bias))  # type: ignore[index, operator]
            return output

    model = Bypassing()
    base = state(model)
    with pytest.raises(RuntimeError, match=r"weight of net.0 is used in Bypassing, past.*exclude_modules"):
        trainer(tmp_path, oft()).fit(model, loader())
    assert torch.equal(state(model)["net.3.weight"], base["net.3.weight"])


def test_layers_replaced_after_the_injection_are_named(tmp_path: Path) -> None:
    class Replacing(pl.Callback):
        def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
            pl_module._replace = True

    class Model(Small):
        def on_fit_start(self) -> None:
            pass

        def configure_optimizers(self) -> Any:
            self.net[3] = nn.Linear(16, 16)  # type: ignore[index, operator]
            return super().configure_optimizers()

    with pytest.raises(RuntimeError, match=r"net\.3: the rotations put there at setup are gone"):
        trainer(tmp_path, oft(), Replacing()).fit(Model(), loader())


def test_nothing_matched_is_an_error_before_training(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"target_modules=\['q_proj'\] matches nothing.*net.0"):
        trainer(tmp_path, oft(target_modules=["q_proj"])).fit(Small(), loader())
