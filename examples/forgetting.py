"""Measure what a model learns of new data against what it forgets of the old, for OFT, LoRA and full finetuning.

    pip install '.[test]'
    python examples/forgetting.py digits
    python examples/forgetting.py text
    python examples/forgetting.py drawings

digits: the shipped ViT, which reads digits, learns to read them turned and inverted. Every method trains for ten epochs at
seven learning rates, each twice the last, with three seeds: 126 runs, 20 minutes of one CPU thread.
text: the shipped Llama, which has read the documentation of Python, learns the King James Bible. Every method trains for
100 steps at three learning rates, each three times the last, and is scored three times on the way: 18 runs, 8 minutes.
drawings: the shipped Stable Diffusion, which draws eight shapes in six scenes, learns what a "sks" is from five pictures in
four of them. Every method trains for 400 steps at three learning rates, each twice the last, with one seed, and with two more
at the best of the three: 35 runs, an hour of one CPU thread. Needs pip install '.[data,diffusion]' too.

Runs that docs/forgetting-*.jsonl lacks are made and appended to it; examples/forgetting_picture.py draws them. One setting
of OFT is tried, and scored on rows that are neither trained on nor in the picture, by

    python examples/forgetting.py text '{"oft_block_size": 64}' 0.003
"""

import json
import sys
import time
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any, ClassVar

import peft
import torch
import yaml
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.data import default_collate
from transformers import AutoModelForCausalLM, AutoModelForImageClassification

from lightning_oft import OFTConfig, inject, project
from lightning_oft.data import DigitsDataModule, DreamBoothDataModule, TextDataModule
from lightning_oft.data.diffusion.pictures import to_pixels
from lightning_oft.tasks import TextToImage
from lightning_oft.tasks.diffusion.losses import with_prior

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
    rates, seeds, again, epochs = [2**i for i in range(7)], 3, 0, 10

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
    rates, seeds, again, steps, points = [1, 3, 9], 1, 0, 100, [25, 50, 100]

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


ATTENTION = r"unet\..*\.(to_[qkv]|to_out\.0)|text_encoder\..*_proj"
EVERYWHERE = (
    rf"{ATTENTION}|unet\..*\.(net\.0\.proj|net\.2|proj_in|proj_out|conv\d?|conv_shortcut)|text_encoder\..*\.fc\d"
)


class Drawings:
    """A subject in five pictures, and the shapes that the base draws; scored by what classifiers read off samples."""

    oft: ClassVar[dict[str, Any]] = {"oft_block_size": 8, "use_cayley_neumann": False}
    lora: ClassVar[dict[str, Any]] = {"r": 16, "lora_alpha": 32}
    methods: ClassVar[Methods] = {
        "full finetuning": (2e-4, None),
        "LoRA r=16": (1e-3, peft.LoraConfig(**lora, target_modules=EVERYWHERE)),
        "OFT": (3e-3, OFTConfig(**oft, target_modules=EVERYWHERE)),
        "OFT held at 45°": (3e-3, OFTConfig(**oft, target_modules=EVERYWHERE, max_angle=45)),
        "OFT with magnitudes": (3e-3, OFTConfig(**oft, target_modules=EVERYWHERE, magnitude="joint")),
        "OFT, attention": (3e-3, OFTConfig(**oft, target_modules=ATTENTION)),
        "LoRA r=16, attention": (2e-3, peft.LoraConfig(**lora, target_modules=ATTENTION)),
    }
    rates, seeds, again, steps, points = [1, 2, 4], 1, 2, 400, [400]
    prior_weight, class_pictures = 2.0, 144
    counts: ClassVar[dict[str, int]] = {"seen": 25, "unseen": 50, "old": 50}

    def __init__(self, new: str = "new") -> None:
        recipe = yaml.safe_load((ROOT / "configs" / "diffusion.yaml").read_text(encoding="utf-8"))
        self.given, data = recipe["model"]["init_args"], recipe["data"]["init_args"]
        asked = {name: str(BASES / "drawn-prompts" / f"{name}.jsonl") for name in self.counts}
        found = DreamBoothDataModule(str(BASES / "drawn-subject"), size=data["size"], test_prompts=asked)
        found.setup("fit")
        self.subject = list(found.splits["train"])
        self.asked = {name: [found.splits[name][i] for i in range(count)] for name, count in self.counts.items()}
        if new != "new":  # the same prompts with other noise
            self.asked = {k: [row | {"seed": row["seed"] + 1000} for row in rows] for k, rows in self.asked.items()}
        self.task, prompts = self.model(), data["class_prompt"][: self.class_pictures]
        pictures = self.sample([{"prompt": prompt, "seed": seed} for seed, prompt in enumerate(prompts)])
        self.prior = [{"prompt": p, "pixel_values": x} for p, x in zip(prompts, pixels(pictures), strict=True)]
        self.before = pixels(self.sample(self.asked["old"]))

    def model(self) -> TextToImage:
        """The base; UNet and text encoder train."""
        judges = {what: str(BASES / "drawn-judges" / what) for what in self.given["judges"]}
        self.task = TextToImage(str(BASES / "drawn-sd"), sampling=self.given["sampling"], judges=judges)
        self.task.text_encoder.requires_grad_(True)
        return self.task

    def losses(self, model: Any) -> Iterator[Tensor]:
        """The loss of each step's batch: 8 pictures of the subject, and 8 that the base made of shapes."""
        for _ in range(self.steps):
            numbers = torch.randperm(len(self.prior))[:8].tolist()
            batch = default_collate([self.subject[i % len(self.subject)] for i in numbers])
            batch["prior"] = default_collate([self.prior[i] for i in numbers])
            yield with_prior(*self.task.denoising_errors(batch), self.prior_weight)

    def sample(self, rows: list[Any]) -> list[Any]:
        """A picture of each row, 25 at a time."""
        parts = [rows[i : i + 25] for i in range(0, len(rows), 25)]
        made = [self.task.sample([row["prompt"] for row in part], [row["seed"] for row in part]) for part in parts]
        return [picture for part in made for picture in part]

    def score(self, model: Any) -> dict[str, float]:
        """Shares of samples that are right: subject and scene ("new"), the subject in scenes of the five pictures and in
        others, old shapes; and how far the samples of these moved, in levels of 255 ("original")."""
        made = {name: self.sample(rows) for name, rows in self.asked.items()}
        right = {
            name: torch.tensor([self.read(made[name], rows, what) for what in self.task.judges])
            for name, rows in self.asked.items()
        }
        shares = {name: shape.float().mean().item() for name, (shape, _) in right.items()}
        new = torch.cat([right["seen"], right["unseen"]], 1).all(0).float().mean().item()
        return {"new": new, "original": (pixels(made["old"]) - self.before).abs().mean().item() * 127.5, **shares}

    def read(self, pictures: list[Any], rows: list[Any], what: str) -> list[bool]:
        """Whether a classifier reads off each picture what its row asks for."""
        found = self.task.judges[what].read(pictures, self.task.device)
        return [one == row["labels"][what] for one, row in zip(found, rows, strict=True)]


def pixels(pictures: list[Any]) -> Tensor:
    """Pillow images -> (N, 3, 32, 32) in [-1, 1]."""
    return torch.stack([to_pixels(picture, 32) for picture in pictures])


STUDIES: dict[str, Any] = {"digits": Digits, "text": Text, "drawings": Drawings}


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
    started = time.process_time()
    for step, loss in enumerate(study.losses(model), 1):
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if isinstance(adapter, OFTConfig):
            project(model)  # holds the angle
        if step in study.points:
            seconds = time.process_time() - started
            with torch.no_grad():
                scores = study.score(model.eval())
            model.train()
            count = sum(parameter.numel() for parameter in trained)
            scores = {name: round(score, 4) for name, score in scores.items()}
            yield {"step": step, **scores, "trained": count, "seconds": round(seconds, 1)}


def read(measured: Path) -> list[dict[str, Any]]:
    """The points that were measured."""
    return [json.loads(line) for line in measured.read_text(encoding="utf-8").splitlines()] if measured.exists() else []


def missing(study: Any, points: list[dict[str, Any]]) -> Iterator[tuple[str, float, int]]:
    """Method, learning rate and seed of what is still to be run, in order; `points` grows meanwhile."""
    for method, (smallest, _) in study.methods.items():
        rates, seeds = [smallest * rate for rate in study.rates], range(study.seeds)
        for lr, seed in product(rates, seeds):
            if (method, lr, seed) not in done(points):
                yield method, lr, seed
        for seed in range(study.seeds, study.seeds + study.again):
            tried = [point for point in points if point["method"] == method and point["seed"] in seeds]
            best = max(tried, key=lambda point: point["new"] + point["old"])["lr"]
            if (method, best, seed) not in done(points):
                yield method, best, seed


def done(points: list[dict[str, Any]]) -> set[tuple[str, float, int]]:
    """Method, learning rate and seed of each run."""
    return {(point["method"], point["lr"], point["seed"]) for point in points}


def main(task: str, measured: Path | None = None) -> None:
    """Make the runs that the file lacks, and append their points to it."""
    torch.set_num_threads(1)
    measured, study = measured or ROOT / "docs" / f"forgetting-{task}.jsonl", STUDIES[task]()
    versions, points = {"torch": torch.__version__, "peft": peft.__version__}, read(measured)
    for method, lr, seed in missing(study, points):
        made = [
            {"method": method, "lr": lr, "seed": seed, **point, **versions}
            for point in run(study, study.methods[method][1], lr, seed)
        ]
        points += made
        lines = [json.dumps(point, ensure_ascii=False) + "\n" for point in made]
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
