"""One start for every distributed test: a cold one costs more than most of what it runs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))


class Runs(NamedTuple):
    """What tests/distributed/launch.py leaves behind: its directory, and the results of each rank by group."""

    output: Path
    two: list[dict[str, Any]]
    one: dict[str, Any]
    four: list[dict[str, Any]]
    forks: dict[str, Any]


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    output = tmp_path_factory.mktemp("distributed")
    environment = {**os.environ, "PYTHONPATH": str(HERE.parents[1]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(HERE / "launch.py"), str(output)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900, check=False)
    logs = "\n".join(log.read_text(errors="replace")[-3000:] for log in sorted(output.glob("*.log")))
    assert done.returncode == 0, done.stderr + logs

    def load(group: str, rank: int) -> dict[str, Any]:
        found: dict[str, Any] = torch.load(output / f"{group}-rank{rank}.pt", weights_only=False)
        return found

    two, four = ([load(group, rank) for rank in range(world)] for group, world in (("two", 2), ("four", 4)))
    return Runs(output, two, load("one", 0), four, load("forks", 0))
