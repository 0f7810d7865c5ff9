"""Full-weight patches: base and patch are the merged model, for whatever can be merged."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusion_models import unet
from layer_cases import KINDS, config, randomize, relative
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lightning_oft import OFTConfig, inject, load_adapter, merge, merged, oft_layers, save_adapter
from lightning_oft.cli import main
from lightning_oft.formats import AdapterFileError, save_patch


def _patched(base: nn.Module, patch: dict[str, Tensor], prefix: str) -> nn.Module:
    """What ComfyUI makes of a model and a patch (comfy/lora.py): `weight += diff`, by the names of its state dict."""
    names = {}
    for name in base.state_dict():
        path, _, kind = name.rpartition(".")
        place = prefix + (path.replace(".", "_") if prefix.endswith("_") else path)
        names[{"weight": f"{place}.diff", "bias": f"{place}.diff_b"}.get(kind, f"{prefix}{name}.diff")] = name
    state = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    for key, change in patch.items():
        assert change.shape == state[names[key]].shape
        state[names[key]] += change
    patched = copy.deepcopy(base)
    patched.load_state_dict(state)
    return patched


@pytest.mark.filterwarnings("ignore:block sizes adjusted")
@pytest.mark.parametrize("kind", KINDS)
def test_base_and_patch_are_the_merged_model(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    base, inputs = KINDS[kind].build().eval(), KINDS[kind].inputs()
    model = copy.deepcopy(base)
    inject(model, config())
    randomize(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    patch = load_file(save_patch(model, tmp_path / "patch.safetensors", "diffusion_model."))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    with torch.no_grad():
        wanted, found = model(*inputs), _patched(base, patch, "diffusion_model.")(*inputs)
        assert relative(wanted, base(*inputs)) > 0.01
    assert relative(found, wanted) < 1e-6


def test_the_command_line_patches_a_unet_with_all_that_was_trained(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = unet()
    base.save_pretrained(tmp_path / "unet")
    (tmp_path / "model_index.json").write_text("{}")
    model = copy.deepcopy(base)
    inject(
        model,
        OFTConfig(oft_block_size=4, target_modules=["to_q", "conv1"], bias="oft_only", modules_to_save=["conv_out"]),
    )
    randomize(model)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "oft_R" not in name:
            parameter.data += 0.1
    with pytest.warns(UserWarning, match="PEFT cannot represent"):
        save_adapter(model, tmp_path / "adapter")
    file = tmp_path / "patch.safetensors"
    command = ["export", "--format", "comfyui", "--checkpoint", str(tmp_path / "adapter"), "--output", str(file)]
    assert main([*command, "--base", str(tmp_path)]) == 0
    assert main([*command, "--base", str(tmp_path / "unet"), "--overwrite"]) == 0
    patched = _patched(base, load_file(file), "lora_unet_").state_dict()
    merge(model)
    assert "lora_unet_conv_out.diff_b" in load_file(file)
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(patched[name], tensor, rtol=0, atol=1e-6)
    capsys.readouterr()


def test_a_patch_of_a_half_precision_base_is_rounded_once(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(32, 32, dtype=torch.bfloat16))
    weight: Any = model[0].weight.detach()
    inject(model, OFTConfig(oft_block_size=8))
    randomize(model)
    (change,) = load_file(save_patch(model, tmp_path / "p.safetensors", "transformer.")).values()
    r_nbb = oft_layers(model)["0"].oft_R["default"].matrix()  # type: ignore[index, operator, union-attr]
    exact = weight.float() @ torch.block_diag(*r_nbb.detach()).mT - weight.float()
    assert change.dtype == torch.bfloat16
    torch.testing.assert_close(change.float(), exact, rtol=2**-8, atol=1e-6)


class UNet2DConditionModel(nn.Sequential):
    """Known by its name."""


def test_refusals_name_the_remedy(tmp_path: Path) -> None:
    def adapted(layer: nn.Module, **options: Any) -> nn.Module:
        model = nn.Sequential(layer)
        inject(model, OFTConfig(oft_block_size=4, **options))
        return model

    file, linear = tmp_path / "p.safetensors", adapted(nn.Linear(8, 8))
    for model, prefix, place, what in (
        (linear, None, file, "nothing says what the names of a Sequential begin with in this format: give it"),
        (linear, "lora", file, "must end with '_' or '.'"),
        (linear, "lora_unet_", tmp_path / "p.bin", "name it so"),
        (adapted(nn.MultiheadAttention(8, 2)), "lora_unet_", file, "0.in_proj_weight: ComfyUI has no name for it"),
        (adapted(nn.Linear(8, 8), bias="all"), "transformer.", file, "0.bias: ComfyUI has no name for it"),
    ):
        with pytest.raises(AdapterFileError, match=what):
            save_patch(model, place, prefix)
    assert list(tmp_path.iterdir()) == []
    with merged(linear), pytest.raises(RuntimeError, match="cannot write a patch: 0 are merged"):
        save_patch(linear, file, "lora_unet_")
    with pytest.raises(ValueError, match="the model has no adapter"):
        save_patch(nn.Linear(2, 2), file)


def test_a_patch_is_no_adapter(tmp_path: Path) -> None:
    save_file({"lora_unet_a.diff": torch.zeros(2, 2)}, tmp_path / "p.safetensors")
    with pytest.raises(AdapterFileError, match=r"is a full-weight patch.*give the adapter that it was written from"):
        load_adapter(nn.Linear(2, 2), tmp_path / "p.safetensors")
