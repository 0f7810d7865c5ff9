"""Checkpoints that a user's own hooks have changed hold the adapter all the same, and who has no place for one is told."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from small import Small, difference, inputs, loader, oft, state, trainer
from torch import Tensor

from lightning_oft import OFTFinetuning, load_adapter, load_from_checkpoint, merge, oft_layers, save_adapter
from lightning_oft.formats import AdapterFileError, read_adapter
from lightning_oft.formats.checkpoint import NOTE
from lightning_oft.formats.checkpoint_file import CheckpointError, read

pytestmark = [
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks used to create"),
]


class CutPrefix(Small):
    """Its checkpoints are those of the net alone."""

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        return {name.removeprefix("net."): value for name, value in super().state_dict(*args, **kwargs).items()}

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        return super().load_state_dict({f"net.{name}": value for name, value in state_dict.items()}, strict, assign)


class TrainedAlone(Small):
    """Its checkpoints hold what trains, by true names."""

    strict_loading = False

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        kept = {name for name, parameter in self.named_parameters() if parameter.requires_grad}
        return {name: value for name, value in super().state_dict(*args, **kwargs).items() if name in kept}


class HeadAlone(Small):
    """Its checkpoints know nothing but the head."""

    strict_loading = False

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        found: dict[str, Any] = super().state_dict(*args, **kwargs)
        return {name: value for name, value in found.items() if name.startswith("net.6")}


class Renamed(Small):
    """Renames in the hooks that Lightning has for that."""

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["state_dict"] = {f"ours/{name}": value for name, value in checkpoint["state_dict"].items()}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        found = checkpoint["state_dict"].items()
        checkpoint["state_dict"] = {name.removeprefix("ours/"): value for name, value in found}


class Dropped(Small):
    """Takes what it does not know out of its checkpoints, with another callback."""

    strict_loading = False


class DropsRotations(pl.Callback):
    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        kept = {name: value for name, value in checkpoint["state_dict"].items() if "oft_R" not in name}
        checkpoint["state_dict"] = kept


def fit(root: Path, kind: type[Small], epochs: int, ckpt: Any = None, **options: Any) -> Small:
    torch.manual_seed(0)
    model = kind(dropout=0.0, batch_norm=False)
    more = [DropsRotations()] if kind is Dropped else []
    run = trainer(root, oft(**options), *more, ModelCheckpoint(root, save_last=True, save_top_k=0), max_epochs=epochs)
    run.fit(model, loader(False), ckpt_path=ckpt)
    return model


def parameters(model: Small) -> dict[str, Tensor]:
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


KINDS = [CutPrefix, TrainedAlone, HeadAlone, Renamed, Dropped]


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_holds_the_adapter_whatever_becomes_of_the_state_dict(tmp_path: Path, kind: type[Small]) -> None:
    straight = fit(tmp_path / "straight", kind, 2, magnitude="joint")
    half = fit(tmp_path, kind, 1, magnitude="joint")
    place = tmp_path / "last.ckpt"
    layers = read_adapter(place).layers
    assert all(bool(one.generators[""].any() and one.magnitudes[""].any()) for one in layers.values())
    assert set(layers) == {"net.0", "net.3"}
    loaded = load_from_checkpoint(kind, place)
    merge(loaded)
    assert difference(parameters(loaded), parameters(half)) == 0.0
    assert difference(parameters(fit(tmp_path, kind, 2, str(place), magnitude="joint")), parameters(straight)) == 0.0


def test_a_state_dict_without_some_names_is_still_the_adapters(tmp_path: Path) -> None:
    class WithoutBias(Small):
        strict_loading = False

        def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
            found: dict[str, Any] = super().state_dict(*args, **kwargs)
            return {name: value for name, value in found.items() if name != "net.0.bias"}

    fit(tmp_path, WithoutBias, 1)
    entry = read(tmp_path / "last.ckpt")["lightning_oft"]
    assert (entry["adapter_only"], entry["apart"]) == (True, {})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ({"net.0.oft_R.default.weight": torch.zeros(1, 6)}, "other sizes of net.0.oft_R.default.weight"),
        ({"net.9.weight": torch.zeros(1)}, "has net.9.weight, which the model lacks"),
        ({"net.6.bias": torch.zeros(9)}, "other sizes of net.6.bias"),
    ],
)
def test_what_stands_apart_and_does_not_fit_is_refused(tmp_path: Path, damage: dict[str, Tensor], message: str) -> None:
    fit(tmp_path, HeadAlone, 1)
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    checkpoint["lightning_oft"]["apart"] |= damage
    torch.save(checkpoint, tmp_path / "damaged.ckpt")
    with pytest.raises(CheckpointError, match=message):
        fit(tmp_path, HeadAlone, 2, str(tmp_path / "damaged.ckpt"))


# ---- a run without the callback -------------------------------------------------------------------------------------


def _resume(place: Path) -> Any:
    return trainer(place.parent, max_epochs=2).fit(Small(), loader(), ckpt_path=str(place))


def _disabled(place: Path) -> Any:
    return trainer(place.parent, oft(enabled=False), max_epochs=2).fit(Small(), loader(), ckpt_path=str(place))


def _scored(place: Path) -> Any:
    run = trainer(place.parent, OFTFinetuning(enabled=False))
    return run.validate(Small(), loader(False), ckpt_path=str(place), verbose=False)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (_resume, RuntimeError, "lightning_oft: rotations of an adapter: resume with OFTFinetuning in Trainer"),
        (lambda place: Small.load_from_checkpoint(place), RuntimeError, "lightning_oft.load_from_checkpoint"),
        (_disabled, CheckpointError, r"holds an adapter \(default\), .*set enabled=True"),
        (_scored, CheckpointError, r"holds an adapter \(default\), .*set enabled=True"),
    ],
    ids=["resume", "load_from_checkpoint", "disabled", "disabled, scored"],
)
@pytest.mark.filterwarnings("ignore:Be aware that when using")
def test_who_has_no_place_for_an_adapter_is_told_what_to_do(
    tmp_path: Path, call: Callable[[Path], Any], error: type[Exception], message: str
) -> None:
    trainer(tmp_path, oft(), ModelCheckpoint(tmp_path, save_last=True, save_top_k=0)).fit(Small(), loader())
    place = tmp_path / "last.ckpt"
    with pytest.raises(error, match=message):
        call(place)
    # Both remedies.
    trainer(tmp_path, oft(), max_epochs=2).fit(Small(), loader(), ckpt_path=str(place))
    assert oft_layers(load_from_checkpoint(Small, place))


def test_loading_without_being_strict_says_whose_rotations_are_left_out(tmp_path: Path) -> None:
    trainer(tmp_path, oft(), ModelCheckpoint(tmp_path, save_last=True, save_top_k=0)).fit(Small(), loader())
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        Small.load_from_checkpoint(tmp_path / "last.ckpt", strict=False)
    assert any(NOTE in str(one.message) for one in seen)
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["lightning_oft"]["note"] == NOTE


def test_switched_off_the_callback_leaves_a_module_as_it_was(tmp_path: Path) -> None:
    trainer(tmp_path, oft(), ModelCheckpoint(tmp_path, save_last=True, save_top_k=0)).fit(Small(), loader())
    trainer(tmp_path, ModelCheckpoint(tmp_path / "plain", save_last=True, save_top_k=0)).fit(Small(), loader())
    model = Small()
    trainer(tmp_path, oft(enabled=False), max_epochs=2).fit(
        model, loader(), ckpt_path=str(tmp_path / "plain/last.ckpt")
    )
    assert "on_load_checkpoint" not in model.__dict__
    with pytest.raises(CheckpointError):
        trainer(tmp_path, oft(enabled=False)).fit(model, loader(), ckpt_path=str(tmp_path / "last.ckpt"))
    assert "on_load_checkpoint" not in model.__dict__


# ---- a copy of a module ---------------------------------------------------------------------------------------------


def _through_torch(model: Small) -> Any:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model)), _through_torch])
def test_a_copied_module_writes_and_reads_its_checkpoints_as_an_adapters(tmp_path: Path, copied: Any) -> None:
    model = fit(tmp_path, Small, 1, merge_on_fit_end=False)
    twin = copied(model)
    torch.nn.init.constant_(model.net[0].oft_R["default"].weight, 7.0)  # type: ignore[index, union-attr, operator]
    trainer(tmp_path, ModelCheckpoint(tmp_path / "twin", save_last=True, save_top_k=0)).fit(twin, loader())
    assert read(tmp_path / "twin" / "last.ckpt")["lightning_oft"]["adapter_only"]
    loaded = load_from_checkpoint(Small, tmp_path / "twin" / "last.ckpt")
    assert torch.equal(loaded(inputs()[0]), twin.eval()(inputs()[0]))
    run = trainer(tmp_path)
    assert run.validate(twin, loader(False), ckpt_path=str(tmp_path / "twin" / "last.ckpt"), verbose=False)


# ---- an adapter for another base ------------------------------------------------------------------------------------


class OtherBase(Small):
    def build(self) -> None:
        super().build()
        self.net[3].weight.data.mul_(1.01)  # type: ignore[index, operator, union-attr]


@pytest.mark.parametrize("as_peft", [False, True])
def test_a_pretrained_adapter_of_another_base_is_refused_and_both_remedies_work(tmp_path: Path, as_peft: bool) -> None:
    adapter = save_adapter(fit(tmp_path, Small, 1, modules_to_save=None), tmp_path / "adapter")
    options: dict[str, Any] = {"pretrained_adapter": str(adapter)}
    if as_peft:  # PEFT's files do not say which weights they are of
        text = (adapter / "adapter_config.json").read_text()
        (adapter / "adapter_config.json").write_text(text.replace('"lightning_oft"', '"ignored"'))
        trainer(tmp_path, OFTFinetuning(**options)).fit(OtherBase(batch_norm=False), loader())
        return
    model = OtherBase(batch_norm=False)
    before = state(model)
    with pytest.raises(
        AdapterFileError, match=r"trained on another base, net\.3 differ; .*ignore_mismatched_base=True"
    ):
        trainer(tmp_path, OFTFinetuning(**options)).fit(model, loader())
    assert difference(state(model), before) == 0.0
    with pytest.raises(AdapterFileError, match="trained on another base"):
        load_adapter(model, adapter)
    for base, insists in ((OtherBase, True), (Small, False)):
        model = base(batch_norm=False)
        run = trainer(tmp_path, OFTFinetuning(**options, ignore_mismatched_base=insists), max_epochs=0)
        run.fit(model, loader())
        assert list(oft_layers(model)) == ["net.0", "net.3"]


GIVEN: dict[str, tuple[dict[str, Any], str]] = {
    "a block size": ({"oft_block_size": 8}, r"oft_block_size=8 \(the file has 4\): .* leave oft_block_size out"),
    "the default, by name": ({"oft_block_size": 32}, "oft_block_size=32 "),
    "targets": ({"target_modules": ["net.0"]}, r"target_modules=\['net.0'\]"),
    "a limit and a head": ({"max_angle": 5.0, "modules_to_save": ["net.6"]}, "leave max_angle and modules_to_save out"),
}


@pytest.mark.parametrize(("given", "message"), GIVEN.values(), ids=GIVEN)
def test_what_is_given_beside_a_pretrained_adapter_and_is_not_its_is_refused(
    tmp_path: Path, given: dict[str, Any], message: str
) -> None:
    adapter = save_adapter(fit(tmp_path, Small, 1, modules_to_save=None), tmp_path / "adapter")
    model = Small(batch_norm=False)
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, OFTFinetuning(pretrained_adapter=str(adapter), **given)).fit(model, loader())
    assert not oft_layers(model)
    same = {"oft_block_size": 4, "target_modules": ["net.3", "net.0"], "use_cayley_neumann": False}
    for options in ({}, same):  # the remedy, and what is in the file anyway
        trainer(tmp_path, OFTFinetuning(pretrained_adapter=str(adapter), **options)).fit(
            Small(batch_norm=False), loader()
        )
