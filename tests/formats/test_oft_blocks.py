"""`oft_blocks`: what sd-scripts, LyCORIS and ComfyUI compute of a file is what the adapter computes that it was read into or
written from. Their formulas are written out here from their source; none of them is run."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusion_models import unet
from layer_cases import randomize, relative
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lightning_oft import OFTConfig, inject, load_adapter, merge, oft_layers, save_adapter
from lightning_oft.cli import main
from lightning_oft.formats import AdapterFileError, read_adapter, read_adapters
from lightning_oft.formats.oft_blocks import read_blocks, write_blocks
from lightning_oft.model import take

LAYERS = {"blocks.0.to_q": (6, 4), "blocks.0.conv": (2, 12)}  # (blocks, size)


class Net(nn.Module):
    """A linear layer and a convolution in groups, by names with dots and underscores."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        parts = {"to_q": nn.Linear(10, 24), "conv": nn.Conv2d(24, 24, 3, padding=1, groups=2)}
        self.blocks = nn.ModuleList([nn.ModuleDict(parts)])


def rows_turned(weight: Tensor, blocks: Tensor, bound: float) -> Tensor:
    """What `merge_to` of sd-scripts' networks/oft.py and `make_weight` of LyCORIS' diag_oft.py compute of a weight, where
    `bound` is alpha * out_dim; and comfy/weight_adapter/oft.py at strength 1, where it is alpha."""
    q = blocks - blocks.transpose(1, 2)
    q = q * min(1.0, bound / float(q.norm()))
    eye = torch.eye(q.shape[1])
    r = (eye + q) @ (eye - q).inverse()
    turned = torch.einsum("knm,kn...->km...", r, weight.view(len(q), q.shape[1], *weight.shape[1:]))
    return turned.reshape(weight.shape)


def trained(prefix: str, alpha: float | None, std: float = 0.1) -> dict[str, Tensor]:
    """A file as those tools write one: any B, not only a triangle."""
    torch.manual_seed(1)
    tensors: dict[str, Tensor] = {}
    for name, (n, b) in LAYERS.items():
        place = prefix + (name.replace(".", "_") if prefix.endswith("_") else name)
        tensors[f"{place}.oft_blocks"] = torch.randn(n, b, b) * std
        if alpha is not None:
            tensors[f"{place}.alpha"] = torch.tensor(alpha)
    return tensors


def weights(net: Any) -> dict[str, Tensor]:
    return {name: net.get_parameter(f"{name}.weight").detach().clone() for name in LAYERS}


@pytest.mark.parametrize(
    ("prefix", "alpha"),
    [("oft_unet_", 1e-3), ("oft_unet_", 1.0), ("lycoris_", 0.0), ("lora_unet_", 1e-2), ("transformer.", None)],
)
def test_a_file_is_read_as_the_tool_that_trained_it_computes_it(
    prefix: str, alpha: float | None, tmp_path: Path
) -> None:
    file = tmp_path / "theirs.safetensors"
    save_file(trained(prefix, alpha), file)
    net = Net()
    bases = weights(net)
    assert load_adapter(net, file) == list(LAYERS)
    merge(net)
    for (name, base), blocks in zip(bases.items(), trained(prefix, None).values(), strict=True):
        turned = rows_turned(base, blocks, (alpha or math.inf) * 24)
        assert relative(turned, base) > 1e-3
        torch.testing.assert_close(weights(net)[name], turned, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("exact", [True, False])
def test_what_is_written_is_read_again_to_the_bit_and_turns_weights_as_here(exact: bool, tmp_path: Path) -> None:
    net, file = Net(), tmp_path / "ours.safetensors"
    bases = weights(net)
    inject(net, OFTConfig(r=6, side="output", use_cayley_neumann=not exact, target_modules=list(LAYERS)))
    randomize(net, 0.02)
    state = take(net)
    write_blocks(replace(state, extra={"prefix": "lora_unet_"}), file)
    (again,) = read_blocks(file)
    assert (again.name, again.config.r, again.config.side) == ("lora_unet", 0, "output")
    stored = load_file(file)
    write_blocks(again, file)
    assert all(torch.equal(tensor, stored[key]) for key, tensor in load_file(file).items())
    for name, generator in state.in_exact_map().generators().items():
        assert torch.equal(again.generators()[name.replace(".", "_")], generator)
    merge(net)
    for name, base in bases.items():
        key = f"lora_unet_{name.replace('.', '_')}"
        for bound in (1.0, 24.0):  # ComfyUI's, and the others'
            turned = rows_turned(base, stored[f"{key}.oft_blocks"], float(stored[f"{key}.alpha"]) * bound)
            assert relative(turned, weights(net)[name]) < 1e-6


def test_the_command_line_writes_a_unet_and_reads_it_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = unet().eval()
    model = copy.deepcopy(base)
    options: dict[str, Any] = {"oft_block_size": 4, "use_cayley_neumann": False, "side": "output"}
    inject(model, OFTConfig(target_modules=["to_q", "to_out.0", "conv1"], **options))
    randomize(model)
    file, adapter = tmp_path / "unet.safetensors", tmp_path / "adapter"
    with pytest.warns(UserWarning, match="PEFT cannot represent"):
        save_adapter(model, adapter)
    assert main(["export", "--checkpoint", str(adapter), "--format", "oft_blocks", "--output", str(file)]) == 0
    assert "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_out_0.oft_blocks" in load_file(file)
    again = nn.ModuleDict({"unet": copy.deepcopy(base)})
    load_adapter(again, file)
    for name, layer in oft_layers(again["unet"]).items():
        mine: Any = oft_layers(model)[name]
        assert torch.equal(layer.oft_R["default"].weight, mine.oft_R["default"].weight)  # type: ignore[index, union-attr]
    assert main(["info", str(file)]) == 0
    assert "adapters of format oft_blocks" in capsys.readouterr().out
    assert main(["export", "--checkpoint", str(file), "--output", str(tmp_path / "flat")]) == 2
    assert "to the model: put it into the model" in capsys.readouterr().err
    assert not (tmp_path / "flat").exists()


def test_a_file_of_several_models_has_an_adapter_for_each(tmp_path: Path) -> None:
    file = tmp_path / "two.safetensors"
    save_file(trained("lora_te1_", 0.0) | trained("lora_unet_", 0.0), file)
    assert sorted(state.name for state in read_adapters(file)) == ["lora_te1", "lora_unet"]
    assert read_adapter(file, "lora_unet").extra == {"prefix": "lora_unet_"}
    with pytest.raises(AdapterFileError, match="holds lora_te1, lora_unet: give the name of one"):
        load_adapter(Net(), file)
    net = Net()
    assert load_adapter(net, file, "lora_unet") == list(LAYERS)


def _changed(**tensors: Tensor | None) -> dict[str, Tensor]:
    """A file whose layer `to_q` has other tensors."""
    kept = trained("lora_unet_", 1.0)
    for kind, tensor in tensors.items():
        kept.pop(f"lora_unet_blocks_0_to_q.{kind}", None)
        kept |= {f"lora_unet_blocks_0_to_q.{kind.replace('__', '.')}": tensor} if tensor is not None else {}
    return kept


@pytest.mark.parametrize(
    ("tensors", "what"),
    [
        (_changed(rescale=torch.full((24, 1), 1.1)), "its rescale stretches outputs"),
        (_changed(dora_scale=torch.ones(24, 1)), "DoRA"),
        (_changed(oft_blocks=torch.zeros(2, 3, 4, 4)), "butterflies are not read"),
        (_changed(oft_blocks=None), "oft_blocks of shape None"),
        (_changed(oft_blocks__0=torch.zeros(6, 4, 4)), "the blocks of a fused weight"),
        (_changed(oft_blocks=torch.full((6, 4, 4), math.nan)), "NaN"),
        (_changed(alpha=torch.tensor(-1.0)), "a negative alpha"),
        (_changed(alpha=torch.ones(2)), "to_q: cannot be read"),
        (_changed(oft_blocks=torch.zeros(0, 4, 4)), "oft_blocks of shape"),
        (_changed(lora_up=torch.zeros(2)), "no part of an OFT adapter"),
        (trained("oft_unet_", 0.0), "holds it at the identity"),
        (trained("other_", 0.0), "begins with none of"),
    ],
)
def test_what_is_no_rotation_of_outputs_is_not_read(tensors: dict[str, Tensor], what: str, tmp_path: Path) -> None:
    save_file(tensors, tmp_path / "theirs.safetensors")
    with pytest.raises(AdapterFileError, match=what):
        load_adapter(Net(), tmp_path / "theirs.safetensors")


def test_names_that_fit_no_model_or_two_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "theirs.safetensors"
    save_file(trained("lora_unet_", 0.0), file)
    with pytest.raises(AdapterFileError, match="the model has no blocks_0_conv, blocks_0_to_q to rotate"):
        load_adapter(nn.Sequential(Net()), file)
    net: Any = Net()
    net.blocks_0 = nn.ModuleDict({"to_q": nn.Linear(10, 24)})
    with pytest.raises(AdapterFileError, match=r"blocks_0_to_q: may be blocks.0.to_q or blocks_0.to_q"):
        load_adapter(net, file)
    with pytest.raises(AdapterFileError, match="its names fit a, b alike"):
        load_adapter(nn.ModuleDict({"a": unet(), "b": unet()}), _unets(tmp_path))


def _unets(tmp_path: Path) -> Path:
    name = next(name for name, _ in unet().named_modules() if name.endswith("to_q"))
    save_file({f"lora_unet_{name.replace('.', '_')}.oft_blocks": torch.zeros(2, 4, 4)}, tmp_path / "unet.safetensors")
    return tmp_path / "unet.safetensors"


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"side": "input"}, "it rotates inputs, and oft_blocks rotate outputs"),
        ({"target_modules": ["embedding"]}, "embedding: oft_blocks are of linear layers and convolutions"),
        ({"bias": "all"}, "a.bias, b.bias were trained whole"),
        ({"block_share": True}, "the adapter does not say how many"),
        ({"num_cayley_neumann_terms": 2}, "it is no rotation any more"),
        ({"prefix": None}, "nothing says what the names of a ModuleDict begin with"),
        ({"prefix": "lora_unet"}, "must end with"),
        ({"prefix": "oft_unet_"}, "sd-scripts take the number of blocks of one layer for all, and here are 2, 4"),
    ],
)
def test_what_the_format_cannot_say_is_not_written(options: dict[str, Any], what: str, tmp_path: Path) -> None:
    prefix = {"prefix": options.pop("prefix", "lora_unet_")}
    model = nn.ModuleDict({"a": nn.Linear(8, 8), "b": nn.Linear(8, 16), "embedding": nn.Embedding(4, 8)})
    inject(model, OFTConfig(**{"oft_block_size": 4, "side": "output", "series_guard": "warn", **options}))
    randomize(model, 0.2 if "num_cayley_neumann_terms" in options else 0.02)
    state = take(model)
    with pytest.raises(AdapterFileError, match=what):
        write_blocks(replace(state, extra=prefix), tmp_path / "x.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_blocks_that_lycoris_cannot_load_are_named(tmp_path: Path) -> None:
    model = nn.ModuleDict({"wide": nn.Linear(8, 16)})
    inject(model, OFTConfig(oft_block_size=8, side="output", target_modules=["wide"]))
    state = take(model)
    with pytest.warns(UserWarning, match="wide: more entries in a block than blocks, which ComfyUI reads and LyCORIS"):
        write_blocks(replace(state, extra={"prefix": "lora_unet_"}), tmp_path / "x.safetensors")


def test_no_rotation_of_outputs_does_what_one_of_inputs_does() -> None:
    torch.manual_seed(0)
    weight, blocks = torch.randn(64, 64), torch.randn(4, 16, 16) * 0.05
    wanted = weight @ torch.matrix_exp(torch.block_diag(*(blocks - blocks.mT)))
    u, _, vh = torch.linalg.svd(wanted @ weight.mT)  # the rotation of all outputs that comes nearest
    assert float((u @ vh @ weight - wanted).norm() / (weight - wanted).norm()) > 0.5
