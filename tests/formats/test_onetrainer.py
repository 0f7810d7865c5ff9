"""OneTrainer's OFT_2: what it computes of a file is what the adapter computes that it was read into or written from. Its
formulas are written out here from its source; it is not run."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from layer_cases import randomize, relative
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lightning_oft import OFTConfig, inject, load_adapter, merge, save_adapter
from lightning_oft.cli import main
from lightning_oft.formats import AdapterFileError, read_adapter, read_adapters
from lightning_oft.formats.onetrainer import read_onetrainer, write_onetrainer
from lightning_oft.model import put, take

LAYERS = {"blocks.0.to_q": (6, 4), "blocks.0.conv": (6, 9)}  # (blocks, size)


class Net(nn.Module):
    """A linear layer and a convolution."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList([nn.ModuleDict({"to_q": nn.Linear(24, 8), "conv": nn.Conv2d(6, 8, 3)})])


def columns_turned(weight: Tensor, generator: Tensor, factor: float) -> Tensor:
    """What OneTrainer's OFTRotationModule and OFTModule.forward make of a weight: `_cayley_batch` with five terms; x R of a
    linear layer, and of a convolution W R."""
    vec = generator / factor
    b = round((1 + math.sqrt(1 + 8 * vec.shape[1])) / 2)
    q = torch.zeros(len(vec), b, b)
    rows, columns = torch.triu_indices(b, b, 1)
    q[:, rows, columns] = vec
    q = q - q.transpose(1, 2)
    r = torch.eye(b) + 2 * q + 2 * q @ q + 2 * q @ q @ q + q @ q @ q @ q
    matrix = weight.flatten(1)
    r = r.repeat(matrix.shape[1] // b // len(r), 1, 1)
    turn = r.transpose(1, 2) if weight.dim() == 2 else r  # base(x R) is x (W R^T)^T
    turned = torch.einsum("ork,rkc->orc", matrix.view(len(matrix), len(r), b), turn)
    return turned.reshape(weight.shape)


def trained(prefix: str, mark: Tensor | None = None, shared: bool = False) -> dict[str, Tensor]:
    torch.manual_seed(1)
    tensors = {}
    for name, (n, b) in LAYERS.items():
        place = prefix + (name.replace(".", "_") if prefix.endswith("_") else name)
        tensors[f"{place}.oft_R.weight"] = torch.randn(1 if shared else n, b * (b - 1) // 2) * 0.05
        if mark is not None:
            tensors[f"{place}.oft_R.scaled_oft"] = torch.tensor(b) if mark.dtype == torch.int32 else mark.clone()
    return tensors


def weights(net: Any) -> dict[str, Tensor]:
    return {name: net.get_parameter(f"{name}.weight").detach().clone() for name in LAYERS}


def _release(b: int) -> float:
    return 2 * math.sqrt(b - 1)


def _branch(b: int) -> float:
    return math.sqrt(b * (b - 1) / 2)


@pytest.mark.parametrize(
    ("prefix", "mark", "branch", "scale", "factor"),
    [
        ("unet.", None, None, None, lambda b: 1.0),
        ("lora_unet_", torch.tensor(True), None, None, _release),
        ("transformer.", torch.tensor(0, dtype=torch.int32), None, None, _release),  # the mark is the block size
        ("lora_transformer_", torch.tensor(1.0), "master", None, _release),
        ("unet.", torch.tensor(1.0), None, "release", _release),
        ("unet.", torch.tensor(1), None, "branch", _branch),
    ],
)
@pytest.mark.parametrize("shared", [False, True])
def test_a_file_is_read_as_onetrainer_computes_it(
    prefix: str, mark: Tensor | None, branch: str | None, scale: Any, factor: Any, shared: bool, tmp_path: Path
) -> None:
    file, tensors = tmp_path / "theirs.safetensors", trained(prefix, mark, shared)
    save_file(tensors, file, {"ot_branch": branch} if branch else None)
    net = Net()
    bases = weights(net)
    if scale is None:
        load_adapter(net, file)
    else:
        put(net, *read_onetrainer(file, scale=scale))
    merge(net)
    generators = [tensor for key, tensor in tensors.items() if key.endswith("weight")]
    for (name, base), generator in zip(bases.items(), generators, strict=True):
        turned = columns_turned(base, generator, factor(LAYERS[name][1]))
        assert relative(turned, base) > 1e-2
        torch.testing.assert_close(weights(net)[name], turned, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "std"),
    [({"num_cayley_neumann_terms": 5}, 0.1), ({}, 1e-3), ({"use_cayley_neumann": False}, 1e-3)],
    ids=["five terms", "six terms, near the identity", "the exact map, near the identity"],
)
def test_what_is_written_is_read_again_to_the_bit_and_turns_weights_as_here(
    options: dict[str, Any], std: float, tmp_path: Path
) -> None:
    net, file = Net(), tmp_path / "ours.safetensors"
    bases = weights(net)
    inject(net, OFTConfig(oft_block_size=9, target_modules=["conv"], series_guard="warn", **options))
    randomize(net, std)
    state = replace(take(net), extra={"prefix": "lora_unet_"})
    write_onetrainer(state, file)
    stored = load_file(file)
    write_onetrainer(read_adapter(file), file)
    assert all(torch.equal(tensor, stored[key]) for key, tensor in load_file(file).items())
    if "num_cayley_neumann_terms" in options:
        again = Net()
        load_adapter(again, file)
        assert torch.equal(take(again).generators()["blocks.0.conv"], state.generators()["blocks.0.conv"])
    merge(net)
    turned = columns_turned(bases["blocks.0.conv"], stored["lora_unet_blocks_0_conv.oft_R.weight"], 1)
    assert relative(turned, weights(net)["blocks.0.conv"]) < 1e-6


def test_the_command_line_writes_it_and_says_what_it_cannot(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    net, adapter, file = Net(), tmp_path / "adapter", tmp_path / "ours.safetensors"
    inject(net, OFTConfig(oft_block_size=4, target_modules=["to_q"], num_cayley_neumann_terms=5, series_guard="warn"))
    randomize(net)
    save_adapter(net, adapter)
    command = ["export", "--checkpoint", str(adapter), "--format", "onetrainer", "--output", str(file)]
    assert main(command) == 2
    assert "nothing says what the names of a Net begin with" in capsys.readouterr().err
    assert main([*command, "--prefix", "unet."]) == 0
    assert list(load_file(file)) == ["unet.blocks.0.to_q.oft_R.weight"]
    assert main(["export", "--checkpoint", str(file), "--output", str(tmp_path / "peft")]) == 2
    assert "its file leaves the types of its layers" in capsys.readouterr().err
    again = Net()
    load_adapter(again, file)
    assert torch.equal(take(again).generators()["blocks.0.to_q"], take(net).generators()["blocks.0.to_q"])


@pytest.mark.parametrize(
    ("tensors", "what"),
    [
        (trained("unet.", torch.tensor(1.0)), r"scaled, by 2 sqrt\(b-1\) or.*give read_onetrainer its scale"),
        ({**trained("unet."), "unet.a.dora_scale": torch.ones(8, 1)}, "DoRA, clipping and embeddings are not read"),
        ({**trained("unet."), "unet.a.oft_R.clipped_oft": torch.ones(())}, "DoRA, clipping and embeddings"),
        ({**trained("unet."), "unet.a.oft_R.scaled_oft": torch.tensor(True)}, "a: has no oft_R.weight"),
        ({"unet.a.oft_R.weight": torch.zeros(3, 5)}, "no generators of shape"),
        ({**trained("unet."), "unet.blocks.0.conv.oft_R.scaled_oft": torch.ones(2)}, "conv: cannot be read"),
        ({"unet.a.oft_R.weight": torch.full((2, 6), math.inf)}, "NaN or infinite"),
        ({"model.a.oft_R.weight": torch.zeros(2, 6)}, "begins with none of"),
    ],
)
def test_what_is_unclear_is_not_read(tensors: dict[str, Tensor], what: str, tmp_path: Path) -> None:
    save_file(tensors, tmp_path / "theirs.safetensors")
    with pytest.raises(AdapterFileError, match=what):
        read_adapters(tmp_path / "theirs.safetensors")


@pytest.mark.parametrize(
    ("options", "std", "what"),
    [
        ({"side": "output"}, 0.01, "it rotates outputs, and OneTrainer rotates inputs"),
        ({"target_modules": ["embedding"]}, 0.01, "embedding: OneTrainer rotates linear layers and convolutions"),
        ({"bias": "all"}, 0.01, "a.bias were trained whole"),
        ({"magnitude": "joint"}, 0.01, "a: OFT_2 has no magnitudes"),
        ({}, 0.1, "a: five terms, which is all that OneTrainer computes, are no rotation that far"),
    ],
)
def test_what_the_format_cannot_say_is_not_written(
    options: dict[str, Any], std: float, what: str, tmp_path: Path
) -> None:
    model = nn.ModuleDict({"a": nn.Linear(8, 8), "embedding": nn.Embedding(4, 8)})
    inject(model, OFTConfig(**{"oft_block_size": 4, "target_modules": ["a"], **options}))
    randomize(model, std)
    with pytest.raises(AdapterFileError, match=what):
        write_onetrainer(replace(take(model), extra={"prefix": "unet."}), tmp_path / "x.safetensors")
    assert list(tmp_path.iterdir()) == []
