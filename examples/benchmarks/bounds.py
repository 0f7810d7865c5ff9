"""What the figures of `python examples/benchmarks/speed.py --list` are held to."""

from __future__ import annotations

import fnmatch
import math
import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from measuring import quartiles
from models import BASE, LORA, OFT, OFT_EXACT, OURS, OURS_EXACT
from report import Row, number, table

Figures = dict[str, float]
SIGNS = {"<=": operator.le, "<": operator.lt, ">=": operator.ge}


@dataclass(frozen=True)
class Bound:
    """A figure made of one row's medians, and the limit it is held to; `model` and `what` are patterns."""

    item: int
    model: str
    what: str
    says: str
    figure: Callable[[Figures], float]
    sign: str
    limit: float
    dtype: str = "float32"

    def matches(self, row: Row) -> bool:
        """Whether the bound is for this row; the list is about the CPU."""
        found = fnmatch.fnmatchcase(row.model, self.model) and fnmatch.fnmatchcase(row.what, self.what)
        return found and row.dtype == self.dtype and row.device == "cpu"

    def rounded(self, value: float) -> str:
        """Against us: a figure that must be small is rounded up, one that must be large is rounded down."""
        scale = 10 ** (3 - max(0, math.floor(math.log10(abs(value))))) if value else 1
        towards = math.floor if self.sign == ">=" else math.ceil
        return f"{towards(value * scale) / scale:,.10g}"


def over(one: str, other: str) -> Callable[[Figures], float]:
    return lambda row: row[one] / row[other]


def above(one: str, other: str) -> Callable[[Figures], float]:
    return lambda row: row[one] - row[other]


def alone(name: str) -> Callable[[Figures], float]:
    return lambda row: row[name]


def behind_lora(row: Figures) -> float:
    return (row[OURS] - row[LORA]) / row[BASE]


def kept_against_oft(row: Figures) -> float:
    return (row[OURS] - row[BASE]) / (row[OFT] - row[BASE])


def kept_against_oft_exact(row: Figures) -> float:
    return (row[OURS_EXACT] - row[BASE]) / (row[OFT_EXACT] - row[BASE])


STEP = "training step, {}"
TRAINING = [
    Bound(2, "Llama 768 x 4", STEP.format("2 x 512"), "ours / limit", over(OURS, BASE), "<=", 1.12),
    Bound(2, "Llama 768 x 4", STEP.format("2 x 512"), "(ours - LoRA) / limit", behind_lora, "<=", 0.03),
    Bound(2, "Llama 768 x 4", STEP.format("2 x 64"), "ours / limit", over(OURS, BASE), "<=", 1.25),
    Bound(2, "Llama 768 x 4", STEP.format("2 x 64"), "ours / PEFT OFT", over(OURS, OFT), "<", 1.0),
    Bound(2, "Llama 768 x 4", STEP.format("8 x 1024"), "ours / limit", over(OURS, BASE), "<=", 1.08),
    Bound(2, "Llama 768 x 4", STEP.format("8 x 1024"), "ours / LoRA", over(OURS, LORA), "<=", 1.0),
    Bound(2, "Llama 2048 x *", STEP.format("*"), "ours / LoRA", over(OURS, LORA), "<=", 1.0),
]
OPERATORS = [
    Bound(1, "Llama *", f"operators above the limit, {what}", f"{name} per linear", alone(name), "<=", limit)
    for what, limit in (("training step*", 10.0), ("forward without gradient", 2.0))
    for name in (OURS, OURS_EXACT)
]
GENERATION = [
    Bound(3, "Llama 768 x *", "generated token, unmerged", "ours / base", over(OURS, BASE), "<=", 1.10),
    Bound(3, "Llama 768 x *", "generated token, merged", "ours / base", over(OURS, BASE), "<=", 1.0),
    Bound(3, "Llama 768 x *", "operators above the limit, merged token", "ours per linear", alone(OURS), "<=", 0.0),
    Bound(3, "Llama 768 x *", "entering and leaving*", "ours / ten tokens", over(OURS, BASE), "<", 1.0),
]
MERGING = [
    Bound(4, "linear 4096", f"{what}, base {kept}", f"{other} / {name}", over(other, name), ">=", limit)
    for what, limit in (("merge", 20.0), ("unmerge", 50.0))
    for kept in ("not kept", "kept")
    for name, other in ((OURS, OFT), (OURS_EXACT, OFT_EXACT))
]
MEMORY = [
    Bound(4, "linear 4096", "extra memory, merge, base not kept", "ours in weights", alone(OURS), "<", 1.0),
    *(
        Bound(5, "Llama *", "kept for backward*", f"above base, {name} / PEFT's", figure, "<=", 1.0, dtype)
        for dtype in ("float32", "bfloat16")
        for name, figure in ((OURS, kept_against_oft), (OURS_EXACT, kept_against_oft_exact))
    ),
    Bound(5, "Llama 4096 x 1", "kept*, 2 x 512", "ours above base, kB", above(OURS, BASE), "<=", 40.0, "bfloat16"),
]
REST = [
    Bound(6, "UNet * attention", STEP.format("*"), "ours / limit", over(OURS, BASE), "<=", 1.15),
    Bound(6, "UNet * convolutions", STEP.format("*"), "ours / limit", over(OURS, BASE), "<=", 1.5),
    Bound(7, "2,000 linears on meta", "inject", "ours, ms", alone(OURS), "<", 2000.0),
    Bound(7, "1,000 linears", "save", "ours, ms", alone(OURS), "<", 1000.0),
    Bound(7, "1,000 linears", "load", "ours, ms", alone(OURS), "<", 1000.0),
]
BOUNDS = (*OPERATORS, *TRAINING, *GENERATION, *MERGING, *MEMORY, *REST)


def listed(rows: Sequence[Row]) -> str:
    """A line for each bound and row it holds for: the ratio of medians, its quartiles by round, and whether it holds."""
    head = ["item", "model", "measured", "read as", "figure", "by round", "bound", "holds"]
    return table(head, [line for bound in BOUNDS for line in _lines(bound, rows)])


def _lines(bound: Bound, rows: Sequence[Row]) -> Iterator[list[str]]:
    limit = f"{bound.sign} {bound.limit:,g}"
    found = False
    for row in filter(bound.matches, rows):
        try:
            value = bound.figure(row.medians())
        except KeyError:  # a column is left out, PEFT's where it is not installed
            continue
        found = True
        spread = " to ".join(number(each) for each in _spread(bound, row))
        holds = "yes" if SIGNS[bound.sign](value, bound.limit) else "NO"
        figure = f"{bound.says}: {bound.rounded(value)}"
        yield [str(bound.item), row.model, row.what, f"{row.clock} {row.dtype}", figure, spread, limit, holds]
    if not found:
        yield [str(bound.item), bound.model, bound.what, bound.dtype, bound.says, "", limit, "not measured"]


def _spread(bound: Bound, row: Row) -> list[float]:
    """Quartiles of the figure of every round; rounds are interleaved, so each is a comparison of its own."""
    count = min(len(found) for found in row.values.values())
    if count < 2:
        return []
    by_round = [bound.figure({name: found[i] for name, found in row.values.items()}) for i in range(count)]
    low, _, high = quartiles(by_round)
    return [low, high]
