"""Measure what a model learns of new data against what it forgets of the old, for OFT, LoRA and full finetuning.

    pip install '.[test]'
    python examples/forgetting.py digits
    python examples/forgetting.py text

digits: the shipped ViT, which reads digits, learns to read them turned and inverted. Every method trains for ten epochs at
seven learning rates, each twice the last, with three seeds: 126 runs, 20 minutes of one CPU thread.
text: the shipped Llama, which has read the documentation of Python, learns the King James Bible. Every method trains for
100 steps at three learning rates, each three times the last, and is scored three times on the way: 18 runs, 8 minutes.

Runs that docs/forgetting-*.jsonl lacks are made and appended to it; examples/forgetting_picture.py draws them. One setting
of OFT is tried, and scored on rows that are neither trained on nor in the picture, by

    python examples/forgetting.py text '{"oft_block_size": 64}' 0.003
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoModelForImageClassification

from lightning_oft import OFTConfig, inject, project
from lightning_oft.data import DigitsDataModule, TextDataModule

ROOT = Path(__file__).parents[1]
BASES, TEXT = ROOT / "examples" / "bases", ROOT / "examples" / "text"
Methods = dict[str, tuple[float, Any]]


def compared(full: float, lora: float, oft: float, angles: tuple[int, ...], **config: Any) -> Methods:
    """The smallest learning rate of each method, and what it puts into the model."""
    return {
        "full finetuning": (full, None),
        "LoRA r=16": (lora, peft.LoraConfig(r=16, lora_alpha=32, target_modules="all-linear")),
        "OFT": (oft, OFTConfig(**config)),
        **{f"OFT held at {angle}°": (oft, OFTConfig(**config, max_angle=angle)) for angle in angles},
    }


class Digits:
    """The digits turned and inverted, and as they were; scored by accuracy."""

    methods = compared(5e-5, 2.5e-4, 5e-4, (28, 20, 14), oft_block_size=16, use_cayley_neumann=False)
    rates, seeds, epochs = [2**i for i in range(7)], 3, 10

    def __init__(self, new: str = "new") -> None:
        data = DigitsDataModule()
        data.setup("fit")
        splits = {k: [torch.stack([x[c] for x in rows]) for c in data.columns] for k, rows in data.splits.items()}
        self.train, self.scored = splits["train"], {"new": splits[new], "original": splits["original"]}
        self.steps = self.epochs * -(-len(self.train[0]) // 64)
        self.points = [self.steps]

    def model(self) -> Any:
        """The base, in eval mode."""
        return AutoModelForImageClassification.from_pretrained(BASES / "digits-vit")

    def losses(self, model: Any) -> Iterator[Tensor]:
        """The loss of each step's batch."""
        images, labels = self.train
        for _ in range(self.epochs):
            for batch in torch.randperm(len(images)).split(64):
                yield cross_entropy(model(images[batch]).logits, labels[batch], label_smoothing=0.1)

    def score(self, model: Any) -> dict[str, float]:
        """Accuracy."""
        right = {k: model(images).logits.argmax(-1) == labels for k, (images, labels) in self.scored.items()}
        return {k: found.float().mean().item() for k, found in right.items()}


class Text:
    """The King James Bible, and the documentation of Python; scored by perplexity."""

    mlp = ["gate_proj", "up_proj", "down_proj"]
    methods = compared(1e-4, 3e-4, 5e-4, (60, 40, 25), oft_block_size=64, target_modules=mlp, use_cayley_neumann=False)
    rates, seeds, steps, points = [1, 3, 9], 1, 100, [25, 50, 100]

    def __init__(self, new: str = "new") -> None:
        files = {"train": "kjv-train.txt", "new": "kjv-test.txt", "original": "docs-test.txt"}
        data = TextDataModule(
            {split: str(TEXT / name) for split, name in files.items()},
            pretrained=str(BASES / "docs-llama"), packing=True, max_length=256, val_fraction=0.05,
        )  # fmt: skip
        data.setup("fit")
        self.rows, self.collate = {k: list(rows) for k, rows in data.splits.items()}, data.collate_fn
        self.scored = {"new": self.rows[new], "original": self.rows["original"]}

    def model(self) -> Any:
        """The base, in eval mode."""
        return AutoModelForCausalLM.from_pretrained(BASES / "docs-llama", dtype=torch.float32)

    def losses(self, model: Any) -> Iterator[Tensor]:
        """The loss of each step's batch."""
        rows = self.rows["train"]
        for batch in torch.randperm(len(rows))[: 4 * self.steps].split(4):
            yield self.loss(model, [rows[i] for i in batch])

    def loss(self, model: Any, rows: list[Any]) -> Tensor:
        """The mean over the tokens of packed rows; without a cache, through which documents would see each other."""
        loss: Tensor = model(**self.collate(rows), use_cache=False).loss
        return loss

    def score(self, model: Any) -> dict[str, float]:
        """Perplexity."""
        return {k: self.loss(model, rows).exp().item() for k, rows in self.scored.items()}


STUDIES: dict[str, Any] = {"digits": Digits, "text": Text}


def run(study: Any, adapter: Any, lr: float, seed: int) -> Iterator[dict[str, Any]]:
    """Train once. Yields the scores at each of the study's points, and how many numbers are trained."""
    torch.manual_seed(seed)
    model = study.model().train()
    if isinstance(adapter, OFTConfig):
        inject(model, adapter)
    elif adapter is not None:
        model = peft.get_peft_model(model, adapter)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, study.steps)
    for step, loss in enumerate(study.losses(model), 1):
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if isinstance(adapter, OFTConfig):
            project(model)  # holds the angle
        if step in study.points:
            with torch.no_grad():
                scores = study.score(model.eval())
            model.train()
            count = sum(parameter.numel() for parameter in trained)
            yield {"step": step, **{name: round(score, 4) for name, score in scores.items()}, "trained": count}


def read(measured: Path) -> list[dict[str, Any]]:
    """The points that were measured."""
    return [json.loads(line) for line in measured.read_text(encoding="utf-8").splitlines()] if measured.exists() else []


def main(task: str, measured: Path | None = None) -> None:
    """Make the runs that the file lacks, and append their points to it."""
    torch.set_num_threads(1)
    measured, study = measured or ROOT / "docs" / f"forgetting-{task}.jsonl", STUDIES[task]()
    versions = {"torch": torch.__version__, "peft": peft.__version__}
    done = {(point["method"], point["lr"], point["seed"]) for point in read(measured)}
    for method, (smallest, adapter) in study.methods.items():
        for lr, seed in [(smallest * rate, seed) for rate in study.rates for seed in range(study.seeds)]:
            if (method, lr, seed) not in done:
                points = [{"method": method, "lr": lr, "seed": seed, **p} for p in run(study, adapter, lr, seed)]
                lines = [json.dumps(point | versions, ensure_ascii=False) + "\n" for point in points]
                with measured.open("a", encoding="utf-8") as file:
                    file.writelines(lines)
                print(*lines, sep="", end="", flush=True)


def look(task: str, config: str, lr: str) -> None:
    """Try one setting of OFT, and print its points."""
    torch.set_num_threads(1)
    study = STUDIES[task](new="val")
    for point in run(study, OFTConfig(use_cayley_neumann=False, **json.loads(config)), float(lr), seed=0):
        print(config, lr, point, flush=True)


if __name__ == "__main__":
    if len(sys.argv) == 4:
        look(*sys.argv[1:])
    else:
        main(sys.argv[1])
