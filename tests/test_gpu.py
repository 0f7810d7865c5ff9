"""On a GPU every layer computes what it computes on a CPU, no step waits, and runs end as they do elsewhere."""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from layer_cases import KINDS, config, randomize, relative
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from small import Small, difference, loader, oft, state, trainer
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from transformers import LlamaConfig, LlamaForCausalLM

from lightning_oft import OFTConfig, inject, merge, merged, save_merged, unmerge
from lightning_oft.callback.strategies.steps import Steps
from lightning_oft.functional import angle_radius, frobenius_norm, orthogonality_error
from lightning_oft.layers import Rotation
from tests import quantized

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`"),
]
GPU = "cuda"
PRECISIONS: dict[Any, float] = {
    "32-true": 1e-5,
    "bf16-mixed": 1e-5,
    "16-mixed": 1e-5,
    "bf16-true": 2e-2,
    "16-true": 4e-3,
}
"""How far a merged model may be from the unmerged one: merged in float32, or in the dtype of its weights."""
FORMATS = [*quantized.BITSANDBYTES, *quantized.TORCHAO]


@pytest.fixture(autouse=True)
def _no_tf32() -> Iterator[None]:
    """cuDNN's convolutions round their inputs to TF32 by default: a thousandth, which would hide mistakes."""
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield


def rotations(model: nn.Module) -> dict[str, Rotation]:
    """Every rotation of a model."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Rotation)}


def llama(**options: Any) -> Any:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 64}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=4))
    inject(model, OFTConfig(oft_block_size=16, target_modules="all-linear", **options))
    randomize(model)
    return model.to(GPU).train()


TOKENS = torch.arange(24).view(2, 12)


@pytest.mark.parametrize("exact", [False, True], ids=["series", "exact"])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if "experts" not in kind])  # theirs makes tensors on a CPU
def test_outputs_gradients_and_merged_weights_are_those_of_a_cpu(kind: str, exact: bool) -> None:
    torch.manual_seed(0)
    here, x = KINDS[kind].build(), KINDS[kind].inputs()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # block sizes that are adjusted
        inject(here, config(use_cayley_neumann=not exact))
    randomize(here)
    there = copy.deepcopy(here).to(GPU)
    for model, device in ((here, "cpu"), (there, GPU)):
        y = model.train()(*(one.to(device) for one in x))
        (y * torch.linspace(-1, 1, y.numel()).view(y.shape).to(device)).sum().backward()
    with torch.no_grad():
        expected = here(*x)
        assert relative(there(*(one.to(GPU) for one in x)).cpu(), expected) < 1e-5
    for name, rotation in rotations(here).items():
        assert relative(rotations(there)[name].weight.grad.cpu(), rotation.weight.grad) < 1e-4, name
    merge(there)
    with torch.no_grad():
        assert relative(there.eval()(*(one.to(GPU) for one in x)).cpu(), expected) < 1e-5


@pytest.mark.parametrize(
    "options",
    [{}, {"use_cayley_neumann": False}, {"max_angle": 20.0}, {"module_dropout": 0.1}, {"magnitude": "joint"}],
    ids=["series", "exact", "max_angle", "dropout", "magnitude"],
)
def test_no_training_step_waits_for_the_gpu(options: Any) -> None:
    width, rows = 1024, 2048  # the weights of linear layers are rotated for all rows, the inputs for a few
    model = nn.ModuleList([nn.Linear(width, width), nn.Conv2d(64, 64, 1), nn.Linear(width, width)])
    inject(model, OFTConfig(oft_block_size=32, target_modules=["0", "1", "2"], **options))
    model.to(GPU).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 0.01)
    x = torch.randn(rows, width, device=GPU)
    with contextlib.ExitStack() as undo:
        Steps([optimizer], rotations(model), undo)
        undo.callback(torch.cuda.set_sync_debug_mode, "default")
        for step in range(6):
            busy = torch.cuda.Event()
            if step > 2:  # memory and tables are there by then
                torch.cuda.synchronize()
                torch.cuda.set_sync_debug_mode("error")
                torch.cuda._sleep(2**31)  # about a second
                busy.record()
            y = model[1](model[0](x).view(-1, 64, 4, 4)).reshape(rows, width)
            (model[2](y).square().mean() + model[2](y[:8]).square().mean()).backward()
            optimizer.step()
            optimizer.zero_grad()
            assert step <= 2 or not busy.query(), "the step has waited"


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled_code_and_its_cuda_graphs_compute_the_same(mode: str) -> None:
    eager = llama()
    compiled = copy.deepcopy(eager)
    fast = torch.compile(compiled, fullgraph=True, mode=mode)
    for _ in range(3):
        losses = []
        for run in (eager, fast):
            if mode == "reduce-overhead":
                torch.compiler.cudagraph_mark_step_begin()
            loss = run(input_ids=TOKENS.to(GPU), labels=TOKENS.to(GPU), use_cache=False).loss
            loss.backward()
            losses.append(loss.detach().clone())
        torch.testing.assert_close(*losses, rtol=1e-4, atol=1e-5)
        for name, rotation in rotations(eager).items():
            twin, gradient = rotations(compiled)[name], rotation.weight.grad
            assert relative(twin.weight.grad, gradient) < 1e-3, name
            with torch.no_grad():
                for one in (rotation, twin):
                    one.weight -= 0.1 * gradient
                    one.weight.grad = None


def test_autocast_and_tf32_leave_rotations_orthogonal(monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama(use_cayley_neumann=False)
    torch.set_float32_matmul_precision("high")
    try:
        with torch.autocast(GPU, torch.bfloat16), torch.no_grad():
            errors = [orthogonality_error(one.matrix().double()).max() for one in rotations(model).values()]
    finally:
        torch.set_float32_matmul_precision("highest")
    assert max(errors) < 1e-6


def test_generation_sees_every_step_and_is_that_of_the_merged_model() -> None:
    model = llama().eval()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 0.05, fused=True)

    def written(**options: Any) -> list[int]:
        made: list[int] = model.generate(
            TOKENS[:1, :4].to(GPU), max_new_tokens=8, do_sample=False, pad_token_id=0, **options
        )[0].tolist()
        return made

    before = written()
    for _ in range(3):
        model.train()
        model(input_ids=TOKENS.to(GPU), labels=TOKENS.to(GPU)).loss.backward()
        optimizer.step()
        model.eval()
        unmerged = written()
        weights = state(model)
        with merged(model):
            assert written() == unmerged
        assert difference(state(model), weights) == 0.0
    assert unmerged != before


@pytest.mark.parametrize("keep", ["never", "always"])
def test_a_merge_is_taken_back_and_needs_little_memory(keep: Any) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4096, 4096, bias=False)).to(GPU)
    inject(model, OFTConfig(oft_block_size=32, target_modules="all-linear"))
    randomize(model)
    before, weight = state(model), dict(model.named_parameters())["0.weight"]
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    merge(model, keep_base=keep)
    if keep == "never":
        # A new weight beside the old one, as nobody can tell who else has memory of a GPU, and pieces of it.
        assert torch.cuda.max_memory_allocated() - held < 1.5 * weight.nbytes
    assert relative(weight, before["0.weight"]) > 0.1
    unmerge(model)
    assert relative(weight, before["0.weight"]) <= (1e-6 if keep == "never" else 0)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_fit_ends_merged_as_it_was_trained(tmp_path: Path, precision: Any) -> None:
    # Adam in float16 makes NaN of a head that it trains.
    model, callback = Small(dropout=0.0), oft(merge_on_fit_end=False, max_angle=20.0, modules_to_save=None)
    trainer(tmp_path, callback, accelerator="gpu", devices=1, precision=precision, max_epochs=2).fit(model, loader())
    assert all(bool(rotation.weight.any()) for rotation in rotations(model).values())
    for rotation in rotations(model).values():
        assert rotation.weight.dtype == torch.float32
        assert float(frobenius_norm(rotation.weight.detach()).max()) <= angle_radius(20.0) * (1 + 1e-5)
    model = model.to(GPU).eval()
    x = next(iter(loader()))[0].to(GPU, dict(model.named_parameters())["net.0.weight"].dtype)
    with torch.no_grad():
        expected = model(x).float()
        merge(model)
        assert relative(model(x).float(), expected) < PRECISIONS[precision]


class Sharded(Small):
    """Sharded by its author, as ModelParallelStrategy asks."""

    def configure_model(self) -> None:
        fully_shard(self.net, mesh=self.device_mesh["data_parallel"])


@pytest.mark.parametrize("strategy", ["auto", "ddp", "fsdp2", "fsdp1"])
def test_a_resumed_fit_ends_as_one_that_was_not_interrupted(tmp_path: Path, strategy: str) -> None:
    def fit(root: Path, epochs: int, path: Path | None = None) -> dict[str, Tensor]:
        chosen: Any = {
            "fsdp2": lambda: ModelParallelStrategy(1, 1, save_distributed_checkpoint=False),
            "fsdp1": lambda: FSDPStrategy(auto_wrap_policy={nn.Sequential}),
        }
        torch.manual_seed(0)
        model = (Sharded if strategy == "fsdp2" else Small)(dropout=0.0, batch_norm=False)
        keeper = ModelCheckpoint(root, save_last=True, save_top_k=0, enable_version_counter=False)
        how = chosen[strategy]() if strategy in chosen else strategy
        options: dict[str, Any] = {"accelerator": "gpu", "devices": 1, "strategy": how, "max_epochs": epochs}
        run = trainer(root, oft(), keeper, **options)
        run.fit(model, loader(shuffle=False), ckpt_path=path)
        return {name: value.cpu() for name, value in state(model).items()}

    whole = fit(tmp_path / "whole", 4)
    fit(tmp_path / "half", 2)
    resumed = fit(tmp_path / "half", 4, tmp_path / "half" / "last.ckpt")
    assert difference(whole, resumed) == 0.0


class Diverging(Small):
    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 1e3, momentum=0.9)


class Errors(pl.Callback):
    """How far from orthogonal each step begins."""

    def __init__(self) -> None:
        self.errors: list[float] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        with torch.no_grad():
            found = [orthogonality_error(one.matrix().double()).max() for one in rotations(pl_module).values()]
        self.errors.append(float(torch.stack(found).max()))


def test_a_run_that_diverges_stays_orthogonal(tmp_path: Path) -> None:
    model, errors = Diverging(dropout=0.0, batch_norm=False), Errors()
    callback = oft(use_cayley_neumann=True, modules_to_save=None, merge_on_fit_end=False)
    trainer(tmp_path, callback, errors, accelerator="gpu", devices=1, max_epochs=2).fit(model, loader())
    assert any(rotation.terms is None for rotation in rotations(model).values())
    assert len(errors.errors) == 16
    assert max(errors.errors) < 1e-6


@pytest.mark.parametrize("kind", FORMATS)
def test_a_quantized_base_trains_and_leaves(tmp_path: Path, kind: str) -> None:
    model = quantized.llama(kind, device=GPU)
    inject(model, OFTConfig(oft_block_size=16, target_modules=["q_proj", "down_proj"]))
    model.train()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 0.01)
    tokens = quantized.TOKENS.to(GPU)
    losses = []
    for _ in range(5):
        loss = model(tokens, labels=tokens).loss
        loss.backward()
        assert all(one.weight.grad is not None and bool(one.weight.grad.any()) for one in rotations(model).values())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    with torch.no_grad():
        expected = model(tokens).logits.float().cpu()
    save_merged(model, tmp_path, torch.float32)
    plain = LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).train()
    with torch.no_grad():
        error = relative(plain(quantized.TOKENS).logits, expected)
    # Where a kernel computes in the weights' values the two are the same sums; int8 rounds its inputs too.
    assert error < (2e-2 if "int8" in kind else 1e-3)
    merge(model, requantize=True)
    with torch.no_grad():
        assert relative(model(tokens).logits.cpu(), expected) < 0.5
    unmerge(model)
    with torch.no_grad():
        assert relative(model(tokens).logits.cpu(), expected) < 1e-6


def test_kept_for_backward_is_what_was_counted() -> None:
    """The allocator's own figure of one rotated layer, in bfloat16: its input, and no copy beside."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(1024, 1024, bias=False) for _ in range(4))).to(GPU, torch.bfloat16)
    model.requires_grad_(False)
    x = torch.randn(4096, 1024, device=GPU, dtype=torch.bfloat16, requires_grad=True)

    def held() -> int:
        y = model(x)
        before = torch.cuda.memory_allocated()
        del y
        return before - torch.cuda.memory_allocated()

    plain = held()
    inject(model, OFTConfig(oft_block_size=32, target_modules="all-linear"))
    model.to(GPU).train()
    held()
    grown = held() - plain
    rows = x.nbytes
    assert grown < 4.2 * rows, f"{grown / rows:.2f} inputs for 4 layers"
