"""One launch for every test of a kind: a cold start of two processes costs sixteen seconds."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

HERE = Path(__file__).parent


@pytest.fixture(scope="session")
def tasks_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """What tests/distributed/tasks_worker.py leaves behind: its directory, and the results of each rank by scenario."""
    output = tmp_path_factory.mktemp("tasks")
    names = ["vision", "split", "recipe", "bytes", "bytes-checkpointing"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*torchrun, str(HERE / "tasks_worker.py"), str(output), *names],
        env={**os.environ, "PYTHONPATH": str(HERE.parents[1]), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return output, [torch.load(output / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)]
