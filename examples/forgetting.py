"""Measure what a model learns of new data against what it forgets of the old, for OFT, LoRA and full finetuning.

    pip install '.[test]'
    python examples/forgetting.py

The shipped ViT reads digits and learns to read them turned and inverted. Every method trains for ten epochs at seven
learning rates, each twice the last, with three seeds, on one CPU thread: 126 runs, about 20 minutes. They are written
to docs/forgetting.json; examples/forgetting_picture.py draws them.
"""

import json
import sys
from pathlib import Path
from typing import Any

import peft
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForImageClassification

from lightning_oft import OFTConfig, inject, project
from lightning_oft.data import DigitsDataModule

ROOT = Path(__file__).parents[1]
OFT: dict[str, Any] = {"oft_block_size": 16, "use_cayley_neumann": False}
METHODS: dict[str, tuple[float, Any]] = {  # the smallest learning rate, and what is put into the model
    "full finetuning": (5e-5, None),
    "LoRA r=16": (2.5e-4, peft.LoraConfig(r=16, lora_alpha=32, target_modules="all-linear")),
    "OFT": (5e-4, OFTConfig(**OFT)),
    **{f"OFT held at {angle}°": (5e-4, OFTConfig(**OFT, max_angle=angle)) for angle in (28, 20, 14)},
}


def run(adapter: Any, lr: float, seed: int, splits: dict[str, list[torch.Tensor]], epochs: int = 10) -> dict[str, Any]:
    """Train once. Returns the accuracies on the held-out digits and how many numbers were trained."""
    torch.manual_seed(seed)
    model: Any = AutoModelForImageClassification.from_pretrained(ROOT / "examples" / "bases" / "digits-vit").train()
    if isinstance(adapter, OFTConfig):
        inject(model, adapter)
    elif adapter is not None:
        model = peft.get_peft_model(model, adapter)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    (images, labels), optimizer = splits["train"], torch.optim.AdamW(trained, lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * -(-len(images) // 64))
    for _ in range(epochs):
        for batch in torch.randperm(len(images)).split(64):
            cross_entropy(model(images[batch]).logits, labels[batch], label_smoothing=0.1).backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            if isinstance(adapter, OFTConfig):
                project(model)  # holds the angle
    with torch.no_grad():
        right = {name: model.eval()(splits[name][0]).logits.argmax(-1) == splits[name][1] for name in splits}
    scores = {name: round(right[name].float().mean().item(), 4) for name in ("new", "original")}
    return scores | {"trained": sum(parameter.numel() for parameter in trained)}


def main(target: Path = ROOT / "docs" / "forgetting.json", rates: int = 7, seeds: int = 3, epochs: int = 10) -> None:
    torch.set_num_threads(1)
    data = DigitsDataModule()
    data.setup("fit")
    splits = {k: [torch.stack([x[c] for x in rows]) for c in data.columns] for k, rows in data.splits.items()}
    runs = []
    for method, (smallest, adapter) in METHODS.items():
        for lr, seed in [(smallest * 2**i, seed) for i in range(rates) for seed in range(seeds)]:
            runs.append({"method": method, "lr": lr, "seed": seed, **run(adapter, lr, seed, splits, epochs)})
            print(runs[-1], flush=True)
    versions = {"torch": torch.__version__, "peft": peft.__version__}
    lines = ",\n  ".join(json.dumps(run, ensure_ascii=False) for run in runs)
    target.write_text(f'{{"versions": {json.dumps(versions)}, "runs": [\n  {lines}\n]}}\n', encoding="utf-8")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
