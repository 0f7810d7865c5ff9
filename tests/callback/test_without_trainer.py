"""Without our life cycle or without this Lightning: compiled code, Fabric, and the other namespace."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric import Fabric
from small import FEATURES, Small, difference, inputs, loader, net, oft, state
from torch import Tensor, nn

from lightning_oft import OFTConfig, inject, merge, oft_layers, project, unload, unmerge
from lightning_oft.callback.random_state import RandomState
from lightning_oft.formats.checkpoint_file import is_rotation_key
from lightning_oft.functional import angle_radius, frobenius_norm

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*should not be instantiated. Methods on autograd functions:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`"),
]

CONFIG = OFTConfig(oft_block_size=4, target_modules=["0", "3"], use_cayley_neumann=False, max_angle=5.0)


def _turned(model: nn.Module, value: float) -> nn.Module:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if is_rotation_key(name):
                parameter.fill_(value)
    return model


def test_compiled_code_sees_every_change() -> None:
    torch.compiler.reset()
    model, x = net(dropout=0.0).eval(), inputs()[0]
    whole: Any = torch.compile(model, backend="eager")
    base = whole(x)
    inject(model, CONFIG)
    _turned(model, 0.1)
    torch.testing.assert_close(whole(x), model(x))
    assert not torch.allclose(whole(x), base)
    rotated = model(x)
    merge(model)
    torch.testing.assert_close(whole(x), rotated)
    unmerge(model)
    torch.testing.assert_close(whole(x), rotated)
    _turned(model, 0.0)
    torch.testing.assert_close(whole(x), base)
    unload(model)
    torch.testing.assert_close(whole(x), base)
    inject(model, CONFIG)
    _turned(model, -0.1)
    assert not torch.allclose(whole(x), base)
    torch.testing.assert_close(whole(x), model(x))


def test_compiled_and_plain_train_alike() -> None:
    torch.compiler.reset()
    results = []
    for compiled in (False, True):
        model = net(dropout=0.0)
        inject(model, CONFIG)
        call: Any = torch.compile(model, backend="aot_eager") if compiled else model
        optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 0.01)
        for x, y in loader(False):
            optimizer.zero_grad()
            nn.functional.cross_entropy(call(x), y).backward()
            optimizer.step()
        results.append(state(model))
    assert difference(*results) < 1e-6


def _train(fabric: Fabric, model: Any, optimizer: Any, hooked: bool, epochs: int = 1) -> None:
    handle = optimizer.optimizer.register_step_post_hook(lambda *_: project(model.module)) if hooked else None
    for _ in range(epochs):
        for x, y in loader(False):
            optimizer.zero_grad()
            fabric.backward(nn.functional.cross_entropy(model(x), y))
            optimizer.step()
            if not hooked:
                project(model)
    if handle is not None:
        handle.remove()


def _fabric_parts(precision: Any = "32-true") -> tuple[Fabric, nn.Module, Any, Any]:
    fabric, plain = Fabric(accelerator="cpu", devices=1, precision=precision), net(dropout=0.0)
    inject(plain, CONFIG)
    optimizer = torch.optim.Adam([p for p in plain.parameters() if p.requires_grad], 0.3)
    model, optimizer = fabric.setup(plain, optimizer)  # type: ignore[assignment]
    return fabric, plain, model, optimizer


def _norms(model: nn.Module) -> Tensor:
    layers: Any = oft_layers(model).values()
    return torch.cat([frobenius_norm(layer.oft_R["default"].weight.detach()) for layer in layers])


@pytest.mark.parametrize(("precision", "hooked"), [("32-true", True), ("bf16-mixed", True), ("bf16-true", False)])
def test_fabric_trains_projects_and_merges(precision: str, hooked: bool) -> None:
    fabric, plain, model, optimizer = _fabric_parts(precision)
    _train(fabric, model, optimizer, hooked)
    norms = _norms(model)
    assert float(norms.max()) == pytest.approx(angle_radius(5.0), rel=1e-5)  # the learning rate is large
    assert all(layer.oft_R["default"].weight.dtype == torch.float32 for layer in oft_layers(plain).values())  # type: ignore[index, union-attr, operator]
    model.eval()
    x = inputs()[0]
    with torch.no_grad():
        before = model(x)
        assert merge(model) == ["0", "3"]
        tolerance = {"32-true": 1e-5, "bf16-mixed": 0.05, "bf16-true": 0.05}[precision]
        torch.testing.assert_close(model(x), before, rtol=tolerance, atol=tolerance)
    assert list(plain.state_dict()) == list(net().state_dict())


def test_fabric_saves_the_adapter_alone_and_resumes(tmp_path: Path) -> None:
    fabric, straight, model, optimizer = _fabric_parts()
    _train(fabric, model, optimizer, True, 2)
    fabric, _, model, optimizer = _fabric_parts()
    _train(fabric, model, optimizer, True)
    keep = {"model": lambda name, value: is_rotation_key(name)}
    fabric.save(tmp_path / "adapter.ckpt", {"model": model, "optimizer": optimizer}, filter=keep)
    saved = torch.load(tmp_path / "adapter.ckpt", weights_only=True)
    assert set(saved["model"]) == {"0.oft_R.default.weight", "3.oft_R.default.weight"}
    fabric, resumed, model, optimizer = _fabric_parts()
    fabric.load(tmp_path / "adapter.ckpt", {"model": model, "optimizer": optimizer}, strict=False)
    _train(fabric, model, optimizer, True)
    assert difference(state(resumed), state(straight)) == 0.0


def test_the_other_namespace_takes_the_callback_as_it_is(tmp_path: Path) -> None:
    ptl = pytest.importorskip("pytorch_lightning")

    class Other(ptl.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.net = net(dropout=0.0)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss = nn.functional.cross_entropy(self.net(batch[0]), batch[1])
            self.log("loss", loss)
            return loss

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val", nn.functional.cross_entropy(self.net(batch[0]), batch[1]))

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), 0.01)

    def fit(root: Path, epochs: int, ckpt: Any = None, seed: int = 0) -> tuple[Any, Any, Any]:
        torch.manual_seed(seed)
        keeper = ptl.callbacks.ModelCheckpoint(root, monitor="val", save_last=True)
        quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
        run = ptl.Trainer(
            max_epochs=epochs,
            callbacks=[oft(max_angle=20.0), RandomState(), keeper],
            default_root_dir=str(root),
            **quiet,
        )
        model = Other()
        run.fit(model, loader(), loader(False), ckpt_path=ckpt)
        return run, model, keeper

    _, straight, _ = fit(tmp_path / "straight", 3)
    fit(tmp_path, 1)
    run, model, keeper = fit(tmp_path, 3, str(tmp_path / "last.ckpt"), 99)
    assert difference(state(model), state(straight)) == 0.0
    assert list(state(model)) == [name for name in state(Small()) if name.startswith("net")]
    found = run.validate(model, loader(False), ckpt_path="best", verbose=False)[0]["val"]
    assert found == float(keeper.best_model_score)
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert saved["lightning_oft"]["adapter_only"]
    assert "net.0.weight" not in saved["state_dict"]
    assert not list(tmp_path.glob(".*.part"))
    assert saved["state_dict"]["net.0.oft_R.default.weight"].shape[0] * 4 == FEATURES
