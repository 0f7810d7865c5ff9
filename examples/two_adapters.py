"""Two adapters on one frozen model, switched, combined, merged and taken out again, without Lightning.

python examples/two_adapters.py
"""

import torch
from torch import Tensor, nn

from lightning_oft import OFTConfig, disable_adapters, inject, merge, set_adapter, unload, unmerge


def train(model: nn.Module, x: Tensor, y: Tensor) -> None:
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.02)
    for _ in range(60):
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x), y).backward()
        optimizer.step()


def main() -> dict[str, float]:
    """Returns the difference to the first adapter's output, by what was done."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 4)).eval()
    x, y = torch.randn(64, 16), torch.randn(2, 64, 4)
    with torch.no_grad():
        base = model(x)

    inject(model, OFTConfig(oft_block_size=8), "first")
    train(model, x, y[0])
    set_adapter(model, [])  # none is active now, so that the next one will be
    inject(model, OFTConfig(oft_block_size=16), "second")
    train(model, x, y[1])

    with torch.no_grad():
        set_adapter(model, "first")
        first = model(x)
        set_adapter(model, ["first", "second"])  # y = base(x . R_first . R_second)
        combined = model(x)
        with disable_adapters(model):
            differences = {"disabled, to the base": float((model(x) - base).abs().max())}
        merge(model, "first")
        differences["merged, to the first adapter"] = float((model(x) - first).abs().max())
        unmerge(model)
        set_adapter(model, ["first", "second"])
        merge(model)
        unload(model)  # a plain model with both rotations in its weights
        differences["both merged, to both active"] = float((model(x) - combined).abs().max())
    for what, difference in differences.items():
        print(f"{what}: {difference:.1e}")
    return differences


if __name__ == "__main__":
    main()
