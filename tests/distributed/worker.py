"""Named scenarios, and what a rank ends with; launch.py runs them.

A scenario is `fit:STRATEGY`, `save:STRATEGY:KIND` (ten steps, checkpoint after five) or `resume:STRATEGY:KIND`
(from that checkpoint to ten; `resume:STRATEGY:KIND:OTHER` from another strategy's), where KIND is `adapter` or `full`;
`bytes:STRATEGY` counts the memory of a fit and of its
merge, `layers` cuts single layers, `merged` enters and leaves that context, `refusals` tries what tensor parallelism does
not take, and `unsharded` what FSDP1 does not.
"""

from __future__ import annotations

import copy
import gc
import os
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from live_bytes import LiveBytes
from scenario import Model, callback, data, trainer
from strategies import CPUFSDP, CPUDeepSpeed
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_module, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.distributed.tensor.parallel.style import ParallelStyle

from lightning_oft import OFTConfig, OFTFinetuning, inject, merge, merged, oft_layers, unmerge
from lightning_oft.callback.strategies.fsdp1 import FSDP1Adapter
from lightning_oft.codecs import reshard
from lightning_oft.layers import Rotation


def world() -> int:
    """How many processes there are."""
    return int(os.environ["WORLD_SIZE"])


def rank() -> int:
    """Which of them this is."""
    return int(os.environ["RANK"])


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
        return whole_of_fsdp1(model, run)
    return {name: whole(value) for name, value in model.state_dict().items()}


def whole_of_fsdp1(model: nn.Module, run: pl.Trainer) -> dict[str, torch.Tensor]:
    adapter = FSDP1Adapter(run)
    with adapter.whole():
        return adapter.whole_state(model) or {}


def strategy(name: str) -> Any:
    """`ddp`, `ddp-static`, `fsdp2-block`, `fsdp2-layer-distributed`, `fsdp1` ..."""
    kind, *options = name.split("-")
    if kind == "ddp":
        return DDPStrategy(process_group_backend="gloo", **DDP["".join(options)])
    if kind == "fsdp1":
        return CPUFSDP(state_dict_type="sharded")  # full optimizer state crashes torch on a CPU
    if kind.startswith("deepspeed"):
        return CPUDeepSpeed(int(kind[-1]))
    parts = min(2, world()) if kind == "tp" else 1
    return ModelParallelStrategy(
        data_parallel_size=world() // parts,
        tensor_parallel_size=parts,
        process_group_backend="gloo",
        save_distributed_checkpoint="distributed" in options,
    )


def model_for(name: str) -> Model:
    kind, *options = name.split("-")
    # Lightning resumes only what has DTensors, so what was cut by layers goes on in units of FSDP2 on one process.
    cut = "block" if world() == 1 else "sequence" if "sequence" in options else "tp"
    shard = {"fsdp2": options[0] if options else "", "tp": cut}.get(kind, "none")
    return Model(
        shard=shard,
        injects="injects" in options,
        conv1d="conv1d" in options,
        hidden=512 if "wide" in options else 24,
        optimizer="all" if "all" in options else "trainable",
        mp_bf16="bf16" in options,
        late="late" in options,
    )


class Look(pl.Callback):
    """What a resumed run starts from, or a saved one stopped at: rotations and optimizer state, whole."""

    def __init__(self, when: str) -> None:
        self.when, self.seen = when, dict[str, torch.Tensor]()

    def look(self, pl_module: Any) -> None:
        reshard(pl_module.modules())  # an evaluation may have left parameters gathered
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
    if scenario == "layers":
        return dict(cut_layers())
    if scenario == "merged":
        return dict(enter_merged())
    if scenario == "refusals":
        return dict(refusals(output))
    if scenario == "unsharded":
        return {"said": unsharded(output)}
    action, name, *rest = scenario.split(":")
    if action == "bytes":
        return dict(count_bytes(name, output))
    if action == "guard":
        return leave_series(name, output / f"{name}-guard")
    kind = rest[0] if rest else "adapter"
    place = output / f"{name}-{kind}"
    static = "static" in name or "bucket" in name  # torch fails an assertion where a static graph meets no_sync
    options: dict[str, Any] = {"accumulate_grad_batches": 1, "max_steps": 20} if static else {}
    if name.startswith("fsdp1"):  # Lightning clips FSDP1 gradients by value only
        options |= {"gradient_clip_algorithm": "value", "gradient_clip_val": 0.01}
    look = Look({"save": "saved", "resume": "loaded"}.get(action, ""))
    adapter: dict[str, Any] = {"save_adapter_only": kind == "adapter", "magnitude": "joint"}
    if action == "save":
        source = "best" if name in ("ddp", "fsdp2-block") else "last"
        adapter |= {"export_dir": str(place / "export"), "export_from": source}
    split = name.startswith("tp")
    if split:  # biases are cut where rotations are whole, which torch cannot clip together
        adapter["bias"] = "none"
    parts, part = (world() // min(2, world()), rank() // 2) if split else (world(), rank())
    # DeepSpeed's optimizer state is of flat parts, which no parameter's name stands for.
    adapters = [callback(**adapter)]
    if "two" in name:
        adapters = [callback(module=f"blocks.{i}", adapter_name=f"block{i}", **adapter) for i in range(2)]
    callbacks: list[Any] = [*adapters, *([] if name.startswith("deepspeed") else [look])]
    if action == "save":
        best: dict[str, Any] = {"monitor": "val_loss", "mode": "max"}  # the first epoch's
        callbacks.append(ModelCheckpoint(place, filename="{epoch}", save_top_k=-1, **best))
        options["enable_checkpointing"] = True
    model = model_for(name)
    run_ = trainer(strategy(name), str(place), devices=world(), callbacks=callbacks, **options)
    resumed = output / f"{rest[1]}-{kind}" if len(rest) > 1 else place
    checkpoint = str(resumed / "epoch=0.ckpt") if action == "resume" else None
    run_.fit(model, data(parts, part), data(parts, part), ckpt_path=checkpoint)
    dtypes = {str(rotation.weight.dtype) for rotation in rotations(model)}
    return {"state": whole_state(model, run_), "steps": run_.global_step, "seen": look.seen, "dtypes": dtypes}


class Left(pl.Callback):
    """Which rotations have left their series, after every step. The first one starts near the reach of its series, by
    a block that one process alone holds where rotations are sharded."""

    def __init__(self, starts: bool) -> None:
        self.starts, self.left = starts, list[list[int]]()

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        weight = rotations(pl_module)[0].weight.detach()
        is_part, weight = hasattr(weight, "to_local"), getattr(weight, "to_local", lambda: weight)()
        if self.starts and weight.dim() == 2 and (rank() == world() - 1 or not is_part):
            weight[-1] = 0.035  # of the flat parts of FSDP1 nobody can say which block they are of

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self.left.append([index for index, rotation in enumerate(rotations(pl_module)) if rotation.terms is None])


def leave_series(name: str, place: Path) -> dict[str, Any]:
    """Rotations leave a series of small reach; and a run resumed after that."""
    states, left = [], []
    for checkpoint in (None, str(place / "epoch=0.ckpt")):
        model, look = model_for(name), Left(starts=checkpoint is None)
        oft = callback(max_angle=None, num_cayley_neumann_terms=4, bias="none", merge_on_fit_end=False)
        keeper = ModelCheckpoint(place, filename="{epoch}", monitor="val_loss", save_top_k=-1)
        options: dict[str, Any] = {"enable_checkpointing": True, "gradient_clip_val": None}
        run_ = trainer(strategy(name), str(place), devices=world(), callbacks=[oft, look, keeper], **options)
        run_.fit(model, data(world(), rank()), data(world(), rank()), ckpt_path=checkpoint)
        states.append(whole_state(model, run_))
        left.append(look.left)
    return {"states": states, "left": left}


class Counted(OFTFinetuning):
    """The callback, with the bytes of its training and of its merge counted; DTensors show what a process holds."""

    counts: dict[str, int]

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.live = LiveBytes(pl_module.parameters())
        self.live.__enter__()

    def _merge(self, *args: Any) -> None:
        trained = self.live.peak
        gc.collect()  # what the trainer's cycles still hold is not the merge's
        before = self.live.restart()
        super()._merge(*args)
        self.live.__exit__(None, None, None)
        self.counts = {
            "train": trained,
            "before": before,
            "merge": self.live.peak,
            "largest": self.live.largest,
        }


def count_bytes(name: str, output: Path) -> dict[str, int]:
    """Bytes on this process, beside those of the largest base weight and of the largest layer's generators."""
    model = model_for(name)
    oft = callback(Counted, keep_base="never", bias="none")
    largest = max(parameter.nbytes for parameter in model.blocks.parameters())
    trainer(strategy(name), str(output), devices=world(), callbacks=[oft]).fit(model, data(world(), rank()))
    generators = max(4 * rotation.weight.numel() for rotation in rotations(model))
    return {**oft.counts, "weight": largest, "generators": generators}


REFUSED: dict[str, dict[str, Any]] = {
    "a cut through a block": {"oft_block_size": 8},
    "dropped blocks": {"module_dropout": 0.1},
    "a norm of biases and rotations": {"bias": "oft_only"},
}


def refusals(output: Path) -> dict[str, str]:
    """What tensor parallelism refuses, and what it says."""
    said = {}
    for what, options in REFUSED.items():
        oft = callback(**{"bias": "none", "max_angle": None, **options})
        try:
            trainer(strategy("tp"), str(output), devices=world(), callbacks=[oft]).fit(model_for("tp"), data(1, 0))
        except ValueError as error:
            said[what] = str(error)
    return said


def unsharded(output: Path) -> str:
    """What is said to units of FSDP1 on one process in which nothing trains beside rotations."""
    try:
        oft = callback(bias="none")
        trainer(CPUFSDP(), str(output), devices=1, callbacks=[oft]).fit(model_for("fsdp1"), data(1, 0))
    except ValueError as error:
        return str(error)
    return ""


def rotations(model: nn.Module) -> list[Rotation]:
    layers = oft_layers(model).values()
    return [module for layer in layers for module in layer.oft_R.modules() if isinstance(module, Rotation)]  # type: ignore[union-attr]


def cut_layers() -> dict[str, float]:
    """Layers that tensor parallelism has cut, compared with whole ones: the largest differences, relative."""
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (world(),), mesh_dim_names=("tensor_parallel",))
    seen: dict[str, float] = {}

    def compare(what: str, one: Any, other: Any) -> None:
        one, other = whole(one), whole(other)
        seen[what] = float((one - other).abs().max() / one.abs().max())

    for case, (make, style, config) in CUTS.items():
        torch.manual_seed(0)
        plain = nn.Sequential(make())
        cut = copy.deepcopy(plain)
        parallelize_module(cut, mesh, {"0": style})
        inputs = torch.randint(0, 10, (6,)) if isinstance(plain[0], nn.Embedding) else torch.randn(6, 8)
        for model in (plain, cut):
            inject(model, OFTConfig(target_modules=["0"], **config))
            generators = rotations(model)[0].weight
            with torch.no_grad():
                generators.copy_(torch.linspace(-0.3, 0.3, generators.numel()).view_as(generators))
        outputs = [model(inputs) for model in (plain, cut)]
        compare(f"{case}: forward", *outputs)
        target = torch.randn_like(outputs[0])
        for output in outputs:
            (output * target).sum().backward()
        compare(f"{case}: gradient", *(rotations(model)[0].weight.grad for model in (plain, cut)))
        with torch.no_grad():
            compare(f"{case}: without gradient", outputs[0], cut.eval()(inputs))
        for step in (lambda model: merge(model, keep_base="never"), unmerge):
            for model in (plain, cut):
                step(model)
            compare(f"{case}: {getattr(step, '__name__', 'merged')}", plain[0].weight, cut[0].weight)
        with merged(plain), merged(cut), torch.no_grad():
            compare(f"{case}: within merged", plain(inputs), cut(inputs))
        if config.get("side") == "output":
            rotations(cut)[0].dropout = 0.5
            compare(f"{case}: bias under dropout", plain[0].bias.expand(6, -1), cut.train()(torch.zeros(6, 8)))
    return seen


def enter_merged() -> dict[str, float]:
    """A model in units of FSDP2, which leave gathered what a forward gathered, beside a whole one: how far they are
    apart, before and after a forward has made the units known to each other."""
    mesh = init_device_mesh("cpu", (world(),))
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        model: Any = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
        inject(model, OFTConfig(oft_block_size=4))
        for rotation in rotations(model):
            nn.init.normal_(rotation.weight, std=0.2)
        models.append(model)
    plain, cut = models
    before = [whole(layer.weight) for layer in plain]
    for unit in [*rotations(cut), *cut]:
        fully_shard(unit, mesh=mesh)
    inputs, seen = torch.randn(6, 8), dict[str, float]()
    for when in ("before any forward", "after one"):
        with merged(plain), merged(cut), torch.no_grad():
            seen[f"within, {when}"] = float((plain(inputs) - cut(inputs)).abs().max())
        outputs = [model(inputs) for model in models]
        seen[f"outside, {when}"] = float((outputs[0] - outputs[1]).detach().abs().max())
    for output in outputs:
        output.square().sum().backward()
    reshard(cut.modules())
    gradients = [[whole(rotation.weight.grad) for rotation in rotations(model)] for model in models]  # type: ignore[arg-type]
    seen["gradients"] = max(float((a - b).abs().max()) for a, b in zip(*gradients, strict=True))
    returned = [torch.equal(whole(layer.weight), weight) for layer, weight in zip(cut, before, strict=True)]
    return {**seen, "weights": 0.0 if all(returned) else 1.0}


class Rows(ParallelStyle):
    """A whole weight, and rows of the input cut over processes: what sequence parallelism does to a norm."""

    def _apply(self, module: nn.Module, device_mesh: Any) -> nn.Module:
        def enter(_: Any, args: Any, mesh: Any) -> Any:
            return (distribute_tensor(args[0], mesh, [Shard(0)]),)

        def leave(_: Any, output: Any, mesh: Any) -> Any:
            return output.full_tensor()

        return distribute_module(module, device_mesh, None, enter, leave)


BLOCKS = {"oft_block_size": 4}
SHARED = {"oft_block_size": 4, "block_share": True}
CUTS: dict[str, Any] = {
    "columns": (lambda: nn.Linear(8, 6), ColwiseParallel(output_layouts=Replicate()), BLOCKS),
    "rows": (lambda: nn.Linear(8, 6), RowwiseParallel(input_layouts=Replicate()), BLOCKS),
    "rows, shared": (lambda: nn.Linear(8, 6), RowwiseParallel(input_layouts=Replicate()), SHARED),
    "columns, outputs": (
        lambda: nn.Linear(8, 8),
        ColwiseParallel(output_layouts=Replicate()),
        {**BLOCKS, "side": "output"},
    ),
    "batch": (lambda: nn.Linear(8, 6), Rows(), BLOCKS),
    "embedding by rows": (lambda: nn.Embedding(10, 8), RowwiseParallel(input_layouts=Replicate()), BLOCKS),
    "embedding by columns": (lambda: nn.Embedding(10, 8), ColwiseParallel(output_layouts=Replicate()), BLOCKS),
}
