"""What optimizers hold and a user does not expect is said when the fit starts, and every advice works."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.cli import LightningCLI, OptimizerCallable
from norm_net import net
from small import Small, loader, oft, state, trainer
from small import net as net_of
from torch import Tensor, nn

from lightning_oft import OFTConfig, OFTFinetuning, inject, oft_layers
from lightning_oft.callback.optimizers import frozen_parts, thawed_layers
from lightning_oft.model.traversal import walk
from lightning_oft.tasks.optimization import configure, parameter_groups

pytestmark = pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`")


class Gan(Small):
    """Two parts with an optimizer each, and a parameter of its own with a third."""

    unfreezes = ""

    def __init__(self) -> None:
        super().__init__(batch_norm=False)
        self.automatic_optimization = False
        self.critic = nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 1))
        self.scale = nn.Parameter(torch.ones(1))

    def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        made = self(batch[0])
        for loss, optimizer in zip(
            (-self.critic(made).mean(), self.critic(made.detach() + 1).square().mean(), self.scale.sum()),
            self.optimizers(),  # type: ignore[arg-type]
            strict=True,
        ):
            self.manual_backward(loss)
            optimizer.step()  # type: ignore[union-attr]
            optimizer.zero_grad()  # type: ignore[union-attr]

    def configure_optimizers(self) -> Any:
        if self.unfreezes:
            self.critic.requires_grad_(True)
            self.scale.requires_grad_(True)
        return [torch.optim.SGD(held, 0.1) for held in (self.net.parameters(), self.critic.parameters(), [self.scale])]


class Unfreezing(Gan):
    unfreezes = "critic and scale"


GENERATOR: dict[str, Any] = {"module": "net", "target_modules": ["0", "3"], "modules_to_save": None}
WHOLE: dict[str, Any] = {"modules_to_save": ["critic"]}


def test_an_optimizer_of_what_oft_froze_is_named_and_both_remedies_train_it(tmp_path: Path) -> None:
    said = r"optimizer 2 of 3 \(SGD\) holds nothing that trains, OFT has frozen critic\.0\.weight, critic\.0\.bias"
    with pytest.raises(
        RuntimeError, match=said + r".*: call requires_grad_\(True\) on what is to train in configure_o"
    ):
        trainer(tmp_path, oft(**GENERATOR)).fit(Gan(), loader())
    # modules_to_save trains the critic, and has no name for a parameter of the module itself.
    with pytest.raises(
        RuntimeError, match=r"optimizer 3 of 3 .* frozen scale: .* or name their modules in modules_to_s"
    ):
        trainer(tmp_path, oft(**WHOLE)).fit(Gan(), loader())
    for options in (GENERATOR, WHOLE):
        model = Unfreezing()
        before = state(model)
        trainer(tmp_path, oft(**options)).fit(model, loader())
        changed = {name for name, value in state(model).items() if not torch.equal(value, before[name])}
        assert {"critic.0.weight", "critic.2.bias", "scale", "net.0.weight"} <= changed


class WithCopy(Small):
    """Has a copy of its net that runs without gradient, and follows it by an average of parameters."""

    freezes = True

    def __init__(self) -> None:
        super().__init__(batch_norm=False, dropout=0.0)
        self.target = copy.deepcopy(self.net)

    def configure_optimizers(self) -> Any:
        if self.freezes:
            self.target.requires_grad_(False)
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], 0.1)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        with torch.no_grad():
            wanted = self.target(batch[0])
        return nn.functional.mse_loss(self(batch[0]), wanted + 1)

    def on_train_batch_end(self, *_: Any) -> None:
        with torch.no_grad():
            for mine, theirs in zip(self.target.parameters(), self.net.parameters(), strict=True):
                mine.lerp_(theirs, 0.5)


class Unfrozen(WithCopy):
    freezes = False


def test_an_average_within_the_module_follows_by_its_rotations(tmp_path: Path) -> None:
    options = {"target_modules": "all-linear", "modules_to_save": None}
    with pytest.raises(RuntimeError, match=r"target\.0, .* call requires_grad_\(False\) on it in configure_optimizers"):
        trainer(tmp_path, oft(**options)).fit(Unfrozen(), loader())
    model = WithCopy()
    trainer(tmp_path, oft(**options, merge_on_fit_end=False)).fit(model, loader())
    layers = oft_layers(model)
    mine, theirs = (layers[name].oft_R["default"].weight for name in ("target.0", "net.0"))  # type: ignore[index]
    assert float(theirs.detach().abs().max()) > 0
    assert 0 < float((mine - theirs).detach().abs().max()) < float(theirs.detach().abs().max())
    assert torch.equal(layers["target.0"].weight, layers["net.0"].weight)  # type: ignore[arg-type]


class FromCommandLine(Small):
    """Takes its optimizer as an argument, as LightningCLI's users are told to."""

    def __init__(self, optimizer: OptimizerCallable = torch.optim.SGD) -> None:
        super().__init__()
        self.optimizer = optimizer

    def build(self) -> None:
        self.net = net_of(0.0)

    def configure_optimizers(self) -> Any:
        return self.optimizer(self.parameters())

    def train_dataloader(self) -> Any:
        return loader()


class Bare(Small):
    configure_optimizers = pl.LightningModule.configure_optimizers

    def train_dataloader(self) -> Any:
        return loader()


def _stock_cli(root: Path, model: type[Small], *arguments: str) -> Small:
    options = {"max_epochs": 1, "logger": False, "enable_progress_bar": False, "enable_checkpointing": False,
               "accelerator": "cpu", "callbacks": [oft(merge_on_fit_end=False)], "default_root_dir": str(root),
               "enable_model_summary": False}  # fmt: skip
    cli = LightningCLI(
        model, save_config_callback=None, trainer_defaults=options, args=["fit", *arguments],
    )  # fmt: skip
    return cli.model  # type: ignore[return-value]


@pytest.mark.filterwarnings("ignore:LightningCLI's args parameter is intended", "ignore:\n    ")
def test_the_optimizer_block_of_the_stock_command_line_is_named_and_the_remedy_trains(tmp_path: Path) -> None:
    block = ["--optimizer", "torch.optim.SGD", "--optimizer.lr", "0.1"]
    with pytest.raises(RuntimeError, match=r"net\.0, net\.3 are in no optimizer .* OptimizerCallable"):
        _stock_cli(tmp_path, Bare, *block)
    as_argument = ["--model.optimizer", "torch.optim.SGD", "--model.optimizer.lr", "0.1"]
    model = _stock_cli(tmp_path, FromCommandLine, *as_argument)
    assert all(bool(layer.oft_R["default"].weight.any()) for layer in oft_layers(model).values())  # type: ignore[index]


def _said(caplog: pytest.LogCaptureFixture, root: Path, model: pl.LightningModule, **options: Any) -> list[str]:
    caplog.clear()
    with caplog.at_level("INFO"):
        trainer(root, oft(**options)).fit(model, loader())
    return [text for record in caplog.records if (text := record.getMessage()).startswith("OFT: ")]


class Undecayed(Small):
    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(parameter_groups(self), self.lr)


class Decayed(Small):
    """Decays what an optimizer's owner has in mind, all of it but biases."""

    def configure_optimizers(self) -> Any:
        named = dict(self.named_parameters())
        held = {kind: [p for name, p in named.items() if ("bias" in name) is kind] for kind in (True, False)}
        groups = [{"params": held[True], "weight_decay": 0.0}, {"params": held[False]}]
        return torch.optim.SGD(groups, self.lr, weight_decay=0.1)


@pytest.mark.parametrize(
    ("model", "decay"), [(Small, "0.01 of AdamW"), (Decayed, "0.1 of SGD"), (Undecayed, ""), (Gan, "")]
)
def test_decay_of_rotations_is_said_once_and_the_groups_have_none(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, model: type[Small], decay: str
) -> None:
    Gan.unfreezes = "all"
    lines = [line for line in _said(caplog, tmp_path, model(), merge_on_fit_end=False) if "decay" in line]
    Gan.unfreezes = ""
    assert len(lines) == bool(decay)
    assert not decay or f"weight_decay={decay} pulls the rotations of net.0, net.3 back to the identity" in lines[0]
    assert all("lightning_oft.tasks.optimization.parameter_groups(self)" in line for line in lines)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.norm = nn.Linear(8, 8), nn.Linear(8, 8), nn.LayerNorm(8)


class Reader(nn.Module):
    """An embedding, two blocks and a head for questions."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.qa_outputs = nn.Embedding(9, 8), nn.Linear(8, 2)
        self.layers, self.start = nn.ModuleList([Block(), Block()]), nn.Parameter(torch.zeros(8))


def _adapted(model: nn.Module, **options: Any) -> nn.Module:
    inject(model, OFTConfig(oft_block_size=4, **options))
    return model


def _partly_frozen(*names: str) -> nn.Module:
    model = Reader()
    for name in names:
        model.get_submodule(name).requires_grad_(False)
    return model


@pytest.mark.parametrize(
    ("model", "options", "parts"),
    [
        # rows added to an embedding, a head that no task type names, a bare parameter: the outermost come first
        (Reader, {"target_modules": ["q"]}, ["qa_outputs", "start", "words", "layers.*.k", "layers.*.norm"]),
        (Reader, {"target_modules": ["q", "k"], "task_type": "QUESTION_ANS"}, ["start", "words", "layers.*.norm"]),
        (Reader, {"modules_to_save": ["words", "norm"]}, ["start"]),
        (lambda: _partly_frozen("words", "layers.1"), {"target_modules": ["q"], "modules_to_save": ["qa_outputs"]},
            ["start", "layers.0.k", "layers.0.norm"]),
        (net, {"target_modules": ["fc"]}, ["conv", "head", "norm"]),
        (net, {"bias": "all", "target_modules": ["fc"]}, ["conv.weight", "norm.weight", "head.*.weight"]),
    ],
)  # fmt: skip
def test_what_is_frozen_whole_is_named(
    model: Callable[[], nn.Module], options: dict[str, Any], parts: list[str]
) -> None:
    assert sorted(frozen_parts(walk(_adapted(model(), **options)))) == sorted(parts)


def test_what_is_frozen_is_said_and_modules_to_save_trains_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    lines = _said(caplog, tmp_path, Undecayed(), modules_to_save=None)
    assert lines == ["OFT: frozen beside the rotations: net.4, net.6; modules_to_save trains what it names"]
    assert _said(caplog, tmp_path, Undecayed(), modules_to_save=["net.4", "net.6"]) == []


def test_layers_that_somebody_froze_and_oft_turns_are_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert thawed_layers(walk(_adapted(_partly_frozen("layers.1", "qa_outputs")))) == [
        "qa_outputs",
        "layers.1.q",
        "layers.1.k",
    ]
    assert (
        thawed_layers(walk(_adapted(_partly_frozen("")))) == []
    )  # a base that is frozen as a whole is what one adapts
    model = Undecayed()
    model.net[3].requires_grad_(False)  # type: ignore[index, operator, union-attr]
    (line,) = (line for line in _said(caplog, tmp_path, model) if "did not train before" in line)
    assert line.startswith("OFT: net.3 did not train before")
    model = Undecayed()
    model.net[3].requires_grad_(False)  # type: ignore[index, operator, union-attr]
    assert not any("did not train" in line for line in _said(caplog, tmp_path, model, exclude_modules=["net.3"]))


def test_a_tied_layer_and_parts_of_attention_are_neither_thawed_nor_frozen() -> None:
    model = nn.ModuleDict(
        {"words": nn.Embedding(8, 8), "out": nn.Linear(8, 8), "attention": nn.MultiheadAttention(8, 2)}
    )
    model["out"].weight = model["words"].weight
    inject(model, OFTConfig(oft_block_size=4))
    assert thawed_layers(walk(model)) == []
    assert frozen_parts(walk(model)) == ["words"]


def test_a_task_type_without_its_head_says_so_and_the_remedy_trains_it() -> None:
    options: dict[str, Any] = {"oft_block_size": 4, "target_modules": ["q", "k"]}
    for task, names in (("SEQ_CLS", "classifier or score"), ("TOKEN_CLS", "classifier or score")):
        with pytest.warns(
            UserWarning, match=f"task_type='{task}': the model has no {names} to train whole: name its head"
        ):
            inject(Reader(), OFTConfig(task_type=task, **options))
    model = Reader()
    inject(model, OFTConfig(task_type="SEQ_CLS", modules_to_save=["qa_outputs"], **options))
    assert model.qa_outputs.weight.requires_grad
    model = Reader()
    del model.qa_outputs
    with pytest.warns(UserWarning, match="task_type='QUESTION_ANS': the model has no qa_outputs"):
        inject(model, OFTConfig(task_type="QUESTION_ANS", **options))


@pytest.mark.parametrize("optimizer", [torch.optim.LBFGS, torch.optim.SGD, lambda given: torch.optim.AdamW(given, 0.1)])
def test_an_optimizer_that_takes_no_groups_gets_what_trains(optimizer: Any) -> None:
    model = Small()
    inject(model, OFTConfig(oft_block_size=4, target_modules=["net.0"], modules_to_save=["net.6"]))
    made: Any = configure(model, optimizer)
    held = [id(parameter) for group in made.param_groups for parameter in group["params"]]
    assert sorted(held) == sorted(id(parameter) for parameter in model.parameters() if parameter.requires_grad)
    with pytest.raises(ValueError, match="optimizer: Invalid learning rate"):
        configure(model, lambda given: torch.optim.SGD(given, -1.0))


def test_two_callbacks_that_are_one_are_refused(tmp_path: Path) -> None:
    for twins in ([oft(), oft()], [OFTFinetuning(module="net"), OFTFinetuning(module="net", oft_block_size=4)]):
        with pytest.raises(
            ValueError, match=r"two OFTFinetuning callbacks have module=.*: leave one out, or give each"
        ):
            trainer(tmp_path, *twins).validate(Small(), loader(False), verbose=False)
    other = oft(adapter_name="other", modules_to_save=None, target_modules=["net.6"])
    trainer(tmp_path, oft(modules_to_save=None), other, oft(enabled=False)).fit(Small(), loader())
