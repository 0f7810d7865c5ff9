"""One start for every distributed test: a cold one costs more than most of what it runs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
from launch import Runs, load_runs  # noqa: E402 - the importlib mode leaves the tests' own folder out


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    output = tmp_path_factory.mktemp("distributed")
    environment = {**os.environ, "PYTHONPATH": str(HERE.parents[1]), "OMP_NUM_THREADS": "1"}
    environment["HF_DATASETS_CACHE"] = str(output / "cache")
    command = [sys.executable, str(HERE / "launch.py"), str(output)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900, check=False)
    logs = "\n".join(log.read_text(errors="replace")[-3000:] for log in sorted(output.glob("*.log")))
    assert done.returncode == 0, done.stderr + logs
    return load_runs(output)
