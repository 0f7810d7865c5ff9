"""Modules in a row, whose maps are computed together: each trains as by itself, and nobody sees who else was computed."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from layer_cases import computed_maps, config, gradients, randomize, rotations
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from lightning_oft import functional, inject, project
from lightning_oft.layers import reuse


class Blocks(nn.Module):
    """Modules in a row, each of two linear layers beside each other."""

    def __init__(self, count: int = 4) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.ModuleDict({name: nn.Linear(8, 8) for name in "ab"}) for _ in range(count))

    def run(self, x: Tensor, *numbers: int) -> Tensor:
        for number in numbers or range(len(self.blocks)):
            block: Any = self.blocks[number]
            x = torch.tanh(block["a"](x)) + block["b"](x)
        return x


def _blocks(shared: bool = True, **options: Any) -> Blocks:
    torch.manual_seed(0)
    model = Blocks()
    inject(model, config(target_modules="all-linear", **options))
    randomize(model)
    for rotation in rotations(model).values():
        rotation.shared = rotation.shared if shared else None
    return model.train()


def _in_checkpoints(model: Blocks, x: Tensor, reentrant: bool) -> Tensor:
    for number in range(4):
        x = checkpoint(model.run, x, number, use_reentrant=reentrant)  # type: ignore[assignment]
    return x.sum()


def _each_by_itself(model: Blocks, x: Tensor) -> Tensor:
    for number in range(4):
        model.run(x, number).square().sum().backward()
    return model.run(x, 3).sum()


def _backwards_around_a_step(model: Blocks, x: Tensor) -> Tensor:
    """As a discriminator does, the second half trains before the first half's backward."""
    half = model.run(x, 0, 1)
    model.run(half.detach(), 2, 3).square().sum().backward()
    for rotation in list(rotations(model).values())[4:]:
        with torch.no_grad():
            rotation.weight.sub_(0.01 * rotation.weight.grad)
    return model.run(half, 2, 3).sum()


ROWS: dict[str, tuple[Callable[[Blocks, Tensor], Tensor], list[int], list[int]]] = {
    "in_order": (lambda model, x: model.run(x).sum(), [8], [8]),
    "against_order": (lambda model, x: model.run(x, 3, 2, 1, 0).sum(), [2, 4, 6, 8], [2, 2, 2, 2]),
    "unused": (lambda model, x: model.run(x, 0, 1).sum(), [8], [4]),
    "checkpoints": (lambda model, x: _in_checkpoints(model, x, False), [8, 6, 4, 2, 2, 4, 6, 8], [2] * 8),
    "reentrant": (lambda model, x: _in_checkpoints(model, x, True), [1] * 8 + [2, 4, 6, 8], [1] * 8 + [2] * 4),
    "each_by_itself": (_each_by_itself, [8, 6, 4, 2, 2], [2] * 5),
    "around_a_step": (_backwards_around_a_step, [8, 4], [8, 4]),
}
"""How a row of modules is called; of how many generators maps are computed in the first step, and once that is known."""


@pytest.mark.parametrize("large", [2**19, 0], ids=["kept", "computed_again"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", ROWS)
def test_modules_after_each_other_train_as_each_by_itself(
    case: str, dtype: torch.dtype, large: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    loss, first, last = ROWS[case]
    monkeypatch.setattr(functional.maps, "_LARGE", large)
    monkeypatch.setattr(functional.products, "_SMALL_ON_CPU", 0)
    together, apart = (_blocks(shared).to(dtype) for shared in (True, False))
    sizes = computed_maps(monkeypatch)
    for step in range(4):
        x = torch.randn(5, 8, dtype=dtype, requires_grad=True)
        for model in (together, apart):
            model.zero_grad()
            sizes.clear()
            loss(model, x).backward()
            if model is together and step in (0, 3):
                assert sizes == (first if step == 0 else last)
            with torch.no_grad():
                for rotation in rotations(model).values():
                    if rotation.weight.grad is not None:
                        rotation.weight.sub_(0.01 * rotation.weight.grad)
        torch.testing.assert_close(gradients(together), gradients(apart), rtol=1e-5, atol=1e-6)


def test_a_map_is_of_no_more_than_a_cache_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reuse, "_TOGETHER", {"cpu": 5 * 2 * 4 * 4})  # two modules have 4 rotations of 2 blocks of 4
    model, sizes = _blocks(), computed_maps(monkeypatch)
    model.run(torch.randn(5, 8)).sum().backward()
    assert sizes == [4, 4]


def test_uncounted_steps_of_an_optimizer_part_modules_too(monkeypatch: pytest.MonkeyPatch) -> None:
    model, sizes = _blocks(), computed_maps(monkeypatch)
    optimizer = torch.optim.Adam([rotation.weight for rotation in rotations(model).values()], fused=True)
    for _ in range(201):
        optimizer.zero_grad()
        sizes.clear()
        model.run(torch.randn(5, 8), 0, 2).sum().backward()
        optimizer.step()
    assert sizes == [2, 2]


# ---- what the others do meanwhile --------------------------------------------------------------------------------------


def _weights(model: Blocks, *numbers: int) -> list[nn.Parameter]:
    return [rotations(model)[f"blocks.{number}.{name}"].weight for number in numbers for name in "ab"]


def _discriminator_steps(model: Blocks, half: Tensor) -> None:
    torch.autograd.backward(model.run(half.detach(), 2, 3).sum(), inputs=_weights(model, 2, 3))
    with torch.no_grad():
        for weight in _weights(model, 2, 3):
            weight.sub_(0.1 * weight.grad)  # type: ignore[operator]


def _freeze_others(model: Blocks, half: Tensor) -> None:
    for weight in _weights(model, 2, 3):
        weight.requires_grad_(False)


def _swap_company(model: Blocks, half: Tensor) -> None:
    """Of as many entries as before."""
    for weight, other in zip(_weights(model, 2), _weights(model, 3), strict=True):
        weight.requires_grad_(False)
        other.requires_grad_(True)


def _step_and_project(model: Blocks, half: Tensor) -> None:
    _discriminator_steps(model, half)
    project(model)


MEANWHILE: dict[str, Callable[[Blocks, Tensor], object]] = {
    "a_step": _discriminator_steps,
    "frozen": _freeze_others,
    "as_many_others": _swap_company,
    "evaluated": lambda model, half: model.blocks[2:].eval(),
    "projected": _step_and_project,
}


@pytest.mark.parametrize("exact", [False, True], ids=["series", "exact"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("checkpointed", [False, True], ids=["plain", "checkpoint"])
@pytest.mark.parametrize("happens", MEANWHILE.values(), ids=MEANWHILE)
def test_others_may_change_between_a_forward_and_its_backward(
    happens: Callable[[Blocks, Tensor], object], checkpointed: bool, dtype: torch.dtype, exact: bool
) -> None:
    found = []
    for shared in (True, False):
        model = _blocks(shared, max_angle=30.0, use_cayley_neumann=not exact).to(dtype)
        model.blocks[3].requires_grad_(happens is not _swap_company)
        x = torch.ones(5, 8, dtype=dtype)
        half: Any = checkpoint(model.run, x, 0, 1, use_reentrant=False) if checkpointed else model.run(x, 0, 1)
        happens(model, half)
        model.zero_grad()
        model.run(half, 2, 3).square().sum().backward()
        found.append(gradients(model))
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("large", [2**19, 0], ids=["kept", "computed_again"])
def test_a_gradient_with_a_graph_leaves_the_others_theirs(large: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(functional.maps, "_LARGE", large)
    found = []
    for shared in (True, False):
        model, x = _blocks(shared), torch.ones(5, 8)
        half = model.run(x, 0, 1)
        rest = model.run(half.detach(), 2, 3)
        first = torch.autograd.grad(half.sum(), _weights(model, 0, 1), create_graph=True, retain_graph=False)
        rest.square().sum().backward()
        model.run(x, 3, 2).square().sum().backward()
        found.append((first, gradients(model)))
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("exact", [False, True], ids=["series", "exact"])
def test_what_a_checkpoint_computes_again_is_of_the_generators_as_they_are(
    exact: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(functional.products, "_SMALL_ON_CPU", 0)
    found = []
    for twice in (True, False):
        model, x = _blocks(use_cayley_neumann=not exact).bfloat16(), torch.ones(5, 8).bfloat16().requires_grad_()
        loss = checkpoint(model.run, x, use_reentrant=False).float().sum()  # type: ignore[union-attr]
        if twice:
            torch.autograd.grad(loss, x, retain_graph=True)
        with torch.no_grad():
            for weight in _weights(model, 0, 1, 2, 3):
                weight.mul_(3)
        loss.backward()
        found.append(gradients(model))
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)


def test_a_generator_and_a_discriminator_are_not_in_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """One may train, and its graph be gone, before the other's backward."""
    model = nn.ModuleDict({name: Blocks(2) for name in ("generator", "discriminator")})
    inject(model, config(target_modules="all-linear"))
    sizes = computed_maps(monkeypatch)
    fake = model["generator"].run(torch.ones(5, 8))
    trained = [weight for name, weight in model["discriminator"].named_parameters() if "oft_R" in name]
    torch.autograd.backward(model["discriminator"].run(fake).sum(), inputs=trained)
    model["discriminator"].run(fake).sum().backward()
    assert sizes == [4, 4, 4]


@pytest.mark.parametrize("ways", ["register_hook", "register_post_accumulate_grad_hook"])
def test_nobody_is_called_for_layers_that_are_in_no_graph(ways: str) -> None:
    model, called = _blocks(), []
    for name, rotation in rotations(model).items():
        getattr(rotation.weight, ways)(lambda _, name=name: called.append(name))
    model.run(torch.ones(5, 8), 0, 1).sum().backward()
    assert sorted(called) == ["blocks.0.a", "blocks.0.b", "blocks.1.a", "blocks.1.b"]


def test_threads_share_no_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x, sizes = _blocks(), torch.ones(5, 8), computed_maps(monkeypatch)
    half = model.run(x, 0, 1)
    thread = threading.Thread(target=lambda: model.run(x, 2, 3))
    thread.start()
    thread.join()
    assert sizes == [8, 4]
    model.run(half, 2, 3)
    assert sizes == [8, 4, 4]


def _left_waiting(model: Blocks) -> object:
    return model.run(torch.ones(5, 8), 0, 1)


def _broken_off(model: Blocks) -> None:
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        model.run(torch.ones(5, 8), 0, 1)[:, :3] @ model.blocks[2]["a"].weight  # type: ignore[index]


def _beside_a_state(model: Blocks) -> object:
    """Memory that another tensor has too."""
    return model.state_dict(), model.run(torch.ones(5, 8), 0, 1)


@pytest.mark.parametrize("before", [_left_waiting, _broken_off, _beside_a_state])
def test_what_waits_is_of_the_generators_as_they_are(before: Callable[[Blocks], object]) -> None:
    """Also where they were changed past autograd's count, as `weight.data.copy_` does."""
    model, apart, x = _blocks(), _blocks(shared=False), torch.ones(5, 8)
    held = before(model)
    for one in (model, apart):
        for weight in _weights(one, 2, 3):
            weight.data.mul_(3)
    del held
    torch.testing.assert_close(model.run(x, 2, 3), apart.run(x, 2, 3))


class _Slots:
    """What nobody can refer to loosely."""

    __slots__ = ()

    def __call__(self, tensor: Tensor) -> Tensor:
        return tensor


@pytest.mark.parametrize("hook", [torch.Tensor.clone, _Slots()], ids=["method", "slots"])
def test_whatever_packs_what_is_kept(hook: Any) -> None:
    model, apart, x = _blocks(), _blocks(shared=False), torch.ones(5, 8)
    with saved_tensors_hooks(hook, hook):
        y = model.run(x)
    y.sum().backward()
    apart.run(x).sum().backward()
    torch.testing.assert_close(gradients(model), gradients(apart), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_inference_mode_records_nothing_whatever_is_enabled_within(training: bool) -> None:
    model = _blocks().train(training)
    for x in (torch.ones(5, 8), torch.ones(100, 8)):  # of many rows the weight is rotated
        expected = model.run(x)
        with torch.inference_mode(), torch.enable_grad():
            torch.testing.assert_close(model.run(x), expected)
        torch.testing.assert_close(model.run(x), expected)


FAULTS = """
import resource
import torch
from torch import nn
from lightning_oft import OFTConfig, inject
with torch.device("meta"):
    inject(nn.Sequential(nn.Linear(8, 8)), OFTConfig(oft_block_size=4, target_modules="all-linear"))
def step():
    matrices = [torch.ones(2_000_000) for _ in range(6)]
for _ in range(3):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.subprocess
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other libraries for C keep memory in other ways")
def test_the_matrices_of_a_step_get_the_memory_of_those_before() -> None:
    """Large pages, where a machine always has them, would hide it."""
    env = {
        key: value
        for key, value in os.environ.items()
        if not key.startswith(("MALLOC_", "GLIBC_TUNABLES", "LD_PRELOAD"))
    }
    done = subprocess.run([sys.executable, "-c", FAULTS], env=env, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 1000
