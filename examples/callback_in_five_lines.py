"""Add OFT to a LightningModule of your own: only the lines with `oft` are new.

python examples/callback_in_five_lines.py
"""

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_oft import OFTFinetuning


class Regression(pl.LightningModule):
    """Any module: it knows nothing of OFT."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 4))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """The loss of one batch."""
        return nn.functional.mse_loss(self.net(batch[0]), batch[1])

    def test_step(self, batch: list[Tensor], batch_idx: int) -> None:
        """Log the loss of one batch."""
        self.log("test/loss", nn.functional.mse_loss(self.net(batch[0]), batch[1]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """All parameters; those that are frozen are passed over."""
        # No weight decay: it would pull the rotations back to the identity.
        return torch.optim.AdamW(self.parameters(), lr=0.03, weight_decay=0.0)


def main() -> tuple[float, float]:
    """Returns the loss before and after."""
    model = Regression()
    # The new domain shows the net what it knows, turned: a rotation of its input is all there is to learn.
    known = torch.randn(512, 16)
    turn, _ = torch.linalg.qr(torch.eye(16) + 0.2 * torch.randn(16, 16))
    data = DataLoader(TensorDataset(known @ turn, model.net(known).detach()), batch_size=64)

    oft = OFTFinetuning(oft_block_size=16, use_cayley_neumann=False)
    trainer = pl.Trainer(max_epochs=15, accelerator="cpu", callbacks=[oft], logger=False, enable_checkpointing=False)
    before = trainer.test(model, data, verbose=False)[0]["test/loss"]
    trainer.fit(model, data)
    after = trainer.test(model, data, verbose=False)[0]["test/loss"]
    print(f"loss {before:.4f} before, {after:.6f} after; the model is plain again: {type(model.net[0]).__name__}")
    return before, after


if __name__ == "__main__":
    main()
