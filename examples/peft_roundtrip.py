"""Write an adapter here, load it with PEFT, and the other way round.

pip install '.[test]'
python examples/peft_roundtrip.py
"""

import tempfile
from pathlib import Path

import peft
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from lightning_oft import OFTConfig, inject, load_adapter, save_adapter

TOKENS = torch.arange(12).view(1, 12)


def base() -> nn.Module:
    """A small causal language model; the same one every time."""
    torch.manual_seed(0)
    sizes = LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, vocab_size=32
    )
    return LlamaForCausalLM(sizes).eval()


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    found: Tensor = model(input_ids=TOKENS).logits
    return found


def main() -> dict[str, float]:
    """Returns the largest differences of the logits."""
    ours = base()
    inject(ours, OFTConfig(oft_block_size=16, target_modules=["q_proj", "v_proj"]))
    for parameter in ours.parameters():
        if parameter.requires_grad:  # stands for training
            parameter.data.normal_(std=0.05)
    with tempfile.TemporaryDirectory() as directory:
        save_adapter(ours, Path(directory) / "ours")
        theirs = peft.PeftModel.from_pretrained(base(), f"{directory}/ours")
        theirs.save_pretrained(f"{directory}/theirs")
        back = base()
        load_adapter(back, Path(directory) / "theirs")
    differences = {
        "adapter to base": float((logits(ours) - logits(base())).abs().max()),
        "PEFT, from our files": float((logits(theirs) - logits(ours)).abs().max()),
        "here, from PEFT's files": float((logits(back) - logits(ours)).abs().max()),
    }
    for what, difference in differences.items():
        print(f"{what}: {difference:.1e}")
    return differences


if __name__ == "__main__":
    main()
