"""Text tasks that several processes learn as one does."""

from __future__ import annotations

import csv
import json
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from scenario import callback, trainer, whole_state
from torch.utils.data import DataLoader, DistributedSampler

from lightning_oft.callback.samples import Samples
from lightning_oft.cli import main as main_of_cli
from lightning_oft.data.text.batches import pad
from lightning_oft.data.text.preferences import pad_pairs
from lightning_oft.data.text.prompts import pad_prompts
from lightning_oft.tasks import CausalLM, PolicyOptimization, PreferenceOptimization

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "examples" / "bases" / "docs-llama"
RECIPES = ROOT / "configs" / "recipes"
STRATEGIES: dict[str, Any] = {
    "auto": "auto",
    "ddp": {"class_path": "DDPStrategy", "init_args": {"process_group_backend": "gloo"}},
    "fsdp2": {
        "class_path": "ModelParallelStrategy",
        "init_args": {"data_parallel_size": 2, "tensor_parallel_size": 1, "process_group_backend": "gloo"},
    },
}


def text_rows() -> list[dict[str, list[int]]]:
    """Sixteen documents of very unlike length, so that processes learn from unlike numbers of tokens."""
    generator = torch.Generator().manual_seed(0)
    sizes = [5, 9, 2, 7, 3, 12, 4, 30] * 2
    rows = [torch.randint(3, 1024, (size,), generator=generator).tolist() for size in sizes]
    return [{"input_ids": row, "labels": [-100, *row[1:]]} for row in rows]


def pairs() -> list[dict[str, list[int]]]:
    """Eight pairs, whose prompts are one token."""
    ids = [row["input_ids"] for row in text_rows()]
    made = [{"chosen": one, "rejected": other} for one, other in zip(ids, ids[::-1], strict=True)][:8]
    return [pair | {f"{side}_labels": [-100, *row[1:]] for side, row in pair.items()} for pair in made]


def prompts() -> list[dict[str, Any]]:
    """Eight prompts of unlike length."""
    return [{"input_ids": row["input_ids"][:4], "prompt": "a prompt"} for row in text_rows()[:8]]


def first_token(completion_ids: list[list[int]], **_: Any) -> list[float]:
    return [ids[0] / 1024 for ids in completion_ids]


class Seeded(PolicyOptimization):
    """Draws the same completions of a prompt on whichever process it is."""

    def sample(self, batch: dict[str, Any], count: int, **options: Any) -> Any:
        torch.manual_seed(int(batch["input_ids"].sum()))
        return super().sample(batch, count, **options)


def text_task(kind: str) -> tuple[Any, Any, Any]:
    """A task, its rows, and how they become a batch."""
    options: dict[str, Any] = {"prompts": ["When the"], "optimizer": lambda groups: torch.optim.SGD(groups, 0.01)}
    if kind == "dpo":
        return PreferenceOptimization(str(DOCS), beta=1.0, **options), pairs(), pad_pairs
    if kind == "grpo":
        few = {"num_generations": 4, "max_completion_length": 6, "loss": "dapo", "beta": 0.1}
        return Seeded(str(DOCS), [first_token], **few, **options), prompts(), pad_prompts  # type: ignore[list-item, arg-type]
    return CausalLM(str(DOCS), **options), text_rows(), pad


def fit_text(strategy: Any, world: int, rank: int, root: Path, kind: str = "text") -> dict[str, Any]:
    """Two steps, and a validation with samples."""
    torch.manual_seed(0)
    task, rows, collate = text_task(kind)
    sampler: Any = DistributedSampler(rows, world, rank, shuffle=False)
    size = 1 if kind == "grpo" else 4 // world
    loader: Any = DataLoader(rows, size, sampler=sampler, collate_fn=partial(collate, pad_token_id=2))
    options = {"max_epochs": 1, "max_steps": -1, "gradient_clip_val": 1.0}
    options |= {"accumulate_grad_batches": 4 // world if kind == "grpo" else 2}
    oft = callback(target_modules="all-linear", oft_block_size=32, bias="none", use_cayley_neumann=False)
    run = trainer(strategy, str(root), world, [oft, Samples()], **options)
    run.fit(task, loader, loader)
    scores = {k: float(v) for k, v in run.callback_metrics.items() if "val/" in k}
    return {"state": whole_state(task), "scores": scores}


def fit_recipe(
    name: str, strategy: str, world: int, rank: int, root: Path, epochs: int = 2, ckpt_path: str | None = None
) -> list[float]:
    """configs/recipes/text-NAME.yaml through the command line: a step an epoch, each of all sixteen packs, so that it does
    not matter which process has which. Only what names a GPU or a hub differs, and the sizes. Returns the losses of
    validation as the log has them, on rank 0."""
    root.mkdir(exist_ok=True, parents=True)
    rows = root / f"rows{rank}.jsonl"
    pairs = [{"prompt": "Say " * (1 + i % 5), "completion": f" {i}" * (2 + 7 * i % 11)} for i in range(48)]
    rows.write_text("".join(json.dumps(pair) + "\n" for pair in pairs), encoding="utf-8")
    config = yaml.safe_load((RECIPES / f"text-{name}.yaml").read_text(encoding="utf-8"))
    trainer, model = config["trainer"], config["model"]["init_args"]
    trainer["accumulate_grad_batches"] //= world
    trainer |= {"accelerator": "cpu", "devices": world, "precision": "32-true", "strategy": STRATEGIES[strategy]}
    trainer |= {"max_epochs": epochs, "log_every_n_steps": 1, "default_root_dir": str(root)}
    trainer["callbacks"] = [{"class_path": "ModelCheckpoint", "init_args": {"dirpath": str(root), "save_last": True}}]
    trainer["logger"] = {
        "class_path": "CSVLogger",
        "init_args": {"save_dir": str(root), "name": "", "version": f"fit{epochs}"},
    }
    model |= {"pretrained": str(DOCS), "dtype": "float32", "prompts": None}
    if "quantization_config" in model:
        model["quantization_config"]["init_args"]["bnb_4bit_compute_dtype"] = "float32"
    config["data"]["init_args"] |= {"data": str(rows), "max_length": 64, "val_fraction": 0.2}
    config["oft"] |= {"export_dir": str(root / "export"), "merged_dtype": None}
    file = root / f"rank{rank}.yaml"
    file.write_text(yaml.safe_dump(config | {"ckpt_path": ckpt_path}), encoding="utf-8")
    code = main_of_cli(["fit", "--config", str(file), "--trainer.enable_progress_bar", "false"])
    assert code == 0
    log = (root / f"fit{epochs}" / "metrics.csv").read_text().splitlines() if rank == 0 else []
    return [float(row["val/loss"]) for row in csv.DictReader(log) if row["val/loss"]]


def run_text_recipe(name: str, world: int, rank: int, root: Path) -> dict[str, Any]:
    """A recipe on several processes, `NAME-STRATEGY`; and stopped after an epoch and resumed."""
    recipe, _, strategy = name.rpartition("-")
    losses = fit_recipe(recipe, strategy, world, rank, root)
    fit_recipe(recipe, strategy, world, rank, root / "halves", 1)
    resumed = fit_recipe(recipe, strategy, world, rank, root / "halves", 2, str(root / "halves" / "last.ckpt"))
    return {"losses": losses, "resumed": resumed}
