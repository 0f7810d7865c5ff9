"""What a stranger adds from outside the package, in one file each: a module class, an arithmetic, a codec, a format."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_oft import (
    AdapterState,
    OFTConfig,
    disable_adapters,
    inject,
    load_adapter,
    merge,
    oft_layers,
    register_layer_type,
    save_adapter,
    unmerge,
)
from lightning_oft.cli import main
from lightning_oft.codecs import Codec, register_codec
from lightning_oft.formats import Format, register_format
from lightning_oft.layers import LayerType, RotatedWeight, applied_rotations, layer_type_of
from lightning_oft.model import LayerRotations, take


def _train_a_step(model: nn.Module, x: Tensor) -> Tensor:
    """The output after a step that moved every rotation and nothing else."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert trained
    assert all("oft_R" in name for name in trained)
    model(x).square().sum().backward()
    nn.utils.clip_grad_norm_(trained.values(), 1.0)
    torch.optim.SGD(trained.values(), lr=0.2).step()
    assert all(bool(p.detach().any()) for p in trained.values())
    output: Tensor = model(x).detach()
    return output


def _lives(model: nn.Module, x: Tensor, layers: list[str]) -> None:
    """Identity, a step, merge, and the way back by both ways."""
    base = model(x)
    assert inject(model, OFTConfig(oft_block_size=4)) == layers
    assert torch.equal(model(x), base)
    adapted = _train_a_step(model, x)
    assert not torch.allclose(adapted, base, atol=1e-3)
    for keep_base in ("always", "never"):
        merge(model, keep_base=keep_base)  # type: ignore[arg-type]
        torch.testing.assert_close(model(x), adapted, rtol=1e-4, atol=1e-5)
        assert not any("oft_R" in name for name in model.state_dict())
        unmerge(model)
        torch.testing.assert_close(model(x), adapted, rtol=1e-4, atol=1e-5)
    with disable_adapters(model):
        torch.testing.assert_close(model(x), base, rtol=1e-4, atol=1e-5)


# ---- a module class that computes what a known one does ---------------------------------------------------------------


class Projection(nn.Module):
    """x @ W.T + b under a name and with attributes of its own."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.in_features = inputs  # what LinearLike asks for; without `out_features` nobody takes it for one
        self.weight, self.bias = nn.Parameter(torch.randn(outputs, inputs)), nn.Parameter(torch.zeros(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight, self.bias)


def test_a_module_class_like_a_known_one() -> None:
    with pytest.raises(ValueError, match="no layer here could be adapted"):
        inject(nn.Sequential(Projection(8, 4)), OFTConfig(oft_block_size=4))
    with register_layer_type(Projection, like=nn.Linear):
        _lives(nn.Sequential(Projection(8, 8), nn.Tanh(), Projection(8, 4)), torch.randn(3, 8), ["0", "2"])


# ---- an arithmetic of its own ------------------------------------------------------------------------------------------


class Bank(nn.Module):
    """Several linear maps of one input, summed: weight (maps, outputs, inputs)."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 4, 8))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("bi,moi->bo", x, self.weight)


def _rotate_input(layer: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    x = args[0]
    for rotation in applied_rotations(layer, ""):
        x = rotation(x)
    return (x, *args[1:])


class BankType(LayerType):
    name, in_all_linear = "bank", True

    def rotated_weights(self, layer: nn.Module) -> dict[str, RotatedWeight]:
        return {"": RotatedWeight("weight", 8)}

    def attach(self, layer: Any) -> None:
        if not layer._forward_pre_hooks:
            layer.register_forward_pre_hook(_rotate_input)

    def detach(self, layer: nn.Module) -> None:
        layer._forward_pre_hooks.clear()

    def to_matrix(self, layer: nn.Module, weight: Tensor) -> Tensor:
        return weight.flatten(0, 1)


def test_an_arithmetic_of_its_own(tmp_path: Path) -> None:
    with register_layer_type(Bank, BankType()):
        model = nn.Sequential(Bank())
        _lives(model, torch.randn(3, 8), ["0"])
        with pytest.warns(UserWarning, match="PEFT cannot represent"):
            save_adapter(model, tmp_path)
        again = nn.Sequential(Bank())
        again.load_state_dict({"0.weight": model.state_dict()["0.weight"]})
        assert load_adapter(again, tmp_path) == ["0"]
        x = torch.randn(3, 8)
        assert torch.equal(again(x), model(x))


# ---- a codec: how a weight that is no parameter is read and written ----------------------------------------------------


class CodedLinear(nn.Linear):
    """A weight kept as int8 codes and one scale a row, beside what they leave: exact, and no parameter."""

    codes: Tensor
    scale: Tensor
    rest: Tensor

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        weight = self.weight.detach()
        del self.weight
        for name, buffer in zip(("codes", "scale", "rest"), self.encode(weight), strict=True):
            self.register_buffer(name, buffer)

    @staticmethod
    def encode(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        scale = weight.abs().amax(1, keepdim=True) / 127
        codes = (weight / scale).round().to(torch.int8)
        return codes, scale, weight - codes * scale

    def decode(self) -> Tensor:
        return self.codes * self.scale + self.rest

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.decode(), self.bias)


class CodedCodec(Codec):
    def matches(self, module: nn.Module, parameter: str) -> bool:
        return isinstance(module, CodedLinear) and parameter == "weight"

    def read(self, module: Any, parameter: str) -> Tensor:
        decoded: Tensor = module.decode()
        return decoded

    def write(self, module: Any, parameter: str, values: Tensor) -> None:
        module.codes, module.scale, module.rest = module.encode(values)


def test_a_codec() -> None:
    model = nn.Sequential(CodedLinear(8, 8), nn.Tanh(), CodedLinear(8, 4))
    inject(model, OFTConfig(oft_block_size=4))
    with pytest.raises(ValueError, match="cannot merge: the weights of 0, 2 are quantized or packed"):
        merge(model)
    with register_codec(CodedCodec()):
        _lives(nn.Sequential(CodedLinear(8, 8), nn.Tanh(), CodedLinear(8, 4)), torch.randn(3, 8), ["0", "2"])


def test_a_weight_changed_after_a_merge_is_seen_through_the_codec() -> None:
    with register_codec(CodedCodec()):
        model = nn.Sequential(CodedLinear(8, 8))
        inject(model, OFTConfig(oft_block_size=4))
        _train_a_step(model, torch.randn(3, 8))
        merge(model)
        model[0].scale.mul_(2)  # type: ignore[operator]
        with pytest.raises(RuntimeError, match="cannot unmerge 0: the weights were changed after the merge"):
            unmerge(model)


# ---- a file format -----------------------------------------------------------------------------------------------------


def _write(state: AdapterState, path: Path) -> None:
    layers = {name: dict(one._asdict()) for name, one in state.layers.items()}
    torch.save({"name": state.name, "config": dataclasses.asdict(state.config), "layers": layers}, path)


def _read(path: Path, name: str | None) -> list[AdapterState]:
    entry = torch.load(path)
    layers = {layer: LayerRotations(**one) for layer, one in entry["layers"].items()}
    return [AdapterState(entry["name"], OFTConfig(**entry["config"]), layers)]


@pytest.fixture
def one_file() -> Iterator[None]:
    from lightning_oft.formats.adapters import FORMATS

    before = dict(FORMATS)
    register_format(Format("one-file", lambda path: path.suffix == ".oft", _read, _write))
    yield
    FORMATS.clear()
    FORMATS.update(before)


@pytest.mark.usefixtures("one_file")
def test_a_file_format(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4)), torch.randn(3, 8)
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    inject(model, OFTConfig(oft_block_size=4))
    expected = _train_a_step(model, x)
    _write(take(model), tmp_path / "a.oft")
    again = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))
    again.load_state_dict(base)
    assert load_adapter(again, tmp_path / "a.oft") == list(oft_layers(again)) == ["0", "1"]
    assert torch.equal(again(x), expected)
    assert main(["export", "--checkpoint", str(tmp_path / "a.oft"), "--output", str(tmp_path / "peft")]) == 0
    assert "rotations of 2 layers" in capsys.readouterr().out
    assert main(["info", str(tmp_path / "a.oft")]) == 0
    assert "a.oft: adapters of format one-file\nadapter 'default'" in capsys.readouterr().out
    third = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))
    third.load_state_dict(base)
    load_adapter(third, tmp_path / "peft")
    assert torch.equal(third(x), expected)


class Flipped(nn.Conv2d):
    """A convolution whose neurons a rotation is to meet in the opposite order."""


class FlippedConv(type(layer_type_of(nn.Conv2d(1, 1, 1)))):  # type: ignore[misc]
    """A known arithmetic with another matrix: forward and merge must both ask this type."""

    name = "flipped convolution"

    def to_matrix(self, layer: nn.Module, weight: Tensor) -> Tensor:
        return weight.flatten(1).flip(-1)

    def from_matrix(self, layer: nn.Module, matrix: Tensor, weight: Tensor) -> Tensor:
        return matrix.flip(-1).view(weight.shape).contiguous()


def test_an_arithmetic_derived_from_a_known_one_is_asked_by_the_forward_too() -> None:
    with register_layer_type(Flipped, FlippedConv()):
        torch.manual_seed(0)
        model, x = nn.Sequential(Flipped(4, 4, 3)).eval(), torch.randn(2, 4, 5, 5)
        inject(model, OFTConfig(oft_block_size=4, target_modules=["0"], init_weights=False))
        adapted = model(x)
        merge(model)
        torch.testing.assert_close(model(x), adapted, rtol=1e-4, atol=1e-5)
