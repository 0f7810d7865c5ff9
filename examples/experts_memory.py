"""What a layer of experts keeps for backward: frozen, and rotated in transformers' default implementation and in "eager".

python examples/experts_memory.py
"""

import torch
from torch.autograd.graph import saved_tensors_hooks
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from lightning_oft import OFTConfig, inject

TOKENS, EXPERTS, HIDDEN, INNER = 512, 32, 256, 512


def kept(implementation: str, adapted: bool) -> float:
    """MiB that autograd keeps of one forward beside the parameters, each piece of memory once."""
    torch.manual_seed(0)
    config = MixtralConfig(hidden_size=HIDDEN, intermediate_size=INNER, num_local_experts=EXPERTS)
    config._experts_implementation = implementation
    model = torch.nn.ModuleDict({"experts": MixtralExperts(config).requires_grad_(False)})
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    if adapted:
        inject(model, OFTConfig(oft_block_size=32))
    held, own = {}, {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            held[storage.data_ptr()] = storage.nbytes()
        return tensor

    x = torch.randn(TOKENS, HIDDEN, requires_grad=True)
    chosen, weights = torch.rand(TOKENS, EXPERTS).topk(2).indices, torch.full((TOKENS, 2), 0.5)
    with saved_tensors_hooks(note, lambda tensor: tensor):
        output = model["experts"](x, chosen, weights)
    output.sum().backward()
    return sum(held.values()) / 2**20


def main() -> dict[str, float]:
    """Print and return the figures."""
    found = {
        "frozen": kept("grouped_mm", False),
        "rotated": kept("grouped_mm", True),
        "rotated, eager": kept("eager", True),
    }
    found["all weights of down_proj"] = EXPERTS * HIDDEN * INNER * 4 / 2**20
    for name, size in found.items():
        print(f"{name}: {size:.1f} MiB")
    return found


if __name__ == "__main__":
    main()
