"""Feed damaged adapter directories and configuration files to their readers.

    python tools/fuzz/readers.py --adapters 10000 --yaml 500 --seed 0

Every case either loads, and leaves finite weights, or is refused by the library's own error: one printable line that
names the file, with the model as it was. Anything else is a finding, printed with the command that repeats it
(`--only N`), and makes the exit code 1. Equal seeds give equal cases.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).parents[1]))
    __package__ = "fuzz"

from fuzz.mutations import CONFIG, TENSORS, Files, mutated

from lightning_oft import OFTConfig, inject, load_adapter, merge, oft_layers, save_adapter
from lightning_oft.formats import AdapterFileError

TIME_LIMIT = 10.0
"""Seconds that one case may take."""
MEMORY_LIMIT = 512
"""MiB that the process may grow by."""


@dataclass
class Report:
    """What became of the cases."""

    outcomes: Counter[str] = field(default_factory=Counter)
    findings: list[str] = field(default_factory=list)
    slowest: tuple[float, str] = (0.0, "none")

    def add(self, name: str, outcome: str, seconds: float) -> None:
        """Count one case."""
        self.outcomes[outcome] += 1
        self.slowest = max(self.slowest, (seconds, name))


class TooSlow(BaseException):
    """A case took longer than TIME_LIMIT."""


class Wrong(Exception):
    """A case ended in a way that it must not."""


@contextmanager
def _limited() -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise TooSlow(f"longer than {TIME_LIMIT} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, TIME_LIMIT)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


class Net(nn.Module):
    """A linear layer, an attention, an embedding, a convolution, a norm and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(5, 8)
        self.body = nn.Linear(8, 8)
        self.attention = nn.MultiheadAttention(8, 2)
        self.patch = nn.Conv1d(4, 4, 2)
        self.norm = nn.BatchNorm1d(8)
        self.head = nn.Linear(8, 3)


def _saved(directory: Path, **options: Any) -> Files:
    net = Net()
    inject(net, OFTConfig(**{"oft_block_size": 4, "target_modules": ["body"], **options}))
    for layer in oft_layers(net).values():
        for parameter in layer.oft_R.parameters():  # type: ignore[union-attr]
            parameter.data.normal_(std=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        save_adapter(net, directory)
    return {name: (directory / name).read_bytes() for name in (CONFIG, TENSORS)}


def originals() -> list[Files]:
    """Undamaged adapter directories of several kinds; the last two as PEFT would have written them."""
    every = ["words", "body", "attention", "patch"]
    with tempfile.TemporaryDirectory() as root:
        made = [
            _saved(Path(root) / "plain", modules_to_save=["head", "norm"]),
            _saved(Path(root) / "every", target_modules=every, bias="all"),
            _saved(
                Path(root) / "exact",
                use_cayley_neumann=False,
                coft=True,
                target_modules=every,
                modules_to_save=["head"],
            ),
            _saved(Path(root) / "shared", block_share=True, bias="oft_only", max_angle=10.0),
        ]
    theirs = json.dumps({key: v for key, v in json.loads(made[0][CONFIG]).items() if key != "lightning_oft"})
    coft = theirs.replace('"coft": false', '"coft": true')
    return [*made, {**made[0], CONFIG: theirs.encode()}, {**made[0], CONFIG: coft.encode()}]


def _check_message(text: str, place: str) -> None:
    """Raise Wrong unless a message is one line that can be printed, not too long, and names the place."""
    if not text.replace(place, "").isprintable() or not 20 < len(text) < 1500 or place not in text:
        raise Wrong(f"message {text[:300]!r}")


def _check_finite(net: nn.Module, when: str) -> None:
    broken = [name for name, t in net.state_dict().items() if t.is_floating_point() and not bool(t.isfinite().all())]
    if broken:
        raise Wrong(f"{when}: {broken} not finite")


def load(directory: Path) -> str:
    """Load a directory into a small model; returns the outcome. Raises where the library fails its promise."""
    torch.manual_seed(0)
    net = Net()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            load_adapter(net, directory, ignore_mismatched_base=True)  # each original is of a net of its own
    except AdapterFileError as error:
        _check_message(str(error), str(directory))
        after = net.state_dict()
        if list(after) != list(before) or not all(torch.equal(after[name], before[name]) for name in before):
            raise Wrong("refused, and the model is changed") from error
        if oft_layers(net) or not all(parameter.requires_grad for parameter in net.parameters()):
            raise Wrong("refused, and the model is adapted") from error
        return "refused"
    for warning in said:
        _check_message(str(warning.message), str(directory))
    _check_finite(net, "loaded")
    try:
        merge(net)
    except ValueError as error:  # generators so large that the weights overflow
        if "overflows" not in str(error):
            raise
        return "loaded, too large to merge"
    _check_finite(net, "merged")
    return "loaded"


def _place(files: Files, directory: Path) -> None:
    for name in (CONFIG, TENSORS):
        (directory / name).unlink(missing_ok=True)
        if name in files:
            (directory / name).write_bytes(files[name])


def fuzz_adapters(count: int, seed: int, report: Report, only: int | None = None) -> None:
    """Damage `count` adapter directories and load each."""
    kinds = originals()
    with tempfile.TemporaryDirectory() as root:
        for index in range(count):
            if only is not None and index != only:
                continue
            rng = random.Random(f"adapter {seed} {index}")
            files, done = mutated(rng.choice(kinds), rng)
            _place(files, Path(root))
            _case(report, f"adapter {index} ({', '.join(done)})", lambda: load(Path(root)))
            _progress(report, "adapters", index, count)


def fuzz_yaml(count: int, seed: int, report: Report, only: int | None = None) -> None:
    """Damage `count` configuration files and read each with the command line's parser, built once."""
    import yaml
    from fuzz import yaml_mutations

    config = yaml.safe_load(yaml_mutations.CONFIG.read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory() as root:
        file = Path(root) / "config.yaml"
        for index in range(count):
            if only is not None and index != only:
                continue
            content, done = yaml_mutations.mutated(config, random.Random(f"yaml {seed} {index}"))
            file.write_bytes(content)
            _case(report, f"yaml {index} ({', '.join(done)})", lambda: _read_yaml(file))
            _progress(report, "yaml files", index, count)


def _read_yaml(file: Path) -> str:
    from fuzz import yaml_mutations

    from lightning_oft.cli.errors import UserError, one_line

    try:
        yaml_mutations.read(file)
    except UserError as error:
        text = one_line(error)
        if not text.isprintable() or not 10 < len(text) < 1500:
            raise Wrong(f"message {text[:300]!r}") from error
        return "refused"
    return "read"


def _case(report: Report, name: str, run: Callable[[], str]) -> None:
    started = time.perf_counter()
    try:
        with _limited():
            outcome = run()
    except (Exception, SystemExit, TooSlow) as error:
        outcome = f"FINDING {type(error).__name__}"
        frames = traceback.extract_tb(error.__traceback__)[-3:]
        where = " < ".join(f"{Path(frame.filename).name}:{frame.lineno}" for frame in reversed(frames))
        report.findings.append(f"{name}: {type(error).__name__}: {str(error)[:300]!r} at {where}")
        print(report.findings[-1], flush=True)
    report.add(name, outcome, time.perf_counter() - started)


def _progress(report: Report, what: str, index: int, count: int) -> None:
    if (index + 1) % 1000 == 0 or index + 1 == count:
        print(f"{index + 1} of {count} {what}: {dict(report.outcomes)}", flush=True)


def memory() -> float:
    """The most memory this process has had, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main(arguments: list[str] | None = None) -> int:
    """Run, print one summary line, and return 1 if anything was found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--adapters", type=int, default=10_000)
    parser.add_argument("--yaml", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="the one case to run, by its number")
    options = parser.parse_args(arguments)
    started, findings, summary = time.perf_counter(), 0, []
    for what, fuzz, count in (("adapters", fuzz_adapters, options.adapters), ("yaml", fuzz_yaml, options.yaml)):
        if not count:
            continue
        fuzz(1, 0, Report())  # what is imported and built once is no part of the increase
        before, report = memory(), Report()
        fuzz(count, options.seed, report, options.only)
        grown = memory() - before
        findings += len(report.findings) + (grown > MEMORY_LIMIT)
        seconds, slowest = report.slowest
        counts = ", ".join(f"{number} {outcome}" for outcome, number in report.outcomes.most_common())
        summary.append(f"{what}: {counts}; slowest {seconds:.2f} s ({slowest}); memory +{grown:.0f} MiB")
    print(f"seed {options.seed}, {time.perf_counter() - started:.0f} s | {' | '.join(summary)} | findings: {findings}")
    return int(findings > 0)


if __name__ == "__main__":
    sys.exit(main())
