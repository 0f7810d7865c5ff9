"""Kill a fit again and again, at any moment, and see that no file is ever torn and no result ever another.

    python tools/faults/run.py --kills 50 --seed 0

Every life starts from nothing, or where an earlier run has left an export; it is killed by SIGKILL once or twice: half
of the times by the clock, at a moment drawn uniformly from the duration of an undisturbed run, else by its own hand at
a call or return drawn uniformly from those of writing a checkpoint, writing the adapter, merging or exporting, or from
those among them that reach the file system. Each time every file under a final name is read and compared with the undisturbed run's; then the life resumes to its end.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Trainer
from safetensors.torch import load_file
from torch import Tensor

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[2] / "tests")]

from life import PHASES, Death, Phases, live, spawn

from lightning_oft.formats import read_adapter
from lightning_oft.formats.checkpoint_file import read

Tensors = dict[str, Tensor]


class Truth(NamedTuple):
    """What undisturbed runs wrote: what it ended with, and all that may stand there."""

    merged: Tensors
    exports: list[Tensors]
    adapters: list[Tensors]
    checkpoints: list[Any]
    earlier: Path
    seconds: float
    events: Counter[tuple[str, bool]]


class Finding(NamedTuple):
    """Something that should not be."""

    kind: str  # corrupt: a file that cannot be read; wrong: one that says something else, or another end of the run
    what: str


def wait(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def tensors_of_adapter(directory: Path) -> Tensors:
    state = read_adapter(directory)
    return {**state.generators(), **state.saved}


def keeping_all(save: Callable[..., None], folder: Path) -> Any:
    """The method, with a copy of everything it ever wrote."""
    folder.mkdir()

    def keep(trainer: Any, filepath: Any, *args: Any, **kwargs: Any) -> None:
        save(trainer, filepath, *args, **kwargs)
        shutil.copy(filepath, folder / f"{len(list(folder.iterdir()))}.ckpt")

    return keep


def undisturbed(root: Path, steps: bool) -> Truth:
    """Run once to the end, and once with other data and fewer epochs for an export that stands there before."""
    counts = root / "counts.pt"

    def whole() -> None:
        phases = Phases(count=True)
        Trainer.save_checkpoint = keeping_all(Trainer.save_checkpoint, root / "all")
        phases.watch()
        torch.save((live(root / "true", steps, seed=0), dict(phases.counts)), counts)

    def again() -> None:
        live(root / "again", steps, seed=0)

    def earlier() -> None:
        live(root / "earlier", steps, seed=7, epochs=1)

    for action in (whole, earlier, again):
        start = time.monotonic()
        if wait(spawn(action, root / "log.txt")):
            raise SystemExit(f"the undisturbed run failed:\n{(root / 'log.txt').read_text()}")
    seconds = time.monotonic() - start
    merged, events = torch.load(counts)
    exports = [root / name / "export" for name in ("true", "earlier")]
    return Truth(
        merged,
        [load_file(place / "merged" / "model.safetensors") for place in exports],
        [tensors_of_adapter(place / "adapter") for place in exports],
        [read(file) for file in (root / "all").iterdir()],
        exports[1],
        seconds,
        Counter(events),
    )


def same(mine: Any, theirs: Any) -> bool:
    """Whether two nests of dictionaries, lists and tensors are equal to the bit."""
    if isinstance(mine, Tensor):
        return isinstance(theirs, Tensor) and torch.equal(mine, theirs)
    if isinstance(mine, dict):
        return mine.keys() == theirs.keys() and all(same(mine[key], theirs[key]) for key in mine)
    if isinstance(mine, list | tuple):
        return len(mine) == len(theirs) and all(map(same, mine, theirs))
    return bool(mine == theirs)


def inspect(place: Path, truth: Truth) -> Iterator[Finding]:
    """Read whatever stands under a final name; hidden names are those of unfinished work."""
    for file in (place / "ckpt").glob("[!.]*"):
        try:
            found = read(file)
        except ValueError as error:
            yield Finding("corrupt", str(error))
            continue
        keys = ("global_step", "state_dict", "optimizer_states", "lr_schedulers")
        if not any(all(same(found[key], true[key]) for key in keys) for true in truth.checkpoints):
            step = [[key for key in keys if not same(found[key], true[key])] for true in truth.checkpoints]
            yield Finding("wrong", f"{file}: another state at step {found['global_step']}: {step}")
    for file in (place / "export").glob("[!.]*"):
        reader: Callable[[Path], Tensors] = tensors_of_adapter
        known = truth.adapters
        if file.name == "merged":
            reader, known = (lambda directory: load_file(directory / "model.safetensors")), truth.exports
        try:
            tensors = reader(file)
        except Exception as error:
            yield Finding("corrupt", f"{file}: {error}")
            continue
        if not any(same(tensors, true) for true in known):
            yield Finding("wrong", f"{file}: other weights")


def finish(place: Path, steps: bool, truth: Truth) -> Iterator[Finding]:
    """Resume to the end; compare all that it leaves."""
    result = place / ".result.pt"
    if wait(spawn(lambda: torch.save(live(place, steps, seed=_seed(place)), result), place / ".log.txt")):
        yield Finding("wrong", f"{place}: the resume failed:\n{(place / '.log.txt').read_text()}")
        return
    yield from inspect(place, truth)
    if not same(torch.load(result), truth.merged):
        yield Finding("wrong", f"{place}: another result")
    if not same(tensors_of_adapter(place / "export" / "adapter"), truth.adapters[0]):
        yield Finding("wrong", f"{place}: the adapter is not the last one")
    if not same(load_file(place / "export" / "merged" / "model.safetensors"), truth.exports[0]):
        yield Finding("wrong", f"{place}: the merged model is not the last one")


def _seed(place: Path) -> int:
    """A process that resumes has other random numbers of its own; one that starts again is given the same."""
    return 99 if any((place / "ckpt").glob("last*.ckpt")) else 0


def kill_once(place: Path, steps: bool, truth: Truth, rng: random.Random, phase: str | None) -> str | None:
    """Start or resume a life and kill it: by the clock where no phase is given. Returns the phase in which it died."""
    only_files = rng.random() < 0.5 and (phase, True) in truth.events
    death = None if phase is None else Death(phase, only_files, rng.randint(1, truth.events[phase, only_files]))
    phases = Phases(death)

    def action() -> None:
        phases.watch()
        live(place, steps, seed=_seed(place))

    child = spawn(action, place / ".log.txt")
    if phase is None:
        time.sleep(rng.uniform(0, truth.seconds))
        os.kill(child, signal.SIGKILL)
    code = wait(child)
    if code > 0:
        raise SystemExit(f"a life ended by itself:\n{(place / '.log.txt').read_text()}")
    return phases.now if code == -signal.SIGKILL else None


def main(argv: list[str] | None = None) -> int:
    """Returns 1 where anything was found."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    start, rng = time.monotonic(), random.Random(options.seed)
    killed: Counter[str] = Counter()
    findings: list[Finding] = []
    lives, told = 0, 0
    with tempfile.TemporaryDirectory(prefix="oft-faults-") as folder:
        if Path("/dev/shm").is_dir():  # another file system than the run's: a move from there is a copy
            tempfile.tempdir = tempfile.mkdtemp(dir="/dev/shm")
        truths = {}
        for steps in (False, True):
            (Path(folder) / str(steps)).mkdir()
            truths[steps] = undisturbed(Path(folder) / str(steps), steps)
        planned = [None if i % 2 else PHASES[1 + i // 2 % 4] for i in range(options.kills)]
        while sum(killed.values()) < options.kills:
            steps, place = bool(lives % 2), Path(folder) / f"life-{lives}"
            truth, lives = truths[steps], lives + 1
            place.mkdir()
            if rng.random() < 0.5:
                shutil.copytree(truth.earlier, place / "export")
            for _ in range(rng.choice((1, 1, 2))):
                died = kill_once(place, steps, truth, rng, planned[min(sum(killed.values()), options.kills - 1)])
                killed.update([died] if died else [])
                findings += inspect(place, truth)
            findings += finish(place, steps, truth)
            shutil.rmtree(place)
            for finding in findings[told:]:
                print(f"{finding.kind}: {finding.what}")
            told = len(findings)
            print(f"life {lives}: {sum(killed.values())} kills, {len(findings)} findings", flush=True)
        if tempfile.tempdir is not None:
            shutil.rmtree(tempfile.tempdir)
            tempfile.tempdir = None
    kinds = Counter(finding.kind for finding in findings)
    where = ", ".join(f"{killed[phase]} in {phase}" for phase in PHASES)
    seconds = time.monotonic() - start
    print(
        f"{sum(killed.values())} kills ({where}) in {lives} lives: {kinds['corrupt']} corrupt files, "
        f"{kinds['wrong']} wrong results, {seconds:.0f} s"
    )
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
