"""What a fit leaves on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from safetensors.torch import load_file
from small import Small, difference, loader, oft, state, trainer

from lightning_oft import load_adapter, load_from_checkpoint, merge
from lightning_oft.formats.checkpoint_file import CheckpointError

pytestmark = pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`")


def fit(root: Path, *callbacks: Any, model: Small | None = None) -> tuple[Any, Small]:
    torch.manual_seed(0)
    model = model or Small()
    run = trainer(root, *callbacks, ModelCheckpoint(root, monitor="val", save_top_k=2), max_epochs=4)
    run.fit(model, loader(), loader(False))
    return run, model


def written(export: Path) -> dict[str, torch.Tensor]:
    return load_file(export / "merged" / "model.safetensors")


@pytest.mark.parametrize("merges", [True, False])
def test_the_last_state_is_written_merged_and_apart(tmp_path: Path, merges: bool) -> None:
    _, model = fit(tmp_path, oft(export_dir=str(tmp_path / "export"), merge_on_fit_end=merges))
    if not merges:
        merge(model)
    assert difference(written(tmp_path / "export"), state(model)) == 0.0
    fresh = Small()
    load_adapter(fresh, tmp_path / "export" / "adapter")
    merge(fresh)
    assert difference(state(fresh), state(model)) == 0.0


@pytest.mark.parametrize("merges", [True, False])
def test_from_best_is_the_best_and_the_model_keeps_the_last(tmp_path: Path, merges: bool) -> None:
    options: dict[str, Any] = {"export_dir": str(tmp_path / "export"), "merge_on_fit_end": merges}
    _, straight = fit(tmp_path / "straight", oft(merge_on_fit_end=merges))
    run, model = fit(tmp_path, oft(export_from="best", **options))
    assert difference(state(model), state(straight)) == 0.0
    best = load_from_checkpoint(Small, run.checkpoint_callback.best_model_path)
    merge(best)
    assert difference(written(tmp_path / "export"), state(best)) == 0.0


def test_two_callbacks_export_the_best_of_two_parts(tmp_path: Path) -> None:
    parts = {"0": "first", "3": "second"}
    callbacks = [
        oft(module=f"net.{layer}", adapter_name=name, target_modules="all-linear", modules_to_save=None,
            export_dir=str(tmp_path / name), export_from="best") for layer, name in parts.items()
    ]  # fmt: skip
    run, _ = fit(tmp_path, *callbacks)
    best = load_from_checkpoint(Small, run.checkpoint_callback.best_model_path)
    merge(best)
    for layer, name in parts.items():
        assert torch.equal(written(tmp_path / name)["weight"], state(best)[f"net.{layer}.weight"])


def test_a_best_of_another_model_is_refused_and_the_model_keeps_the_last(tmp_path: Path) -> None:
    class Overwritten(ModelCheckpoint):
        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            torch.save({"state_dict": {}}, self.best_model_path)

    torch.manual_seed(0)
    model = Small()
    callback = oft(export_dir=str(tmp_path / "export"), export_from="best")
    with pytest.raises(CheckpointError, match="nothing was exported"):
        trainer(tmp_path, callback, Overwritten(tmp_path, monitor="val")).fit(model, loader(), loader(False))
    assert not list((tmp_path / "export").iterdir())
    assert any(bool(p.any()) for name, p in model.named_parameters() if "oft_R" in name)


def test_without_a_best_the_last_is_exported_and_a_warning_says_so(tmp_path: Path) -> None:
    model = Small()
    callback = oft(export_dir=str(tmp_path / "export"), export_from="best")
    with pytest.warns(UserWarning, match="the last state is exported"):
        trainer(tmp_path, callback).fit(model, loader())
    assert difference(written(tmp_path / "export"), state(model)) == 0.0


class Processor:
    """What stands beside a model."""

    def __init__(self, name: str) -> None:
        self.name = name

    def save_pretrained(self, directory: Path) -> None:
        (Path(directory) / self.name).touch()


def test_companions_are_those_declared_else_those_of_the_usual_names(tmp_path: Path) -> None:
    named, declared = Small(), Small()
    named.tokenizer, named.processor = Processor("tokenizer"), "no processor"  # type: ignore[assignment]
    declared.companions = lambda: [Processor("mine")]  # type: ignore[assignment]
    declared.tokenizer = Processor("tokenizer")  # type: ignore[assignment]
    for model, expected in ((named, "tokenizer"), (declared, "mine")):
        trainer(tmp_path, oft(export_dir=str(tmp_path / expected))).fit(model, loader())
        assert {path.name for path in (tmp_path / expected / "merged").iterdir()} == {"model.safetensors", expected}


def test_what_another_callback_unfroze_is_exported_from_the_best_too(tmp_path: Path) -> None:
    class Unfreeze(pl.Callback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            pl_module.net[3].bias.requires_grad_(True)

    run, _ = fit(tmp_path, oft(export_dir=str(tmp_path / "export"), export_from="best"), Unfreeze())
    best = torch.load(run.checkpoint_callback.best_model_path, weights_only=True)["state_dict"]
    assert torch.equal(written(tmp_path / "export")["net.3.bias"], best["net.3.bias"])
