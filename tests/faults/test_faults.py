"""A short fault run; the long one is `python tests/faults/run.py --kills 50`."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
@pytest.mark.subprocess
def test_five_kills_tear_no_file_and_change_no_result() -> None:
    # A process of its own: torch forbids the backward in a fork of one that has had a backward already.
    command = [sys.executable, str(Path(__file__).with_name("run.py")), "--kills", "5", "--seed", "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    last = done.stdout.strip().split("\n")[-1]
    assert re.match(r"[5-9] kills .*: 0 corrupt files, 0 wrong results", last), last
