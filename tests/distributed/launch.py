"""Every run that needs several processes, from one start of Python: it imports once and forks the ranks.

python tests/distributed/launch.py OUTPUT

Writes OUTPUT/GROUP-rankN.pt for each group of processes, and OUTPUT/GROUP-rankN.log.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import traceback
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import tasks_worker
import torch
import torch.distributed as dist
import worker

CELLS = [
    ("ddp", "adapter"),
    ("fsdp2-block", "adapter"),
    ("fsdp2-block-all", "full"),
    ("fsdp2-block-distributed", "adapter"),
    ("tp", "full"),
    ("fsdp1", "adapter"),
    *([("deepspeed1", "adapter"), ("deepspeed2", "adapter")] if find_spec("deepspeed") else []),
]
"""Strategies, and what their checkpoints hold: saved in the middle of a fit, and resumed."""

FITS = [
    "ddp-bucket",
    "ddp-unused",
    "fsdp2-layer",
    "fsdp2-block-late-bf16",
    "fsdp2-block-conv1d",
    "fsdp2-block-two",
    "fsdp2-block-late-injects",
    "tp-sequence",
]
"""Further ways to cut the same model."""

CROSSED = {
    "resume:ddp:adapter:fsdp2-block": None,
    "resume:fsdp2-block:adapter:fsdp2-block-distributed": None,
    "resume:ddp:adapter:fsdp2-block-distributed": "Is a directory",
    "resume:fsdp2-block:adapter:ddp": "was written under another strategy",
}
"""Checkpoints of one strategy under another: exact, or refused."""

GUARDED = ["ddp", "fsdp2-block", "fsdp1"]
"""Where rotations leave their series while they train."""

ROUNDED = "fit:fsdp2-block-late-injects-bf16"
BYTES = ["fsdp2-layer-wide", "fsdp2-block-wide-conv1d"]
RESUMED_ALONE = [cell for cell in CELLS if cell[0] in ("ddp", "fsdp2-block-distributed", "tp")]

TEXT = ["text", "text-ddp", "dpo", "dpo-ddp", "grpo"]
EXPERTS = ["experts", "experts-fsdp1", "experts-cut"]
RECIPES = ["sft-ddp", "sft-fsdp2", *(["qoft-nf4-fsdp2"] if find_spec("bitsandbytes") else [])]
TASKS = ["vision", *TEXT, *RECIPES, "split", "recipe", *EXPERTS, "bytes", "bytes-checkpointing"]

_SAVED = [f"{action}:{strategy}:{kind}" for strategy, kind in CELLS for action in ("save", "resume")]
_MORE = [*(f"fit:{name}" for name in FITS), *(f"bytes:{name}" for name in BYTES), *CROSSED, ROUNDED]
_MORE += [f"guard:{name}" for name in GUARDED]
_TASKS = [f"task:{name}" for name in TASKS]
GROUPS: dict[str, tuple[int, list[str]]] = {
    "two": (2, [*_SAVED, *_MORE, "layers", "merged", "refusals", *_TASKS]),
    "one": (1, [*(f"resume:{strategy}:{kind}" for strategy, kind in RESUMED_ALONE), "unsharded"]),
    "four": (4, ["fit:tp-fsdp2"]),
}


class Runs(NamedTuple):
    """What `main` leaves behind: its directory, and the results of each rank by group."""

    output: Path
    two: list[dict[str, Any]]
    one: dict[str, Any]
    four: list[dict[str, Any]]
    forks: dict[str, Any]


def load_runs(output: Path) -> Runs:
    """The results of every group."""

    def load(group: str, rank: int) -> dict[str, Any]:
        found: dict[str, Any] = torch.load(output / f"{group}-rank{rank}.pt", weights_only=False)
        return found

    two, four = ([load(group, rank) for rank in range(GROUPS[group][0])] for group in ("two", "four"))
    return Runs(output, two, load("one", 0), four, load("forks", 0))


def run_rank(group: str, rank: int, port: int, output: Path) -> None:
    """The scenarios of a group on one rank, as torchrun would have started it."""
    world, scenarios = GROUPS[group]
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_PORT")
    os.environ |= dict(zip(names, map(str, (rank, rank, world, world, port)), strict=True))
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "TORCHELASTIC_RUN_ID": group}
    results: dict[str, Any] = {}
    for scenario in scenarios:
        action, _, name = scenario.partition(":")
        try:
            results[scenario] = (
                tasks_worker.run(name, output / name) if action == "task" else worker.run(scenario, output)
            )
        except Exception as error:
            results[scenario] = {"error": f"{type(error).__name__}: {error}", "trace": traceback.format_exc()}
    torch.save(results, output / f"{group}-rank{rank}.pt")
    if dist.is_initialized():
        dist.destroy_process_group()


def fork(group: str, output: Path) -> list[int]:
    """Start the processes of a group; returns their ids."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(GROUPS[group][0]):
        child = os.fork()
        if child:
            children.append(child)
            continue
        code = 1
        try:
            log = os.open(output / f"{group}-rank{rank}.log", os.O_WRONLY | os.O_CREAT)
            os.dup2(log, 1)
            os.dup2(log, 2)
            run_rank(group, rank, port, output)
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return children


def main() -> int:
    """Returns 1 where a process has failed as a whole."""
    output = Path(sys.argv[1])
    # What starts processes by itself has a main module of its own, which `spawn` imports again.
    spawning = subprocess.Popen([sys.executable, str(Path(__file__).with_name("spawning.py")), str(output)])
    codes = []
    for groups in (["two"], ["one", "four"]):
        children = [child for group in groups for child in fork(group, output)]
        codes += [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    return int(any([*codes, spawning.wait()]))


if __name__ == "__main__":
    sys.exit(main())
