"""Our own tasks and experts under FSDP2, and what FSDP2 costs in bytes; launch.py runs the scenarios."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import yaml
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from scenario import callback, trainer, whole_state
from strategies import CPUFSDP
from text_worker import fit_text, run_text_recipe
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import Shard, distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, Dataset, DistributedSampler
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from lightning_oft import OFTConfig, inject
from lightning_oft.callback.strategies.fsdp1 import FSDP1Adapter
from lightning_oft.cli import main as main_of_cli
from lightning_oft.codecs import reshard
from lightning_oft.tasks import ImageClassification
from lightning_oft.tasks.sharding import shard_blocks

ROOT = Path(__file__).parents[2]
VIT = ROOT / "examples" / "bases" / "digits-vit"
RECIPE = ROOT / "configs" / "recipes" / "distributed-fsdp2.yaml"
VISION = {"target_modules": "all-linear", "bias": "none", "modules_to_save": ["classifier"], "oft_block_size": 8}
LLAMA = {
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
}
LAYERS, BLOCK, TOKENS = 3, 8, 16


class Images(Dataset[dict[str, torch.Tensor]]):
    """Thirty-two random images and labels."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.pixels = torch.randn(32, 1, 8, 8, generator=generator)
        self.labels = torch.randint(0, 10, (32,), generator=generator)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"pixel_values": self.pixels[index], "labels": self.labels[index]}


def images(world: int, rank: int) -> DataLoader[Any]:
    dataset = Images()
    return DataLoader(dataset, 8 // world, sampler=DistributedSampler(dataset, world, rank, shuffle=False))


def vision() -> ImageClassification:
    torch.manual_seed(0)
    return ImageClassification(str(VIT), optimizer=lambda groups: torch.optim.AdamW(groups, 0.005))


def fit_vision(strategy: Any, world: int, rank: int, root: Path) -> dict[str, Any]:
    """Four steps, then a validation and a test of what they left."""
    task = vision()
    options = {"max_steps": 4, "accumulate_grad_batches": 1, "gradient_clip_val": 1.0}
    run = trainer(strategy, str(root), world, [callback(**VISION, export_dir=str(root / "export"))], **options)
    run.fit(task, images(world, rank), images(world, rank))
    units = [name for name, module in task.named_modules() if isinstance(module, FSDPModule)]
    (validated,) = run.validate(task, images(world, rank), verbose=False)
    (tested,) = run.test(task, images(world, rank), verbose=False)
    reshard(task.modules())
    after = [name for name, module in task.named_modules() if isinstance(module, FSDPModule)]
    return {"state": whole_state(task), "units": units, "units after": after, "scores": {**validated, **tested}}


class Mixture(pl.LightningModule):
    """A small Mixtral, sharded as our tasks are."""

    def __init__(self, implementation: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model = MixtralForCausalLM(MixtralConfig(num_hidden_layers=2, num_local_experts=4, **LLAMA)).train()
        self.model.set_experts_implementation(implementation)

    def configure_model(self) -> None:
        if self.device_mesh is not None:
            shard_blocks(self.model, self.device_mesh)

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        loss: torch.Tensor = self.model(input_ids=batch).logits.square().mean()
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], 0.01, weight_decay=0.0)


def fit_experts(strategy: Any, world: int, rank: int, root: Path, implementation: str) -> dict[str, Any]:
    """Two steps with the adapter of a mixture, and its merge."""
    task = Mixture(implementation)
    tokens = torch.randint(0, LLAMA["vocab_size"], (8, TOKENS), generator=torch.Generator().manual_seed(0))
    sampler: Any = DistributedSampler(tokens, world, rank, shuffle=False)  # type: ignore[arg-type, var-annotated]
    oft = callback(target_modules="all-linear", oft_block_size=BLOCK, bias="none", use_cayley_neumann=False)
    options = {"max_steps": 2, "accumulate_grad_batches": 1, "gradient_clip_val": None}
    run = trainer(strategy, str(root), world, [oft], **options)
    run.fit(task, DataLoader(tokens, 4 // world, sampler=sampler))  # type: ignore[arg-type]
    reshard(task.modules())
    if isinstance(run.strategy, CPUFSDP):
        adapter = FSDP1Adapter(run)
        with adapter.whole():
            return {"state": adapter.whole_state(task)}
    return {"state": whole_state(task)}


def cut_experts(world: int) -> dict[str, str]:
    """What is said to experts that tensor parallelism has cut."""
    mesh, experts = init_device_mesh("cpu", (world,)), Mixture("eager").model.model.layers[0].mlp.experts
    experts.down_proj = torch.nn.Parameter(distribute_tensor(experts.down_proj.data, mesh, [Shard(2)]))
    try:
        inject(torch.nn.ModuleDict({"experts": experts}), OFTConfig(target_modules=["experts"], oft_block_size=BLOCK))
    except ValueError as error:
        return {"said": str(error)}
    return {}


class Llama(pl.LightningModule):
    """A small Llama in bfloat16, sharded as our tasks are."""

    def __init__(self, checkpointing: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=LAYERS, tie_word_embeddings=False, **LLAMA)).train()
        if checkpointing:
            self.model.gradient_checkpointing_enable()
            # The embedding is frozen: without this no block's input requires grad, and checkpointing would cut there.
            self.model.enable_input_require_grads()

    def configure_model(self) -> None:
        assert self.device_mesh is not None
        shard_blocks(self.model, self.device_mesh)

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        loss: torch.Tensor = self.model(input_ids=batch, labels=batch).loss
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], 0.01)


class Traffic(TorchDispatchMode):
    """Counts the calls of collectives, and the bytes of the whole tensor that each of them makes or starts from."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            name = func.name().split("::")[1].split(".")[0]
            tensors = [t for arg in args[:2] for t in (arg if isinstance(arg, list | tuple) else [arg])]
            sizes = [t.numel() * t.element_size() for t in tensors if isinstance(t, torch.Tensor)]
            self.calls[name] += 1
            self.bytes[name] += max(sizes, default=0)
        return func(*args, **(kwargs or {}))


class Count(pl.Callback):
    """The bytes that this process holds, and those that go over the wire in the second step."""

    def __init__(self) -> None:
        self.traffic = Traffic()
        self.held: dict[str, int] = {}

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 1:
            self.traffic.__enter__()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 1:
            self.traffic.__exit__(None, None, None)
            reshard(pl_module.modules())
            rotations = [p for name, p in pl_module.named_parameters() if ".oft_R." in name]
            base = [p for name, p in pl_module.named_parameters() if ".oft_R." not in name]
            moments = [v for s in trainer.optimizers[0].state.values() for k, v in s.items() if k != "step"]
            self.held = {"base": _local(base), "generators": _local(rotations), "optimizer": _local(moments)}


def _local(tensors: list[Any]) -> int:
    return sum(t.to_local().numel() * t.to_local().element_size() for t in tensors)


def count_bytes(strategy: Any, world: int, root: Path, checkpointing: bool) -> dict[str, Any]:
    count = Count()
    options = {"max_steps": 3, "accumulate_grad_batches": 1, "gradient_clip_val": None, "precision": "bf16-true"}
    oft = callback(target_modules="all-linear", oft_block_size=BLOCK, bias="none")
    run = trainer(strategy, str(root), world, [oft, count], **options)
    tokens = torch.randint(0, LLAMA["vocab_size"], (3, TOKENS), generator=torch.Generator().manual_seed(0))
    run.fit(Llama(checkpointing), DataLoader(tokens, 1))  # type: ignore[arg-type]
    return {"held": count.held, "calls": dict(count.traffic.calls), "bytes": dict(count.traffic.bytes)}


def run_recipe(world: int, root: Path) -> dict[str, Any]:
    """configs/recipes/distributed-fsdp2.yaml through the command line, two steps of it: only what names a GPU or a hub differs."""
    config = yaml.safe_load(RECIPE.read_text(encoding="utf-8"))
    checkpoints = config["trainer"]["callbacks"][0]["init_args"]
    checkpoints["dirpath"] = str(root / "checkpoints")
    config["trainer"]["strategy"]["init_args"] |= {"data_parallel_size": world, "process_group_backend": "gloo"}
    config["trainer"] |= {"accelerator": "cpu", "devices": world, "max_steps": 2, "default_root_dir": str(root)}
    config["trainer"] |= {"limit_val_batches": 1, "enable_progress_bar": False, "logger": False}
    config["model"]["init_args"]["pretrained"] = str(VIT)
    config["data"] = {"class_path": "DigitsDataModule", "init_args": {"batch_size": 16}}
    config["oft"] |= {"export_dir": str(root / "export"), "oft_block_size": 8}
    root.mkdir(exist_ok=True)
    file = root / f"rank{os.environ['RANK']}.yaml"
    file.write_text(yaml.safe_dump(config), encoding="utf-8")
    return {"code": main_of_cli(["fit", "--config", str(file)])}


def run(name: str, root: Path) -> dict[str, Any]:
    """`vision`, `text`, `text-ddp`, `dpo`, `dpo-ddp`, `grpo`, `sft-ddp`, `sft-fsdp2`, `qoft-nf4-fsdp2`, `split` (tensor
    parallel, refused), `recipe`, `experts`, `experts-fsdp1`, `experts-cut`, `bytes`, `bytes-checkpointing`."""
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if name == "experts-cut":
        return cut_experts(world)
    if name == "experts-fsdp1":
        return fit_experts(CPUFSDP(state_dict_type="sharded"), world, rank, root, "eager")
    if name == "recipe":
        return run_recipe(world, root)
    if name.startswith(("sft-", "qoft-")):
        return run_text_recipe(name, world, rank, root)
    split = world if name == "split" else 1
    strategy = ModelParallelStrategy(world // split, split, process_group_backend="gloo")
    kind, _, is_ddp = name.partition("-")
    if kind in ("text", "dpo", "grpo"):
        chosen = DDPStrategy(process_group_backend="gloo") if is_ddp else strategy
        return fit_text(chosen, world, rank, root, kind)
    if name == "experts":
        return fit_experts(strategy, world, rank, root, "grouped_mm")
    if name in ("vision", "split"):
        return fit_vision(strategy, world, rank, root)
    return count_bytes(strategy, world, root, checkpointing=name == "bytes-checkpointing")
