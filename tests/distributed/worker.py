"""Runs named scenarios in the processes of one torchrun and writes what each rank ends with.

torchrun --nproc_per_node 2 tests/distributed/worker.py OUTPUT SCENARIO...
"""

from __future__ import annotations

import sys
import traceback
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy
from scenario import Block, Model, callback, data, trainer
from torch import nn


def whole_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """The model's whole state on every rank, under plain names."""
    state = {}
    for name, value in model.state_dict().items():
        value = value.full_tensor() if hasattr(value, "full_tensor") else value
        state[name.replace("_fsdp_wrapped_module.", "")] = value.detach().clone()
    return state


def strategy(name: str) -> Any:
    kind, _, option = name.partition("-")
    if kind == "ddp":
        options: dict[str, Any] = {
            "": {},
            "static": {"static_graph": True},
            "bucket": {"static_graph": True, "gradient_as_bucket_view": True},
        }[option]
        return DDPStrategy(process_group_backend="gloo", **options)
    return ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1, process_group_backend="gloo")


def fit(name: str, root: Path) -> dict[str, Any]:
    """`ddp`, `ddp-static`, `ddp-bucket`, `fsdp2-block`, `fsdp2-layer`, ..."""
    kind, _, option = name.partition("-")
    rank, world = int(dist_env("RANK")), int(dist_env("WORLD_SIZE"))
    model = Model(shard=option if kind == "fsdp2" else "none")
    run = trainer(strategy(name), str(root), devices=world, callbacks=[callback()])
    run.fit(model, data(world, rank), data(world, rank))
    return {"state": whole_state(model), "steps": run.global_step}


def dist_env(key: str) -> str:
    import os

    return os.environ[key]


def main() -> None:
    output = Path(sys.argv[1])
    results: dict[str, Any] = {}
    for name in sys.argv[2:]:
        try:
            results[name] = fit(name, output / name)
        except Exception:
            results[name] = {"error": traceback.format_exc()}
            print(name, results[name]["error"], flush=True)
    torch.save(results, output / f"rank{dist_env('RANK')}.pt")
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
