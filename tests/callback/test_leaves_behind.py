"""A run that trained nothing leaves a model as it found it, and a later fit starts as if there had been none."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import BatchSizeFinder, ModelCheckpoint
from lightning.pytorch.tuner import Tuner
from small import Small, difference, inputs, loader, merged_layers, oft, state, trainer
from torch.utils.data import DataLoader, TensorDataset

from lightning_oft import OFTFinetuning, inject, oft_layers, save_adapter, unload
from lightning_oft.layers.state import record_of

pytestmark = [
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks used to create"),
]

Evaluate = Callable[[Any, Small], Any]
RUNS: dict[str, Evaluate] = {
    "validate": lambda run, model: run.validate(model, loader(False), verbose=False),
    "test": lambda run, model: run.test(model, loader(False), verbose=False),
    "predict": lambda run, model: run.predict(model, loader(False)),
}


def looks(model: Small) -> dict[str, Any]:
    """Everything of a model that a run can change, but for its weights."""
    return {
        "names": list(model.state_dict()),
        "trains": {name: parameter.requires_grad for name, parameter in model.named_parameters()},
        "classes": [type(module) for module in model.modules()],
        "hooks": {"on_save_checkpoint", "on_load_checkpoint", "configure_model"} & model.__dict__.keys(),
        "records": [name for name, module in model.named_modules() if record_of(module) is not None],
        "merged": list(merged_layers(model)),
        "norm": model.net[4].training,  # type: ignore[index, union-attr]
    }


def _half_frozen() -> Small:
    model = Small()
    model.net[3].requires_grad_(False)  # type: ignore[index, operator, union-attr]
    return model


@pytest.mark.parametrize("make", [Small, _half_frozen, lambda: Small("setup"), lambda: Small("configure_model")])
@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
def test_a_run_without_training_leaves_a_plain_model_plain_and_a_fit_works(
    tmp_path: Path, make: Callable[[], Small], run: Evaluate
) -> None:
    model, twin, callback = make(), make(), oft()
    for other in (model, twin):
        other.setup("fit")
        other.configure_model()
    before, weights = looks(model), state(model)
    for one in (callback, OFTFinetuning(oft_block_size=4, target_modules=["net.0"], modules_to_save=["net.4"])):
        run(trainer(tmp_path, one), model)
        assert looks(model) == before
        assert difference(state(model), weights) == 0.0
    for net, callbacks in ((model, [callback]), (twin, [oft()])):
        torch.manual_seed(0)
        trainer(tmp_path, *callbacks).fit(net, loader(False), loader(False))
    assert difference(state(model), state(twin)) == 0.0
    assert merged_layers(model)
    assert looks(model)["norm"]  # also where a validation has come between
    merged, after = state(model), looks(model)
    run(trainer(tmp_path, callback), model)
    assert difference(state(model), merged) == 0.0
    assert looks(model) == after


def test_two_callbacks_leave_a_plain_model_plain(tmp_path: Path) -> None:
    model = Small()
    before = looks(model)
    parts = [oft(module=f"net.{n}", target_modules="all-linear", modules_to_save=None) for n in (0, 3)]
    trainer(tmp_path, *parts).validate(model, loader(False), verbose=False)
    assert looks(model) == before


@pytest.mark.parametrize("merged", [False, True])
def test_an_adapter_that_was_there_stays_and_another_one_leaves(tmp_path: Path, merged: bool) -> None:
    model = Small()
    trainer(tmp_path, oft(merge_on_fit_end=merged)).fit(model, loader(False))
    before, weights, output = looks(model), state(model), model.eval()(inputs()[0])
    model.train()
    other = OFTFinetuning(oft_block_size=2, target_modules=["net.6"], adapter_name="other")
    trainer(tmp_path, other).validate(model, loader(False), verbose=False)
    assert looks(model) == before
    assert difference(state(model), weights) == 0.0
    assert torch.equal(model.eval()(inputs()[0]), output)


def test_an_adapter_given_to_an_evaluation_is_in_it_and_not_behind_it(tmp_path: Path) -> None:
    source = Small()
    run = trainer(tmp_path, oft(merge_on_fit_end=False))
    run.fit(source, loader(False))
    wanted = run.test(source, loader(False), verbose=False)
    save_adapter(source, tmp_path / "adapter")
    model = Small()
    before = looks(model)
    for _ in range(2):
        callback = OFTFinetuning(pretrained_adapter=str(tmp_path / "adapter"))
        assert trainer(tmp_path, callback).test(model, loader(False), verbose=False) == wanted
        assert looks(model) == before


def test_a_checkpoint_that_was_loaded_stays_loaded(tmp_path: Path) -> None:
    """As Lightning leaves it: the model computes what was scored."""
    source = Small()
    trainer(tmp_path, oft(), ModelCheckpoint(tmp_path, save_last=True, save_top_k=0)).fit(source, loader(False))
    model = Small()
    trainer(tmp_path, oft()).validate(model, loader(False), ckpt_path=str(tmp_path / "last.ckpt"), verbose=False)
    assert list(oft_layers(model)) == ["net.0", "net.3"]
    torch.testing.assert_close(model.eval()(inputs()[0]), source.eval()(inputs()[0]))


class Batched(Small):
    def __init__(self) -> None:
        super().__init__()
        self.batch_size = 2

    def val_dataloader(self) -> Any:
        return DataLoader(TensorDataset(*inputs()), self.batch_size)


@pytest.mark.parametrize("finder", ["tuner", "callback"])
def test_a_search_for_the_batch_size_in_a_validation_leaves_nothing(tmp_path: Path, finder: str) -> None:
    model = Batched()
    before, weights = looks(model), state(model)
    if finder == "tuner":
        run = trainer(tmp_path, oft())
        Tuner(run).scale_batch_size(model, method="validate", steps_per_trial=1, max_trials=2)
    else:
        trainer(tmp_path, oft(), BatchSizeFinder(steps_per_trial=1, max_trials=2)).validate(model, verbose=False)
    assert model.batch_size > 2
    assert looks(model) == before
    assert difference(state(model), weights) == 0.0


def test_a_fit_that_has_no_step_keeps_its_adapter(tmp_path: Path) -> None:
    model = Small()
    trainer(tmp_path, oft(merge_on_fit_end=False), max_epochs=0).fit(model, loader())
    assert list(oft_layers(model)) == ["net.0", "net.3"]
    unload(model)
    inject(model, oft().config)
    trainer(tmp_path, oft()).validate(model, loader(False), verbose=False)
    assert list(oft_layers(model)) == ["net.0", "net.3"]


def test_a_fit_leaves_no_filter_of_warnings(tmp_path: Path) -> None:
    before = list(warnings.filters)
    trainer(tmp_path, oft()).fit(Small(), loader())
    assert list(warnings.filters) == before
