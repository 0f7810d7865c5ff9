"""Whatever a public call does to a model, one line of the user's own undoes it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from norm_net import Net, batch, flags, net
from torch import nn
from torch.utils.data import DataLoader

import lightning_oft
from lightning_oft import (
    OFTConfig,
    OFTFinetuning,
    delete_adapter,
    disable_adapters,
    inject,
    load_adapter,
    merge,
    merged,
    oft_layers,
    project,
    register_layer_type,
    save_adapter,
    set_adapter,
    unload,
    unmerge,
)
from lightning_oft.layers.state import record_of
from lightning_oft.model import put, take
from lightning_oft.model.first_forward import unwatch

pytestmark = pytest.mark.filterwarnings(
    "ignore:block sizes adjusted", "ignore:adapter .* is not active", "ignore:PEFT cannot"
)
CONFIG = OFTConfig(oft_block_size=4, target_modules=["fc", "conv"], modules_to_save=["head"], series_guard="warn")
OTHER = OFTConfig(oft_block_size=2, target_modules=["fc"])


class Unknown(nn.Module):
    """Computes like a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.in_features, self.weight = 8, nn.Parameter(torch.zeros(4, 8))


def looks(model: nn.Module) -> dict[str, Any]:
    """All of a model that a call could change; not the hook that watches the next forward, which takes it away."""
    unwatch(model)
    return {
        "tensors": {name: value.clone() for name, value in model.state_dict().items()},
        "trains": flags(model),
        "classes": [type(module) for module in model.modules()],
        "modes": [module.training for module in model.modules()],
        "records": [name for name, module in model.named_modules() if record_of(module) is not None],
        "hooks": [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules()],
        "active": {name: list(record_of(layer).layer.active) for name, layer in oft_layers(model).items()},  # type: ignore[union-attr]
    }


def is_same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    mine, theirs = one.pop("tensors"), other.pop("tensors")
    return one == other and all(torch.equal(mine[name], theirs[name]) for name in mine.keys() | theirs.keys())


def _adapted() -> Net:
    model = net()
    inject(model, CONFIG)
    for layer in oft_layers(model).values():
        nn.init.normal_(layer.oft_R["default"].weight, std=0.02)  # type: ignore[index, arg-type]
    return model


def _two() -> Net:
    model = _adapted()
    inject(model, OTHER, "other")
    return model


def _merged() -> Net:
    model = _adapted()
    merge(model)
    return model


def _limited() -> Net:
    model = net()
    inject(model, OFTConfig(oft_block_size=4, target_modules=["fc"], max_angle=1.0))
    nn.init.normal_(model.fc.oft_R["default"].weight)  # type: ignore[index, operator]
    return model


Call = Callable[[Any, Path], Any]
UNDONE: dict[str, tuple[Callable[[], Net], Call, Call]] = {
    "inject": (net, lambda m, p: inject(m, CONFIG), lambda m, p: unload(m)),
    "inject, another": (_adapted, lambda m, p: inject(m, OTHER, "other"), lambda m, p: delete_adapter(m, "other")),
    "load_adapter": (net, lambda m, p: load_adapter(m, p), lambda m, p: unload(m)),
    "merge": (_adapted, lambda m, p: merge(m), lambda m, p: unmerge(m)),
    "unmerge": (_merged, lambda m, p: unmerge(m), lambda m, p: merge(m)),
    "set_adapter": (_two, lambda m, p: set_adapter(m, ["other"]), lambda m, p: set_adapter(m, ["default"])),
    "unload": (_adapted, lambda m, p: unload(m), lambda m, p: load_adapter(m, p)),
    "delete_adapter": (_adapted, lambda m, p: delete_adapter(m, "default"), lambda m, p: load_adapter(m, p)),
    "project": (_limited, lambda m, p: project(m), lambda m, p: put(m, p)),
    "merged": (_adapted, lambda m, p: _entered(merged(m)), lambda m, p: None),
    "disable_adapters": (_two, lambda m, p: _entered(disable_adapters(m)), lambda m, p: None),
    "OFTFinetuning": (net, lambda m, p: _fitted(m), lambda m, p: unload(m, to_base=True)),
    "OFTFinetuning, not merged": (net, lambda m, p: _fitted(m, merge_on_fit_end=False), lambda m, p: unload(m)),
}
HARMLESS = {"AdapterState", "OFTConfig", "__version__", "load_from_checkpoint", "oft_layers", "push_adapter", "save_adapter",
            "save_merged"}  # fmt: skip
"""What changes no model that was there."""


def _entered(context: Any) -> None:
    with context:
        pass


class Task(pl.LightningModule):
    def __init__(self, model: Net) -> None:
        super().__init__()
        self.net = model

    def training_step(self, pictures: Any, batch_idx: int) -> Any:
        return self.net(pictures).square().sum()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.01)


def _fitted(model: Net, **options: Any) -> None:
    callback = OFTFinetuning(oft_block_size=4, target_modules=["net.fc"], modules_to_save=["head"], **options)
    run = pl.Trainer(max_epochs=1, accelerator="cpu", callbacks=[callback], logger=False, enable_checkpointing=False,
                     enable_progress_bar=False, enable_model_summary=False)  # fmt: skip
    run.fit(Task(model), DataLoader(batch(8), 4))  # type: ignore[arg-type]


def test_every_public_call_has_its_undoing() -> None:
    # OFTTrainerCallback trains what inject has put in, and inject has a row.
    named = {name.partition(",")[0] for name in UNDONE} | {"register_layer_type", "OFTTrainerCallback"}
    assert named | HARMLESS == set(lightning_oft.__all__)
    assert not named & HARMLESS


def test_a_registration_is_undone_by_its_handle() -> None:
    model = nn.Sequential(Unknown())
    handle = register_layer_type(Unknown, like=nn.Linear)
    assert inject(model, OFTConfig(oft_block_size=4)) == ["0"]
    unload(model)
    handle.remove()
    with pytest.raises(ValueError, match="no layer here could be adapted"):
        inject(model, OFTConfig(oft_block_size=4))


@pytest.mark.parametrize(("make", "call", "undo"), UNDONE.values(), ids=UNDONE)
def test_one_line_undoes_a_call(make: Callable[[], Net], call: Call, undo: Call, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = make()
    before = looks(model)
    place: Any = tmp_path
    if make is _limited:
        place = take(model)
    elif make is not net:
        save_adapter(model, tmp_path)
    else:
        torch.manual_seed(0)
        save_adapter(_adapted(), tmp_path)
    call(model, place)
    undo(model, place)
    assert is_same(looks(model), before)
