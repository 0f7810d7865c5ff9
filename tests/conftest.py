"""What every test starts from."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import settings

# An ordinary run says the same thing twice; the nightly one searches.
settings.register_profile("ordinary", derandomize=os.environ.get("LIGHTNING_OFT_EXAMPLES") != "nightly")
settings.load_profile("ordinary")

sys.path.insert(
    0, str(Path(__file__).parent)
)  # `import layer_cases`: the importlib mode leaves the tests' own folder out


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
