"""What every test starts from."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # `import kinds`: the importlib mode leaves the tests' own folder out


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
