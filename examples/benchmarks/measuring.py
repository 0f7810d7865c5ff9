"""Clocks, counts and bytes for the benchmark of `python examples/benchmarks/speed.py`; no model is known here."""

from __future__ import annotations

import contextlib
import gc
import platform
import random
import statistics
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Cycle = dict[str, Callable[[], object]]
"""Phases of one variant, run in this order in every round; one whose name starts with _ is run and not timed."""
Samples = dict[str, dict[str, list[float]]]
"""Seconds of every counted round, by phase and variant."""


@dataclass(frozen=True)
class Clock:
    """What is read, with how many threads; a GPU is waited for."""

    name: str
    threads: int
    read: Callable[[], float]
    device: str = "cpu"

    def now(self) -> float:
        """The reading, once everything before it is done."""
        if self.device == "cuda":
            torch.cuda.synchronize()
        return self.read()


def clocks(device: str, threads: int) -> list[Clock]:
    """CPU time of one thread (a busy machine moves it little) and wall time of several; on a GPU wall time alone."""
    wall = Clock(f"wall, {threads} threads", threads, time.perf_counter, device)
    return [wall] if device == "cuda" else [Clock("CPU, 1 thread", 1, time.process_time), wall]


@dataclass(frozen=True)
class Effort:
    """How long one measurement may take: rounds are added until `seconds` are over, `least` to `most` of them."""

    seconds: float = 15.0
    least: int = 3
    most: int = 15


def interleave(cycles: dict[str, Cycle], clock: Clock, effort: Effort) -> Samples:
    """Run all variants round by round. A round of warming up is not counted.

    Each round has an order of its own, by chance: what runs before changes the state of caches and of memory."""
    found: Samples = {}
    names, order = list(cycles), random.Random(0)
    with threads(clock.threads), no_collector():
        started = time.perf_counter()
        for number in range(effort.most + 1):
            if number > effort.least and time.perf_counter() - started > effort.seconds:
                break
            gc.collect()
            for name in order.sample(names, len(names)):
                for phase, action in cycles[name].items():
                    before = clock.now()
                    action()
                    taken = clock.now() - before
                    if number and not phase.startswith("_"):
                        found.setdefault(phase, {}).setdefault(name, []).append(taken)
    return {phase: {name: row[name] for name in names if name in row} for phase, row in found.items()}


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def no_collector() -> Iterator[None]:
    """Python's collector runs between rounds, not inside one."""
    enabled = gc.isenabled()
    gc.disable()
    gc.freeze()  # what was there before is not looked through again every round
    try:
        yield
    finally:
        gc.unfreeze()
        if enabled:
            gc.enable()


def quartiles(values: list[float]) -> tuple[float, float, float]:
    """First quartile, median, third quartile; of fewer than four values the extremes stand for the quartiles."""
    if len(values) < 4:
        return min(values), statistics.median(values), max(values)
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


class OperatorCount(TorchDispatchMode):
    """Counts the operators that reach a device; views and bare allocation do no work and are left out."""

    def __init__(self) -> None:
        super().__init__()
        self.operators: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if not (func.is_view or name in FREE or name.startswith(("empty", "new_empty"))):
            self.operators[name] = self.operators.get(name, 0) + 1
        return func(*args, **(kwargs or {}))

    @property
    def total(self) -> int:
        """All of them together."""
        return sum(self.operators.values())


FREE = ("_unsafe_view", "_reshape_alias", "detach", "alias", "lift_fresh")
"""Views that the schema does not call so."""


def count_operators(action: Callable[[], object]) -> int:
    """Operators of an action, of its second run: the first may fill caches."""
    action()
    with OperatorCount() as counted:
        action()
    return counted.total


class LiveBytes(TorchDispatchMode):
    """Bytes alive more than at the start: what came into being inside, less what was there and went; `peak` the most."""

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._sizes: dict[int, int] = {}
        for tensor in known:
            self._see(tensor, counted=False)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for leaf in tree_leaves((args, kwargs or {})):
            self._see(leaf, counted=False)  # was there before
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            self._see(leaf, counted=True)
        return out

    def _see(self, value: object, counted: bool) -> None:
        if not isinstance(value, Tensor):
            return
        storage = value.untyped_storage()
        if storage._cdata not in self._sizes:
            self._sizes[storage._cdata] = storage.nbytes()
            self.now += storage.nbytes() if counted else 0
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._drop, storage._cdata)  # an address is used again

    def _drop(self, identity: int) -> None:
        self.now -= self._sizes.pop(identity)


def kept_bytes(forward: Callable[[], Tensor], left_out: Iterable[Tensor]) -> int:
    """Bytes that autograd's graph keeps for the backward pass, each storage once; `left_out` are parameters, inputs."""
    own = {tensor.untyped_storage().data_ptr() for tensor in left_out}
    kept: dict[int, Tensor] = {}  # the tensors themselves, so that no address is used twice

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            kept.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = forward()
    size = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    del loss
    return size


def tensors_of(model: nn.Module) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]


def device_name(device: str) -> str:
    """A GPU's name, or the processor's with its number of cores."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    count = f"{torch.get_num_threads()} threads by default, {torch.backends.cpu.get_cpu_capability()}"
    return f"{names[0] if names else platform.processor() or platform.machine()} ({count})"
