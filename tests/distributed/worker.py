"""Runs named scenarios in the processes of one torchrun and writes what each rank ends with.

torchrun --nproc_per_node 2 tests/distributed/worker.py OUTPUT SCENARIO...

A scenario is `fit:STRATEGY`, `save:STRATEGY:KIND` (ten steps, checkpoint after five) or `resume:STRATEGY:KIND`
(from that checkpoint to ten), where KIND is `adapter` or `full`.
"""

from __future__ import annotations

import os
import sys
import traceback
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from scenario import Model, callback, data, trainer
from strategies import CPUFSDP
from torch import nn

from lightning_oft import oft_layers
from lightning_oft.callback.strategies.fsdp1 import FlatShards
from lightning_oft.surgery.sharded import gather_back

RANK, WORLD = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])

DDP: dict[str, dict[str, Any]] = {
    "": {},
    "static": {"static_graph": True},
    "bucket": {"static_graph": True, "gradient_as_bucket_view": True},
    "unused": {"find_unused_parameters": True},
}


def whole(value: torch.Tensor) -> torch.Tensor:
    return (value.full_tensor() if hasattr(value, "full_tensor") else value).detach().clone()  # type: ignore[operator]


def whole_state(model: nn.Module, run: pl.Trainer) -> dict[str, torch.Tensor]:
    """The model's whole state on every rank, under plain names."""
    if isinstance(run.strategy, CPUFSDP):
        return FlatShards().whole_state(run, model) or {}
    return {name: whole(value) for name, value in model.state_dict().items()}


def strategy(name: str) -> Any:
    """`ddp`, `ddp-static`, `fsdp2-block`, `fsdp2-layer-distributed`, `fsdp1` ..."""
    kind, *options = name.split("-")
    if kind == "ddp":
        return DDPStrategy(process_group_backend="gloo", **DDP["".join(options)])
    if kind == "fsdp1":
        return CPUFSDP(state_dict_type="sharded")  # full optimizer state crashes torch on a CPU
    return ModelParallelStrategy(
        data_parallel_size=WORLD,
        tensor_parallel_size=1,
        process_group_backend="gloo",
        save_distributed_checkpoint="distributed" in options,
    )


def model_for(name: str) -> Model:
    kind, *options = name.split("-")
    shard = options[0] if kind == "fsdp2" else "none"
    return Model(
        shard=shard,
        optimizer="all" if "all" in options else "trainable",
        mp_bf16="bf16" in options,
        late="late" in options,
    )


class Look(pl.Callback):
    """What a resumed run starts from, or a saved one stopped at: rotations and optimizer state, whole."""

    def __init__(self, when: str) -> None:
        self.when, self.seen = when, dict[str, torch.Tensor]()

    def look(self, pl_module: Any) -> None:
        gather_back(pl_module)  # an evaluation may have left parameters gathered
        names = {parameter: name for name, parameter in pl_module.named_parameters()}
        for optimizer in pl_module.trainer.optimizers:
            for parameter, state in optimizer.state.items():
                self.seen[names[parameter]] = whole(parameter)
                for key in ("exp_avg", "exp_avg_sq", "step"):
                    self.seen[f"{names[parameter]}/{key}"] = whole(state[key])

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        if self.when == "saved" and trainer.current_epoch == 0:
            self.look(pl_module)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        if self.when == "loaded":
            self.look(pl_module)


def run(scenario: str, output: Path) -> dict[str, Any]:
    action, name, *rest = scenario.split(":")
    kind = rest[0] if rest else "adapter"
    place = output / f"{name}-{kind}"
    static = "static" in name or "bucket" in name  # torch fails an assertion where a static graph meets no_sync
    options: dict[str, Any] = {"accumulate_grad_batches": 1, "max_steps": 20} if static else {}
    if name.startswith("fsdp1"):  # Lightning clips FSDP1 gradients by value only
        options |= {"gradient_clip_algorithm": "value", "gradient_clip_val": 0.01}
    look = Look({"save": "saved", "resume": "loaded"}.get(action, ""))
    callbacks: list[Any] = [callback(save_adapter_only=kind == "adapter"), look]
    if action == "save":
        callbacks.append(ModelCheckpoint(place, filename="{epoch}", save_top_k=-1))
        options["enable_checkpointing"] = True
    model = model_for(name)
    run_ = trainer(strategy(name), str(place), devices=WORLD, callbacks=callbacks, **options)
    checkpoint = str(place / "epoch=0.ckpt") if action == "resume" else None
    run_.fit(model, data(WORLD, RANK), data(WORLD, RANK), ckpt_path=checkpoint)
    dtypes = {str(layer.oft_R["default"].weight.dtype) for layer in oft_layers(model).values()}  # type: ignore[index, operator, union-attr]
    return {"state": whole_state(model, run_), "steps": run_.global_step, "seen": look.seen, "dtypes": dtypes}


def main() -> None:
    output = Path(sys.argv[1])
    results: dict[str, Any] = {}
    for scenario in sys.argv[2:]:
        try:
            results[scenario] = run(scenario, output)
        except Exception as error:
            results[scenario] = {"error": f"{type(error).__name__}: {error}", "trace": traceback.format_exc()}
            print(scenario, results[scenario]["trace"], flush=True)
    torch.save(results, output / f"world{WORLD}-rank{RANK}.pt")
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
