"""`side="output"`: W' = blockdiag(R)^T . W, the bias stays; identity, merge, way back, files, runs, refusals."""

from __future__ import annotations

import copy
import functools
import pickle
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from layer_cases import KINDS, Case, config, randomize, relative
from lightning.pytorch.callbacks import ModelCheckpoint
from quantized import quantized_linear
from small import Small, inputs, loader, oft, trainer
from torch import Tensor, nn

from lightning_oft import (
    OFTConfig,
    disable_adapters,
    inject,
    load_adapter,
    load_from_checkpoint,
    merge,
    oft_layers,
    project,
    save_adapter,
    set_adapter,
    unload,
    unmerge,
)
from lightning_oft.cli.info import geometry
from lightning_oft.formats import AdapterFileError, read_adapter
from lightning_oft.layers import OwnForward, state_of
from lightning_oft.model import take

NAMES = [name for name in KINDS if name.startswith(("linear", "embedding", "conv")) and "transpose" not in name]
cases = pytest.mark.parametrize("case", [KINDS[name] for name in NAMES], ids=NAMES)
pytestmark = [
    pytest.mark.filterwarnings("ignore:block sizes adjusted"),
    pytest.mark.filterwarnings("ignore:adapter 'second' is not active"),
]
turned = functools.partial(config, side="output", oft_block_size=3)


def _rotation(model: nn.Module, layer: str = "layer", name: str = "default") -> Tensor:
    """blockdiag(R)."""
    r_nbb = oft_layers(model)[layer].oft_R[name].matrix().detach()  # type: ignore[index, operator, union-attr]
    return torch.block_diag(*r_nbb)


@cases
def test_two_adapters_start_as_the_identity_merge_to_what_they_compute_and_leave_no_trace(case: Case) -> None:
    torch.manual_seed(0)
    model, inputs = case.build().eval(), case.inputs()
    base_output, base = model(*inputs), copy.deepcopy(model.state_dict())
    inject(model, turned())
    inject(model, turned(oft_block_size=2, block_share=True), "second")
    assert torch.equal(model(*inputs), base_output)
    for seed, name in enumerate(("default", "second")):
        randomize(model, 0.2, name, seed)
    set_adapter(model, ["second", "default"])
    model.double()
    inputs = tuple(x.double() if x.is_floating_point() else x for x in inputs)
    expected = model(*inputs)
    assert relative(expected, base_output) > 0.1
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(*inputs), expected)
    for keep_base, error in (("always", 0.0), ("never", 1e-12)):
        merge(model, keep_base=keep_base)  # type: ignore[arg-type]
        assert relative(model(*inputs), expected) < 1e-12
        unmerge(model)
        for name, tensor in base.items():
            assert float((model.state_dict()[name] - tensor).abs().max()) <= error
    with disable_adapters(model):
        assert relative(model(*inputs), base_output) < 1e-6
    unload(model)
    assert list(model.state_dict()) == list(base)


@cases
def test_the_rows_of_the_weight_are_turned_and_the_bias_is_not(case: Case) -> None:
    model = case.build()
    layer: Any = model.layer
    is_stored_by_rows = "Conv1D" not in type(layer).__name__ and not isinstance(layer, nn.Embedding)
    weight, bias = layer.weight.detach().clone(), copy.deepcopy(getattr(layer, "bias", None))
    inject(model, turned())
    randomize(model, 0.2)
    r = _rotation(model)
    merge(model)
    wanted = r.mT @ weight.flatten(1) if is_stored_by_rows else weight @ r
    torch.testing.assert_close(layer.weight.detach().flatten(1), wanted)
    assert bias is None or torch.equal(layer.bias, bias)


class Masked(nn.Linear):
    """A forward of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight * (self.weight > 0), self.bias)


class Instance(nn.Linear):
    """A forward on the instance, which computes what that of the class does."""

    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.forward = lambda x: nn.functional.linear(x, self.weight, self.bias)  # type: ignore[method-assign]


@pytest.mark.parametrize(("kind", "is_own"), [(Masked, True), (Instance, False)])
def test_a_forward_of_its_own_runs_on_what_is_merged(kind: type[nn.Linear], is_own: bool) -> None:
    model, x = nn.Sequential(kind(8, 12)), torch.randn(3, 8)
    inject(model, OFTConfig(oft_block_size=4, side="output"))
    randomize(model)
    expected = model(x)
    assert isinstance(state_of(model[0]).layer_type, OwnForward) is is_own  # type: ignore[union-attr]
    merge(model)
    assert relative(model(x), expected) < 1e-6


def test_a_bias_is_left_alone_by_dropped_blocks_and_by_autocast() -> None:
    model, zero = nn.Sequential(nn.Linear(8, 12)), torch.zeros(1, 8)
    inject(model, OFTConfig(oft_block_size=4, side="output", module_dropout=0.5, bias="all"))
    randomize(model, 0.5)
    model[0].bias.data.normal_()
    torch.testing.assert_close(model.train()(zero)[0], model[0].bias)
    with torch.autocast("cpu", torch.bfloat16):
        output = model(zero)[0]
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output.float(), model[0].bias, rtol=2e-2, atol=2e-2)
    model(torch.randn(4, 8)).square().sum().backward()
    assert all(bool(p.grad.any()) for p in model.parameters() if p.requires_grad)  # type: ignore[union-attr]


def test_constrained_rotations_are_held_within_their_angle() -> None:
    model = nn.Sequential(nn.Linear(8, 12))
    inject(model, OFTConfig(oft_block_size=4, side="output", max_angle=10))
    randomize(model, 1.0)
    project(model)
    assert 5 < geometry(model[0].oft_R["default"].weight.detach(), OFTConfig())[1] <= 10.01  # type: ignore[index, union-attr]


@pytest.mark.parametrize("kind", ["ao-int8", "nf4"])
def test_a_quantized_layer_turns_its_output(kind: str) -> None:
    layer, _ = quantized_linear(kind)
    model, x = nn.Sequential(layer), torch.randn(3, 64)
    base = model(x)
    inject(model, OFTConfig(oft_block_size=16, side="output"))
    assert torch.equal(model(x), base)
    randomize(model)
    expected = (base - layer.bias) @ _rotation(model, "0") + layer.bias  # type: ignore[operator]
    assert relative(model(x), expected) < 1e-5
    merge(model, requantize=True)
    assert relative(model(x), expected) < 0.2
    unmerge(model)
    assert relative(model(x), expected) < 1e-5


@pytest.mark.filterwarnings(r"ignore:Unexpected keyword arguments \['lightning_oft'\]:UserWarning")
def test_files_keep_the_side_and_peft_refuses_them(tmp_path: Path) -> None:
    def net() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(12, 12), nn.ReLU(), nn.Conv1d(12, 8, 1), nn.Linear(12, 6))

    model, x = net(), torch.randn(2, 12, 12)
    inject(model, turned(target_modules=["0", "2", "3"]))
    randomize(model)
    with pytest.warns(UserWarning, match="PEFT cannot represent the rotations of 0, 2, 3.*cannot load this adapter"):
        save_adapter(model, tmp_path)
    again = net()
    assert load_adapter(again, tmp_path) == ["0", "2", "3"]
    assert torch.equal(again(x), model(x))
    assert take(again).config.side == read_adapter(tmp_path).config.side == "output"
    with pytest.raises(ValueError, match="target"):
        peft.PeftModel.from_pretrained(net(), tmp_path)
    other = nn.Sequential(nn.Linear(12, 9), nn.ReLU(), nn.Conv1d(12, 8, 1), nn.Linear(12, 6))
    with pytest.raises(AdapterFileError, match="0 has fan-out 9, the file's 4 blocks of 3 turn 12"):
        load_adapter(other, tmp_path)


def test_a_stopped_fit_goes_on_to_the_bit(tmp_path: Path) -> None:
    def fit(name: str, epochs: int, path: Path | None = None) -> Small:
        model, keeper = Small(), ModelCheckpoint(tmp_path / name, save_last=True, save_top_k=0)
        callback = oft(side="output", merge_on_fit_end=False)
        trainer(tmp_path, callback, keeper, max_epochs=epochs).fit(model, loader(False), loader(False), ckpt_path=path)
        return model.eval()

    torch.manual_seed(0)
    first = fit("first", 1)
    last = tmp_path / "first" / "last.ckpt"
    x, base = inputs()[0], Small().eval()
    assert relative(first(x), base(x)) > 1e-3
    assert torch.equal(load_from_checkpoint(Small, last).eval()(x), first(x))
    resumed = fit("resumed", 1, last)
    assert torch.equal(resumed(x), first(x))


def test_one_side_of_a_layer_turns_and_not_every_type_has_an_output() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Embedding(4, 8))
    inject(model, OFTConfig(oft_block_size=4, target_modules=["0", "1"]))
    with pytest.raises(ValueError, match="0: another adapter rotates its input, and a layer turns on one side"):
        inject(model, OFTConfig(oft_block_size=4, target_modules=["0", "1"], side="output"), "second")
    assert inject(model, OFTConfig(oft_block_size=4, target_modules=["1"], side="output"), "second") == ["1"]
    for name in ("attention", "experts", "conv_transpose1d"):
        with pytest.raises(ValueError, match=r"layer: side='output' is not for layers of type .*rotate the input"):
            inject(KINDS[name].build(), turned())
    mixed = nn.ModuleDict({"a": nn.MultiheadAttention(8, 2), "b": nn.Linear(8, 8)})
    assert inject(mixed, OFTConfig(oft_block_size=4, side="output")) == ["b"]
