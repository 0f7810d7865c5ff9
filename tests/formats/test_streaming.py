from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from lightning_oft import OFTConfig, inject, save_adapter, save_merged
from lightning_oft.formats.adapters import read_adapter
from lightning_oft.formats.streaming import stream_merge
from tests.quantized import rotate


def base(directory: Path, dtype: torch.dtype = torch.float32, tied: bool = False) -> Any:
    """A small Llama, saved in three files."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 64}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(**sizes, **heads, tie_word_embeddings=tied)).to(dtype)
    model.save_pretrained(directory, max_shard_size="150KB")
    return model


def adapter(model: nn.Module, directory: Path, **options: Any) -> Path:
    inject(model, OFTConfig(oft_block_size=16, **{"target_modules": "all-linear", **options}))
    rotate(model)
    return save_adapter(model, directory)


def tensors(directory: Path) -> dict[str, torch.Tensor]:
    return {name: value for file in sorted(directory.glob("*.safetensors")) for name, value in load_file(file).items()}


@pytest.mark.filterwarnings("ignore:PEFT cannot represent the rotations")  # of outputs
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "options", [{}, {"modules_to_save": ["lm_head"]}, {"use_cayley_neumann": False, "side": "output"}]
)
def test_a_streamed_merge_is_that_in_memory_to_the_bit(
    tmp_path: Path, dtype: torch.dtype | None, stored: torch.dtype, options: dict[str, Any]
) -> None:
    model = base(tmp_path / "base", stored)
    state = read_adapter(adapter(model, tmp_path / "adapter", **options))
    merge = stream_merge(tmp_path / "base", state)
    assert merge is not None
    merge.write(tmp_path / "streamed", dtype)
    save_merged(model, tmp_path / "merged", dtype)
    streamed, merged, plain = (tensors(tmp_path / name) for name in ("streamed", "merged", "base"))
    assert streamed.keys() == merged.keys()
    assert all(torch.equal(value, merged[name]) for name, value in streamed.items())
    assert all(value.dtype == (dtype or stored) for value in streamed.values())
    changed = {name for name, value in streamed.items() if not torch.equal(value, plain[name].to(value.dtype))}
    assert changed == {f"{name}.weight" for name in state.layers}
    files = {path.name for path in (tmp_path / "base").iterdir()}
    assert files == {path.name for path in (tmp_path / "streamed").iterdir()} | {"generation_config.json"}
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "streamed", dtype="auto")
    assert loaded.dtype == (dtype or stored)


@pytest.mark.parametrize("reason", ["tied", "quantized", "another dtype", "no folder"])
def test_what_is_not_plain_files_is_not_streamed(tmp_path: Path, reason: str) -> None:
    model = base(tmp_path / "base", tied=reason == "tied")
    targets = r".*(proj|lm_head)" if reason == "tied" else "all-linear"
    state = read_adapter(adapter(model, tmp_path / "adapter", target_modules=targets))
    config = tmp_path / "base" / "config.json"
    if reason == "quantized":
        config.write_text(config.read_text().replace("{", '{"quantization_config": {},', 1))
    if reason == "another dtype":
        from safetensors.torch import save_file

        file = sorted((tmp_path / "base").glob("*.safetensors"))[0]
        save_file({name: value.half() for name, value in load_file(file).items()}, file)
    assert stream_merge(tmp_path / ("base" if reason != "no folder" else "nowhere"), state) is None


def test_another_base_is_named(tmp_path: Path) -> None:
    model = base(tmp_path / "base")
    nn.init.normal_(model.model.layers[1].mlp.up_proj.weight)
    merge = stream_merge(tmp_path / "base", read_adapter(adapter(model, tmp_path / "adapter")))
    assert merge is not None
    assert merge.other_bases == ["model.layers.1.mlp.up_proj"]


def test_an_interrupted_write_leaves_nothing(tmp_path: Path) -> None:
    model = base(tmp_path / "base")
    merge = stream_merge(tmp_path / "base", read_adapter(adapter(model, tmp_path / "adapter")))
    assert merge is not None
    merge.folds["model.layers.1.mlp.up_proj.weight"].rotations.clear()  # so that folding fails, in the last file
    with pytest.raises(IndexError):
        merge.write(tmp_path / "streamed", None)
    assert {path.name for path in tmp_path.iterdir()} == {"base", "adapter"}
