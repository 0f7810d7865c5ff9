"""What a fit does to a model, and what it does not."""

from __future__ import annotations

import copy
import logging
import pickle
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from small import Small, difference, inputs, loader, oft, state, trainer
from torch import Tensor, nn

from lightning_oft import OFTFinetuning, oft_layers, unload, unmerge

BUILT_IN = ["init", "setup", "configure_model"]
TRAINED = {"net.0.weight", "net.3.weight", "net.6.weight", "net.6.bias"}

pytestmark = [
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`"),
    pytest.mark.filterwarnings("ignore:Found .* module.* in eval mode"),  # which a test has put there
]


def _reference() -> dict[str, Tensor]:
    return state(Small())


@pytest.mark.parametrize("built_in", BUILT_IN)
def test_fit_trains_merges_and_leaves_a_plain_model(tmp_path: Path, built_in: str) -> None:
    model, base = Small(built_in), _reference()
    trainer(tmp_path, oft()).fit(model, loader(), loader(False))
    after = state(model)
    assert list(after) == list(base)
    assert {name for name in base if not torch.equal(after[name], base[name])} == TRAINED
    assert [type(module) for module in model.net] == [type(module) for module in Small().net]
    for name in ("net.0.weight", "net.3.weight"):  # rotated, not rescaled: the norm of every neuron stays
        torch.testing.assert_close(after[name].norm(dim=1), base[name].norm(dim=1))


def test_unmerge_after_a_fit_returns_the_base_to_the_bit_and_unload_all_of_it(tmp_path: Path) -> None:
    model, base = Small(), _reference()
    trainer(tmp_path, oft()).fit(model, loader())
    unmerge(model)
    now = state(model)
    assert all(torch.equal(now[name], base[name]) for name in base if "net.6" not in name)
    unload(model)
    assert difference(state(model), base) == 0.0
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("keep_base", ["auto", "never"])
def test_keep_base_decides_how_exact_the_way_back_is(tmp_path: Path, keep_base: str) -> None:
    model, base = Small(), _reference()
    trainer(tmp_path, oft(keep_base=keep_base)).fit(model, loader())
    unmerge(model)
    worst = max(float((state(model)[name] - base[name]).abs().max()) for name in ("net.0.weight", "net.3.weight"))
    assert worst == 0.0 if keep_base != "never" else worst < 1e-6


def test_without_the_merge_the_adapter_stays_active(tmp_path: Path) -> None:
    model = Small()
    trainer(tmp_path, oft(merge_on_fit_end=False)).fit(model, loader())
    assert list(oft_layers(model)) == ["net.0", "net.3"]
    assert any("oft_R" in name for name in model.state_dict())


def test_disabled_trains_everything_as_if_it_were_not_there(tmp_path: Path) -> None:
    plain, with_callback = Small(), Small()
    torch.manual_seed(0)
    trainer(tmp_path).fit(plain, loader(False))
    torch.manual_seed(0)
    trainer(tmp_path, oft(enabled=False)).fit(with_callback, loader(False))
    assert difference(state(plain), state(with_callback)) == 0.0


def test_batch_norm_of_the_base_stays_in_eval_and_lightning_does_not_warn(tmp_path: Path) -> None:
    seen: list[bool] = []

    class Look(pl.Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            seen.append(pl_module.net[4].training)

    trainer(tmp_path, oft(), Look()).fit(Small(), loader())
    assert seen
    assert not any(seen)


def test_a_second_fit_continues_from_the_first(tmp_path: Path) -> None:
    model = Small()
    callback = oft()
    trainer(tmp_path, callback).fit(model, loader())
    merged, output = state(model), model.eval()(inputs()[0])
    trainer(tmp_path, callback, max_epochs=0).fit(model, loader())
    assert difference(state(model), merged) < 1e-6
    torch.testing.assert_close(model.eval()(inputs()[0]), output)
    trainer(tmp_path, oft()).fit(model, loader())  # another Trainer, another callback
    assert difference(state(model), merged) > 1e-4
    unload(model)
    assert not oft_layers(model)


def test_start_and_end_say_what_happened_in_one_line_each(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        trainer(tmp_path, oft(max_angle=20.0)).fit(Small(), loader())
    lines = [record.getMessage() for record in caplog.records if record.getMessage().startswith("OFT adapter")]
    assert len(lines) == 2
    assert "2 layers" in lines[0]
    assert "block size 4" in lines[0]
    assert "20 degrees" in lines[0]
    assert "70 of 518" in lines[0]
    assert "merged into 2 layers" in lines[1]


def test_the_configuration_reaches_the_logger(tmp_path: Path) -> None:
    from lightning.pytorch.loggers import CSVLogger

    logger = CSVLogger(tmp_path)
    trainer(tmp_path, oft(), logger=logger).fit(Small(), loader())
    assert logger.experiment.hparams["oft"]["oft_block_size"] == 4


@pytest.mark.parametrize("error", [RuntimeError("boom"), KeyboardInterrupt()], ids=["error", "interrupt"])
def test_a_failed_fit_merges_nothing_and_leaves_no_hook(tmp_path: Path, error: BaseException) -> None:
    class Failing(Small):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            if batch_idx == 3:
                raise error
            return super().training_step(batch, batch_idx)

    model, base = Failing(), _reference()
    run = trainer(tmp_path, oft())
    with pytest.raises((RuntimeError, SystemExit)):
        run.fit(model, loader())
    assert not run.optimizers[0]._optimizer_step_post_hooks
    assert "configure_model" not in model.__dict__
    after = state(model)
    assert all(torch.equal(after[name], base[name]) for name in base if "net.6" not in name)
    model.__class__ = Small
    trainer(tmp_path, oft()).fit(model, loader())  # and it can be fitted again
    assert list(model.state_dict()) == list(base)


def test_merged_models_copy_pickle_and_predict(tmp_path: Path) -> None:
    model = Small()
    run = trainer(tmp_path, oft())
    run.fit(model, loader())
    x = inputs()[0]
    output = model.eval()(x)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(twin(x), output, rtol=0, atol=0)
        unmerge(twin)
        torch.testing.assert_close(twin(x), output)
    predictions = run.predict(model, loader(False))
    assert predictions is not None
    torch.testing.assert_close(torch.cat([torch.as_tensor(p) for p in predictions]), output)


def test_the_callback_pickles_and_copies() -> None:
    callback = oft(max_angle=10.0)
    for twin in (pickle.loads(pickle.dumps(callback)), copy.deepcopy(callback)):
        assert twin.config == callback.config
        assert twin.state_key == callback.state_key


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
def test_generators_stay_float32_in_every_precision(tmp_path: Path, precision: Any) -> None:
    class Look(pl.Callback):
        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            weight = pl_module.net[0].oft_R["default"].weight
            assert weight.dtype == torch.float32
            assert trainer.optimizers[0].state[weight]["exp_avg"].dtype == torch.float32
            assert float(weight.detach().abs().max()) > 0

    model = Small(dropout=0.0, batch_norm=False)
    run = trainer(tmp_path, oft(), Look(), precision=precision)
    run.fit(model, loader())
    expected = {"bf16-true": torch.bfloat16, "64-true": torch.float64}.get(precision, torch.float32)
    assert model.net[0].weight.dtype == expected


def test_two_callbacks_adapt_two_parts(tmp_path: Path) -> None:
    class Two(Small):
        def build(self) -> None:
            super().build()
            torch.manual_seed(2)
            self.other = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(self.other(x))

    model = Two()
    base = state(model)
    first = oft(module="net", target_modules=["0", "3"], modules_to_save=["6"], save_adapter_only=True)
    second = OFTFinetuning(module="other", oft_block_size=2, adapter_name="second")
    run = trainer(tmp_path, first, second, pl.callbacks.ModelCheckpoint(tmp_path, save_last=True))
    run.fit(model, loader())
    changed = {name for name in base if not torch.equal(state(model)[name], base[name])}
    assert changed == {*TRAINED, "other.weight"}
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    rotations = [name for name in saved["state_dict"] if "oft_R" in name]
    assert sorted(rotations) == [
        "net.0.oft_R.default.weight",
        "net.3.oft_R.default.weight",
        "other.oft_R.second.weight",
    ]
    assert "other.weight" not in saved["state_dict"]
    run.test(model, loader(False), ckpt_path=str(tmp_path / "last.ckpt"), verbose=False)
    assert list(model.state_dict()) == list(base)


def test_module_that_does_not_exist_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nett.*did you mean 'net'"):
        trainer(tmp_path, oft(module="nett")).fit(Small(), loader())


def test_unknown_option_names_the_nearest() -> None:
    with pytest.raises(TypeError, match="no option 'oft_blocksize'; did you mean 'oft_block_size'"):
        OFTFinetuning(oft_blocksize=4)
