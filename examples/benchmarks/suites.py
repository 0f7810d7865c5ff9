"""The measurements of `python examples/benchmarks/speed.py`, each giving rows of the table."""

from __future__ import annotations

import copy
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from measuring import Clock, Cycle, Effort, LiveBytes, clocks, count_operators, interleave, kept_bytes, tensors_of
from models import BASE, CHOSEN, OURS, Case, Targets, adapt, adapted_layers, build
from report import Row
from torch import nn

from lightning_oft import load_adapter, merge, merged, save_adapter, unmerge

TOKENS = 4
"""Tokens generated in one go; figures are for one of them. Few, and four times as many rounds, since a machine's speed
changes within seconds."""


@dataclass(frozen=True)
class Setup:
    """What is the same for all measurements of a run."""

    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    names: tuple[str, ...] = CHOSEN
    block_size: int = 32
    threads: int = 2
    effort: Effort = field(default_factory=Effort)

    def clocks(self) -> list[Clock]:
        """Those of the device."""
        return clocks(self.device, self.threads)

    def eager(self) -> list[str]:
        """The variants that are not compiled."""
        return [name for name in self.names if not name.endswith("compiled")]

    def row(self, model: str, what: str, clock: str, unit: str, values: dict[str, Any], scale: float = 1.0) -> Row:
        """A row of this device and number format."""
        lists = {name: value if isinstance(value, list) else [value] for name, value in values.items()}
        scaled = {name: [scale * each for each in value] for name, value in lists.items()}
        return Row(model, what, clock, unit, scaled, self.device, str(self.dtype).removeprefix("torch."))

    def timed(self, model: str, cycles: dict[str, Cycle], what: str = "{}", scale: float = 1000.0) -> Iterator[Row]:
        """A row for every phase and clock; milliseconds unless scaled otherwise."""
        for clock in self.clocks():
            for phase, values in interleave(cycles, clock, self.effort).items():
                yield self.row(model, what.format(phase), clock.name, "ms", values, scale)


def training(case: Case, setup: Setup, size: str) -> Iterator[Row]:
    """Forward and backward, no optimizer."""
    models = build(case.base, setup.names, case.targets, setup.block_size)
    cycles: dict[str, Cycle] = {
        name: {"training step": partial(case.step, model), "_clear": partial(case.clear, model)}
        for name, model in models.items()
    }
    for name, model in models.items():
        _check_gradients(case, name, model)
    yield from setup.timed(case.name, cycles, what=f"{{}}, {size}")


def _check_gradients(case: Case, name: str, model: nn.Module) -> None:
    """An adapter that is left out would look fast."""
    case.step(model)
    if any(tensor.grad is None for tensor in model.parameters() if tensor.requires_grad):
        raise RuntimeError(f"{case.name}, {name}: a step gave a trainable parameter no gradient; nothing was measured")
    case.clear(model)


def operators(case: Case, setup: Setup, size: str) -> Iterator[Row]:
    """Operators per adapted layer above the frozen base: figures that no clock moves."""
    models = build(case.base, setup.eager(), case.targets, setup.block_size)

    def step(model: nn.Module) -> None:
        case.clear(model)
        case.step(model)

    @torch.no_grad()
    def forward(model: nn.Module) -> None:
        case.loss(model)

    for what, action, train in ((f"training step, {size}", step, True), ("forward without gradient", forward, False)):
        counts = {name: count_operators(partial(action, model.train(train))) for name, model in models.items()}
        yield _above_base(case.name, f"operators above the limit, {what}", counts, models, setup)


def _above_base(
    title: str, what: str, counts: dict[str, int], models: dict[str, nn.Module], setup: Setup, layers: int | None = None
) -> Row:
    layers = layers or adapted_layers(models[OURS])
    values = {name: (count - counts[BASE]) / layers for name, count in counts.items()}
    return setup.row(title, what, "count", "per adapted layer", values)


def kept(case: Case, setup: Setup, size: str) -> Iterator[Row]:
    """Bytes a token that wait for the backward pass, by autograd's hooks and by what is alive after the forward."""
    models = build(case.base, setup.eager(), case.targets, setup.block_size)
    saved, alive = {}, {}
    for name, model in models.items():
        case.loss(model)  # fills what is kept from step to step
        known = [*tensors_of(model), *case.inputs]
        saved[name] = kept_bytes(partial(case.loss, model), known) / case.tokens
        with LiveBytes(known) as live:
            loss = case.loss(model)
            alive[name] = live.now / case.tokens
            del loss
    yield setup.row(case.name, f"kept for backward, {size}", "saved tensors", "kB a token", saved, 1e-3)
    yield setup.row(case.name, f"alive after forward, {size}", "live tensors", "kB a token", alive, 1e-3)


def generation(case: Case, setup: Setup) -> Iterator[Row]:
    """One more token at batch 1 with a key-value cache, unmerged and merged."""
    unmerged = build(case.base, setup.eager(), case.targets, setup.block_size)
    yield from _tokens(case.name, "generated token, unmerged", unmerged, setup)
    models = build(case.base, setup.eager(), case.targets, setup.block_size, share=False)
    layers = adapted_layers(models[OURS])
    with ExitStack() as stack:
        for name, model in models.items():
            _enter(stack, name, model)
        yield from _tokens(case.name, "generated token, merged", models, setup)
        counts = {name: count_operators(partial(_generate, model, setup.device, 1)) for name, model in models.items()}
        yield _above_base(case.name, "operators above the limit, merged token", counts, models, setup, layers)
    yield from _entering(case.name, models, setup)


def _entering(title: str, models: dict[str, nn.Module], setup: Setup) -> Iterator[Row]:
    def enter_and_leave(model: nn.Module) -> None:
        with merged(model):
            pass

    what = "entering and leaving `merged`, against ten tokens of the base"
    cycles: dict[str, Cycle] = {BASE: {what: partial(_generate, models[BASE].eval(), setup.device, 10)}}
    ours = [name for name in models if name.startswith(OURS)]
    cycles |= {name: {what: partial(enter_and_leave, models[name])} for name in ours}
    yield from setup.timed(title, cycles)


def _enter(stack: ExitStack, name: str, model: Any) -> None:
    if name.startswith("PEFT"):
        model.merge_adapter()
    elif name.startswith(OURS):
        stack.enter_context(merged(model))


def _tokens(title: str, what: str, models: dict[str, nn.Module], setup: Setup) -> Iterator[Row]:
    cycles: dict[str, Cycle] = {
        name: {what: partial(_generate, model.eval(), setup.device)} for name, model in models.items()
    }
    often = replace(setup, effort=replace(setup.effort, most=4 * setup.effort.most))
    yield from often.timed(title, cycles, scale=1000.0 / TOKENS)


@torch.no_grad()
def _generate(model: Any, device: str, count: int = TOKENS) -> None:
    cache, token = None, torch.ones(1, 1, dtype=torch.int64, device=device)
    for _ in range(count):
        output = model(input_ids=token, past_key_values=cache, use_cache=True)
        cache, token = output.past_key_values, output.logits[:, -1:].argmax(-1)


def merging(title: str, base: nn.Module, targets: Targets, setup: Setup) -> Iterator[Row]:
    """Folding the adapter into the weights and taking it out again. PEFT keeps no base: both rows show its one."""
    names = [name for name in setup.eager() if name != BASE]
    models: dict[str, Any] = build(base, names, targets, setup.block_size, share=False)
    cycles: dict[str, Cycle] = {}
    for name, model in models.items():
        if name.startswith("PEFT"):
            cycles[name] = {"merge": model.merge_adapter, "unmerge": model.unmerge_adapter}
            continue
        cycles[name] = {}
        for how, keep in (("not kept", "never"), ("kept", "always")):
            cycles[name][f"merge, base {how}"] = partial(merge, model, keep_base=keep)  # type: ignore[arg-type]
            cycles[name][f"unmerge, base {how}"] = partial(unmerge, model)
    for clock in setup.clocks():
        found = interleave(cycles, clock, setup.effort)
        for phase in ("merge", "unmerge"):
            for how in ("not kept", "kept"):
                values = found.get(phase, {}) | found[f"{phase}, base {how}"]
                yield setup.row(title, f"{phase}, base {how}", clock.name, "ms", values, 1000.0)
    yield from _merge_memory(title, models, setup)


def _merge_memory(title: str, models: dict[str, Any], setup: Setup) -> Iterator[Row]:
    """The most that merging holds at a time beyond what was there; in sizes of the largest weight."""
    peaks = {}
    for name, model in models.items():
        largest = max(tensor.nbytes for tensor in tensors_of(model))
        with LiveBytes(tensors_of(model)) as live:
            model.merge_adapter() if name.startswith("PEFT") else merge(model, keep_base="never")
        peaks[name] = live.peak / largest
    yield setup.row(title, "extra memory, merge, base not kept", "live tensors", "largest weights", peaks)


def injecting(title: str, base: nn.Module, targets: Targets, setup: Setup) -> Iterator[Row]:
    """Putting the adapter in, into a fresh copy each time."""
    names = [name for name in setup.eager() if name != BASE and "exact" not in name]
    cycles = {}
    for name in names:
        fresh, take = _fresh(base)
        cycles[name] = {"_copy": fresh, "inject": partial(_adapt, take, name, targets, setup.block_size)}
    yield from setup.timed(title, cycles)


def _fresh(base: nn.Module) -> tuple[Callable[[], object], Callable[[], nn.Module]]:
    """Two actions: copy the base, sharing its weights; take the copy."""
    copies: list[nn.Module] = []

    def fresh() -> None:
        copies.append(copy.deepcopy(base, {id(tensor): tensor for tensor in tensors_of(base)}))

    return fresh, copies.pop


def _adapt(take: Callable[[], nn.Module], name: str, targets: Targets, block_size: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapt(take(), name, targets, block_size)


def files(title: str, base: nn.Module, targets: Targets, setup: Setup) -> Iterator[Row]:
    """Saving the adapter, and loading it into a model that has none yet."""
    names = [name for name in setup.eager() if name != BASE and "exact" not in name]
    with tempfile.TemporaryDirectory() as root:
        cycles: dict[str, Cycle] = {}
        for name, model in build(base, names, targets, setup.block_size).items():
            place = Path(root) / name.replace(" ", "-")
            fresh, take = _fresh(base)
            save, load = partial(_save, model, place), partial(_load, take, place)
            cycles[name] = {"save": save, "_copy": fresh, "load": load}
        yield from setup.timed(title, cycles)


def _save(model: Any, place: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT looks for the base's name, and there is none
        model.save_pretrained(place) if hasattr(model, "merge_adapter") else save_adapter(model, place)


def _load(take: Callable[[], nn.Module], place: Path) -> None:
    if "PEFT" not in place.name:
        load_adapter(take(), place)
        return
    import peft

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft.PeftModel.from_pretrained(take(), place, is_trainable=True)  # type: ignore[arg-type]


def linears(count: int, width: int, device: str) -> nn.Module:
    with torch.device(device):
        return nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(count))).requires_grad_(False)
