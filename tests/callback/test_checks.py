"""What is wrong before a fit begins is said before it begins, and the model stays as it was."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, ModelPruning
from small import Small, loader, merged_layers, oft, trainer
from torch import nn
from torch.nn.utils import parametrizations, prune

from lightning_oft import OFTConfig, OFTFinetuning, inject, merge, oft_layers, unload, unmerge
from lightning_oft.callback.checks import check_callbacks
from lightning_oft.callback.strategies.base import strategy_adapter

pytestmark = pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`")

HOOKS = {"on_save_checkpoint", "on_load_checkpoint", "configure_model"}


def _looks(model: Small) -> dict[str, Any]:
    return {
        "state": {name: value.clone() for name, value in model.state_dict().items()},
        "trains": [parameter.requires_grad for parameter in model.parameters()],
        "classes": [type(module) for module in model.modules()],
        "hooks": HOOKS & model.__dict__.keys(),
        "merged": list(merged_layers(model)),
    }


def _same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    states = one.pop("state"), other.pop("state")
    return one == other and all(torch.equal(states[0][name], states[1][name]) for name in states[0])


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "a target that matches nothing": ({"target_modules": ["nope"]}, "nope"),
    "a place that is a file": ({"export_dir": "taken"}, "export_dir='.*taken': cannot be written"),
    "an adapter's place that is a file": ({"export_dir": "half"}, "half/adapter: is a file"),
    "a place of something else": ({"export_dir": "precious"}, "merged: holds something else than a model"),
}


@pytest.mark.parametrize(("options", "message"), REFUSED.values(), ids=REFUSED)
def test_a_fit_that_is_refused_leaves_the_model_as_it_was(
    tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    (tmp_path / "taken").touch()
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "adapter").touch()
    (tmp_path / "precious" / "merged").mkdir(parents=True)
    (tmp_path / "precious" / "merged" / "thesis.txt").write_text("mine")
    if "export_dir" in options:
        options = {"export_dir": str(tmp_path / options["export_dir"])}
    model = Small()
    before = _looks(model)
    with pytest.raises((ValueError, OSError), match=message) as error:
        trainer(tmp_path, oft(**options)).fit(model, loader())
    assert "\n" not in str(error.value)
    assert _same(_looks(model), before)
    assert not oft_layers(model)
    assert (tmp_path / "precious" / "merged" / "thesis.txt").read_text() == "mine"
    trainer(tmp_path, oft()).fit(model, loader())
    assert merged_layers(model)


@pytest.mark.parametrize("damage", ["another base", "cut short"])
def test_a_checkpoint_that_is_refused_leaves_the_model_as_it_was(tmp_path: Path, damage: str) -> None:
    place = tmp_path / "last.ckpt"
    trainer(tmp_path, oft(), ModelCheckpoint(tmp_path, save_last=True)).fit(Small(), loader())
    model = Small()
    if damage == "another base":
        nn.init.ones_(model.net[0].weight)  # type: ignore[index, union-attr]
    else:
        place.write_bytes(place.read_bytes()[:-500])
    before = _looks(model)
    with pytest.raises((ValueError, RuntimeError, OSError)):
        trainer(tmp_path, oft(), ModelCheckpoint(tmp_path, save_last=True)).fit(model, loader(), ckpt_path=str(place))
    assert _same(_looks(model), before)


@pytest.mark.parametrize("merge", [True, False], ids=["merged", "unmerged"])
def test_another_configuration_of_an_adapter_that_is_there_is_refused(tmp_path: Path, merge: bool) -> None:
    model = Small()
    trainer(tmp_path, oft(merge_on_fit_end=merge)).fit(model, loader())
    before = _looks(model)
    other = oft(max_angle=1.0)
    message = r"'default' is already there with another configuration \(max_angle=None, now 1\.0\): unload\(model\) to"
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, other).fit(model, loader())
    assert _same(_looks(model), before)
    unload(model)
    trainer(tmp_path, other).fit(model, loader())


def _part(index: int, **options: Any) -> OFTFinetuning:
    return oft(module=f"net.{index}", target_modules="all-linear", modules_to_save=None, **options)


def test_two_callbacks_do_not_write_into_one_directory(tmp_path: Path) -> None:
    parts = [_part(0, export_dir=str(tmp_path / "one")), _part(3, export_dir=str(tmp_path / "two" / ".." / "one"))]
    with pytest.raises(ValueError, match="two OFTFinetuning callbacks have export_dir="):
        trainer(tmp_path, *parts).fit(Small(), loader())
    trainer(tmp_path, *parts).validate(Small(), loader(shuffle=False), verbose=False)  # writes nothing


def test_two_callbacks_may_share_a_name_where_they_share_no_layer(tmp_path: Path) -> None:
    model = Small()
    rest = oft(target_modules=["net.3"], oft_block_size=2, modules_to_save=None)
    trainer(tmp_path, _part(0), rest).fit(model, loader())
    assert list(merged_layers(model)) == ["net.0", "net.3"]


class RaisesAt(pl.Callback):
    """Fails in one hook, behind ours."""

    def __init__(self, hook: str, error: type[BaseException]) -> None:
        self.hook, self.error = hook, error
        setattr(self, hook, self.fail)

    def fail(self, *_: Any, **__: Any) -> None:
        raise self.error("on purpose")


def test_each_callback_reports_its_own_layers(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    run = trainer(tmp_path, oft(target_modules=["net.0"]), oft(target_modules=["net.3"], adapter_name="other"))
    run.fit(Small(), loader())
    said = sorted(line for line in caplog.messages if "merged into" in line)
    assert said == [f"OFT adapter {name!r}: merged into 1 layer" for name in ("default", "other")]


@pytest.mark.parametrize("field", ["target_modules", "exclude_modules"])
def test_a_name_that_matches_nothing_is_said_once(field: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    names = ["net.0", "net.33"] if field == "target_modules" else ["net.33"]
    options = {"target_modules": ["net.0"], field: names}
    trainer(tmp_path, oft(**options)).fit(Small(), loader())
    assert len([line for line in caplog.messages if f"{field}: net.33 matches no module" in line]) == 1


@pytest.mark.parametrize("merged", [False, True], ids=["plain", "merged"])
@pytest.mark.parametrize(
    ("hook", "error"),
    [("setup", ValueError), ("on_fit_start", ValueError), ("on_train_epoch_start", KeyboardInterrupt)],
)
def test_what_fails_before_the_first_batch_leaves_the_model_as_it_was(
    tmp_path: Path, hook: str, error: type[BaseException], merged: bool
) -> None:
    model = Small()
    if merged:
        trainer(tmp_path, oft()).fit(model, loader())
    before = _looks(model)
    with pytest.raises((error, SystemExit)):
        trainer(tmp_path, oft(), RaisesAt(hook, error)).fit(model, loader())
    assert _same(_looks(model), before)


def test_a_part_that_is_not_merged_stays_held(tmp_path: Path) -> None:
    model = Small()
    trainer(tmp_path, _part(0), _part(3, merge_on_fit_end=False)).fit(model, loader())
    assert list(merged_layers(model)) == ["net.0"]
    assert [name for name, p in model.named_parameters() if p.requires_grad] == ["net.3.oft_R.default.weight"]
    trainer(tmp_path, _part(0), _part(3)).validate(model, loader(shuffle=False), verbose=False)
    assert list(merged_layers(model)) == ["net.0"]


@pytest.mark.filterwarnings("ignore:net.6.weight, net.6.bias. trained or changed beside")
@pytest.mark.parametrize("merge_on_fit_end", [True, False])
def test_what_somebody_else_trains_still_trains_after_an_export(tmp_path: Path, merge_on_fit_end: bool) -> None:
    class Thaw(pl.Callback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            pl_module.net[6].requires_grad_(True)

    model = Small()
    options: dict[str, Any] = {"modules_to_save": None, "merge_on_fit_end": merge_on_fit_end}
    trainer(tmp_path, oft(export_dir=str(tmp_path / "export"), **options), Thaw()).fit(model, loader())
    assert all(parameter.requires_grad for parameter in model.net[6].parameters())  # type: ignore[index, union-attr]


def test_a_merge_taken_back_freezes_nothing_that_no_adapter_had() -> None:
    model = Small().net
    inject(model.get_submodule("0"), OFTConfig(oft_block_size=4))
    trains = [parameter.requires_grad for parameter in model.parameters()]
    merge(model.get_submodule("0"))
    unmerge(model.get_submodule("0"))
    assert [parameter.requires_grad for parameter in model.parameters()] == trains


def test_a_head_that_was_frozen_is_frozen_again_after_the_merge(tmp_path: Path) -> None:
    model = Small()
    model.net[6].requires_grad_(False)  # type: ignore[index, operator, union-attr]
    trains = [parameter.requires_grad for parameter in model.parameters()]
    trainer(tmp_path, oft()).fit(model, loader())
    assert [parameter.requires_grad for parameter in model.parameters()] == trains
    unmerge(model)
    assert all(parameter.requires_grad for parameter in model.net[6].parameters())  # type: ignore[index, union-attr]


@pytest.mark.parametrize(
    "options",
    [{"enabled": "no"}, {"module": 3}, {"merge_on_fit_end": 1}, {"adapter_name": 3}, {"export_dir": 5}],
    ids=str,
)
def test_an_argument_of_a_wrong_type_is_refused_at_once(options: dict[str, Any]) -> None:
    ((name, value),) = options.items()
    with pytest.raises(TypeError, match=f"{name}={value!r}: must be"):
        OFTFinetuning(**options)


def test_a_merged_model_trains_like_any_other(tmp_path: Path) -> None:
    model = Small()
    trains = [parameter.requires_grad for parameter in model.parameters()]
    trainer(tmp_path, oft()).fit(model, loader())
    assert [parameter.requires_grad for parameter in model.parameters()] == trains
    merged = {name: value.clone() for name, value in model.state_dict().items()}
    trainer(tmp_path, oft()).validate(model, loader(shuffle=False), verbose=False)
    assert [parameter.requires_grad for parameter in model.parameters()] == trains
    trainer(tmp_path).fit(model, loader())
    assert not torch.equal(model.state_dict()["net.0.weight"], merged["net.0.weight"])


@pytest.mark.parametrize("new", [True, False], ids=["parametrization", "old style"])
def test_a_frozen_spectral_norm_keeps_its_statistics(new: bool) -> None:
    norm: Any = nn.utils.parametrizations.spectral_norm if new else nn.utils.spectral_norm
    model = nn.Sequential(norm(nn.Linear(8, 16)), nn.LeakyReLU(), nn.Linear(16, 1))
    inject(model, OFTConfig(oft_block_size=4, target_modules=["2"]))
    buffers = {name: value.clone() for name, value in model.named_buffers()}
    assert buffers
    model.train()
    for _ in range(3):
        model(torch.randn(4, 8)).sum().backward()
    assert all(torch.equal(value, buffers[name]) for name, value in model.named_buffers())
    unload(model)
    model.train()
    model(torch.randn(4, 8))
    assert not all(torch.equal(value, buffers[name]) for name, value in model.named_buffers())


def test_a_spectral_norm_that_an_adapter_trains_goes_on(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.utils.spectral_norm(nn.LSTM(8, 8), name="weight_hh_l0"))
    inject(model, OFTConfig(oft_block_size=4, target_modules=["0"], modules_to_save=["1"]))
    before = model[1].weight_hh_l0_u.clone()  # type: ignore[operator]
    model.train()
    model(torch.randn(4, 8))
    assert not torch.equal(model[1].weight_hh_l0_u, before)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({}, r"net\.0, net\.0\.oft_R\.default, net\.3, net\.3\.oft_R\.default"),
        ({"parameters_to_prune": lambda net: [(net[3], "weight"), (net[6], "weight")]}, r"\(net\.3\)"),
        ({"parameters_to_prune": lambda net: [(net[0], "bias")]}, r"\(net\.0\)"),
    ],
    ids=["all it finds", "one that turns", "a bias"],
)
@pytest.mark.parametrize("first", [True, False])
def test_pruning_of_what_turns_is_refused_and_both_remedies_prune(
    tmp_path: Path, options: dict[str, Any], named: str, first: bool
) -> None:
    model = Small()
    net: Any = model.net
    listed = {name: value(net) for name, value in options.items()}
    callbacks: list[Any] = [oft(), ModelPruning("l1_unstructured", amount=0.5, **listed)]
    if not first and not listed:
        named = r"\(net\.0, net\.3\)"  # before the injection it has found no rotations
    with pytest.raises(
        ValueError, match=rf"ModelPruning would prune .*{named}.*other parameters_to_prune, or prune the"
    ):
        trainer(tmp_path, *callbacks[:: 1 if first else -1]).fit(model, loader())
    assert not oft_layers(model)
    head = ModelPruning("l1_unstructured", amount=0.5, parameters_to_prune=[(net[6], "weight")])
    trainer(tmp_path, oft(), head).fit(model, loader())
    assert float((net[6].weight == 0).float().mean()) == 0.5
    everything = ModelPruning("l1_unstructured", amount=0.5, parameters_to_prune=[(net[0], "weight")])
    trainer(tmp_path, everything).fit(model, loader())
    assert float((net[0].weight == 0).float().mean()) == 0.5


@pytest.mark.parametrize("kind", ["unstructured", "2 of 4", "columns"])
def test_a_merge_that_fills_the_zeros_of_pruned_weights_is_said_and_the_remedy_keeps_them(
    tmp_path: Path, kind: str
) -> None:
    model = Small()
    net: Any = model.net
    if kind == "unstructured":
        prune.l1_unstructured(net[0], "weight", 0.5)
        prune.remove(net[0], "weight")
    else:
        net[0].weight.data[:, :: 2 if kind == "2 of 4" else 4] = 0
    with pytest.warns(
        UserWarning, match=r"the weights of net\.0 are sparse, and the merge will fill their zeros: set mer"
    ):
        trainer(tmp_path, oft()).fit(model, loader())
    unload(model)
    assert float((net[0].weight == 0).float().mean()) < 0.2  # what a row has in one block alone stays zero
    whole_rows = Small()
    whole_rows.net[0].weight.data[::2] = 0  # type: ignore[index, operator, union-attr]
    trainer(tmp_path, oft()).fit(whole_rows, loader())
    assert float((whole_rows.net[0].weight == 0).float().mean()) == 0.5  # type: ignore[index, operator, union-attr]
    model = Small()
    model.net[0].weight.data[:, ::2] = 0  # type: ignore[index, operator, union-attr]
    trainer(tmp_path, oft(merge_on_fit_end=False)).fit(model, loader())
    assert float((model.net[0].weight == 0).float().mean()) == 0.5  # type: ignore[index, operator, union-attr]
    with pytest.warns(UserWarning, match=r"^merge: the weights of net\.0 were sparse, and their zeros are filled.*unm"):
        merge(model)
    unmerge(model)
    assert float((model.net[0].weight == 0).float().mean()) == 0.5  # type: ignore[index, operator, union-attr]


class DeepSpeedStrategy:
    """Lightning's own imports deepspeed, which is not here; we ask for the name."""

    def __init__(self, stage: int) -> None:
        self.zero_stage_3 = stage == 3
        self.launcher = self.checkpoint_io = None


class _MultiProcessingLauncher:
    """What ddp_spawn and ddp_notebook have."""


def running(strategy: Any) -> Any:
    return SimpleNamespace(strategy=strategy, callbacks=[], precision_plugin=None)


def test_deepspeed_stage_3_is_refused_and_nothing_injected() -> None:
    model = Small()
    names = list(model.state_dict())
    with pytest.raises(ValueError, match="DeepSpeed stage 3"):
        OFTFinetuning().setup(running(DeepSpeedStrategy(3)), model, "fit")
    assert list(model.state_dict()) == names


@pytest.mark.parametrize("stage", [1, 2])
def test_deepspeed_stages_1_and_2_are_not_refused(stage: int) -> None:
    strategy_adapter(running(DeepSpeedStrategy(stage)))


@pytest.mark.parametrize(
    ("launcher", "merge", "refused"),
    [
        (_MultiProcessingLauncher(), False, True),
        (_MultiProcessingLauncher(), True, False),
        (object(), False, False),
        (None, False, False),
    ],
)
def test_spawned_fits_must_merge(launcher: Any, merge: bool, refused: bool) -> None:
    callback = OFTFinetuning(merge_on_fit_end=merge)
    run = running(SimpleNamespace(launcher=launcher))
    if not refused:
        check_callbacks(run, callback, "fit")
        return
    with pytest.raises(ValueError, match="merge_on_fit_end"):
        check_callbacks(run, callback, "fit")


class Freezing(pl.Callback):
    """Freezes the first layers at some moment; the head trains on."""

    def __init__(self, moment: str, layers: int) -> None:
        self.layers = layers
        setattr(self, moment, self._freeze)

    def _freeze(self, trainer: Any, pl_module: Any) -> None:
        pl_module.net[: self.layers].requires_grad_(False)


@pytest.mark.parametrize(
    ("moment", "first"), [("on_fit_start", True), ("on_fit_start", False), ("on_train_start", False)]
)
def test_rotations_that_somebody_freezes_are_named(tmp_path: Path, moment: str, first: bool) -> None:
    callbacks = [Freezing(moment, 4), oft()] if first else [oft(), Freezing(moment, 4)]
    with pytest.warns(UserWarning, match=r"^the rotations of net\.0, net\.3 do not train: something froze them"):
        trainer(tmp_path, *callbacks).fit(Small(), loader())


@pytest.mark.parametrize("moment", ["on_fit_start", "on_train_start"])
def test_some_rotations_may_rest(tmp_path: Path, moment: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        trainer(tmp_path, Freezing(moment, 1), oft()).fit(Small(), loader())
    assert [one for one in caplog.messages if one.startswith("OFT: the rotations of net.0 do not train")]


def test_a_head_replaced_after_the_injection_is_named(tmp_path: Path) -> None:
    class Model(Small):
        def configure_optimizers(self) -> Any:
            self.net[6] = nn.Linear(16, 2)  # type: ignore[index, operator]
            return super().configure_optimizers()

    with pytest.raises(RuntimeError, match=r"net\.6\.weight, net\.6\.bias: modules_to_save .* replaced since"):
        trainer(tmp_path, oft()).fit(Model(), loader())


def _normalise(layer: nn.Module) -> None:
    parametrizations.weight_norm(layer)


def _binarise(layer: nn.Module) -> None:
    layer.forward = lambda x: nn.functional.linear(x, layer.weight.sign(), layer.bias)  # type: ignore[arg-type, assignment, operator]


@pytest.mark.parametrize(
    ("change", "reason"), [(_normalise, "its weight is parametrized"), (_binarise, "the forward that was put on")]
)
def test_what_takes_no_merge_any_more_is_said_before_the_first_batch(
    tmp_path: Path, change: Callable[[nn.Module], None], reason: str
) -> None:
    class Changes(pl.Callback):
        def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
            change(pl_module.net[3])

        def on_train_batch_start(self, *_: Any) -> None:
            raise AssertionError("too late")

    with pytest.raises(ValueError, match=rf"cannot merge net\.3: {reason}"):
        trainer(tmp_path, Changes(), oft()).fit(Small(), loader())
