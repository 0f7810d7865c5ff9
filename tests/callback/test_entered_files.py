"""A fit enters what it needs, and nothing else of the package."""

from __future__ import annotations

import subprocess
import sys

import pytest

SCRIPT = """
import sys, torch, lightning.pytorch as pl
from lightning_oft import OFTFinetuning

class Model(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))

    def training_step(self, batch, batch_idx):
        return self.net(batch).square().mean()

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters())

quiet = dict.fromkeys(["logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"], False)
oft = OFTFinetuning(oft_block_size=4)
pl.Trainer(max_steps=1, accelerator="cpu", callbacks=[oft], **quiet).fit(Model(), torch.utils.data.DataLoader(torch.randn(4, 8)))
print(*(name for name in sys.modules if name.split(".")[0] == "lightning_oft"))
"""


@pytest.mark.subprocess
def test_a_fit_of_one_batch_enters_few_files() -> None:
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", SCRIPT], capture_output=True, text=True, check=True)
    entered = done.stdout.split()
    assert len(entered) <= 51, sorted(entered)
    absent = ("formats", "cli", "tasks", "data", "callback.export", "callback.strategies.fsdp", "callback.loading")
    assert not [name for name in entered if name.removeprefix("lightning_oft.").startswith(absent)]
