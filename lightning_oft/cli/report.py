"""What `fit` says at its end: the scores before and after, where the results are, and how to load them."""

from collections.abc import Mapping
from pathlib import Path

from lightning.pytorch import LightningDataModule, LightningModule, Trainer

from lightning_oft.cli.auto import loader_of


def quiet_test(trainer: Trainer, model: LightningModule, data: LightningDataModule | None) -> dict[str, float]:
    """Run `trainer.test` without its table and progress bar and return every metric it logged."""
    bar = trainer.progress_bar_callback
    if bar:
        bar.disable()
    scores = trainer.test(model, datamodule=data, verbose=False)
    if bar:
        bar.enable()
    return {name: float(value) for loader in scores for name, value in loader.items()}


def score_table(before: Mapping[str, float], after: Mapping[str, float]) -> str:
    """Two rows, `before` and `after`, a column for each test set's accuracy; for each metric where there is none.

    `test/new/accuracy` is headed `new/accuracy`, `test/accuracy/dataloader_idx_1` is `accuracy 1`.
    """
    names = [name for name in before if name in after]
    names = [name for name in names if "acc" in name] or names
    columns = [["      ", "before", "after "]]
    for name in names:
        title = name.removeprefix("test/").removeprefix("test_").replace("/dataloader_idx_", " ")
        cells = [title, f"{before[name]:.4f}", f"{after[name]:.4f}"]
        columns.append([cell.rjust(max(map(len, cells))) for cell in cells])
    return "\n".join("  ".join(row) for row in zip(*columns, strict=True))


def how_to_load(export_dir: Path) -> list[str]:
    """The call that loads `adapter/` and the one that loads `merged/`, a line each."""
    merged, adapter = export_dir / "merged", export_dir / "adapter"
    lines = []
    if (adapter / "adapter_config.json").is_file():
        lines.append(f'load the adapter with       PeftModel.from_pretrained(base_model, "{adapter}")')
    if merged.is_dir() and (loader := loader_of(merged)):
        lines.append(f'load the merged model with  {loader}.from_pretrained("{merged}")')
    return lines
