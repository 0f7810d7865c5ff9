"""A short fault run; the long one is `python tools/faults/run.py --kills 50`."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
@pytest.mark.subprocess
def test_three_kills_tear_no_file_and_change_no_result() -> None:
    # A process of its own: torch forbids the backward in a fork of one that has had a backward already.
    command = [sys.executable, str(ROOT / "tools" / "faults" / "run.py"), "--kills", "3", "--seed", "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    last = done.stdout.strip().split("\n")[-1]
    assert re.match(r"[3-9] kills .*: 0 corrupt files, 0 wrong results", last), last
