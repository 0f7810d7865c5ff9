"""Classifiers of text and encoder-decoders: what OFT promises of each, and what they score."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from text_models import save
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader
from torchmetrics.functional.classification import multiclass_f1_score
from transformers import AutoModelForSeq2SeqLM, AutoModelForSequenceClassification, AutoTokenizer

from lightning_oft import OFTConfig, OFTFinetuning, inject, load_from_checkpoint, merge, oft_layers
from lightning_oft.data import TextClassificationDataModule
from lightning_oft.data.text.batches import pad
from lightning_oft.tasks import Seq2SeqLM, SequenceClassification, Task, TokenClassification

Base = Callable[[str], str]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Base:
    return cache(lambda name: save(name, tmp_path_factory.mktemp(name)))


def trainer(**options: Any) -> Trainer:
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    return Trainer(accelerator="cpu", max_epochs=1, **{**quiet, **options})


def examples(kind: str) -> list[dict[str, Any]]:
    """Rows of unlike length, with labels of a kind: a class, a class a token, or a target."""
    made: list[dict[str, Any]] = []
    for number, length in enumerate((5, 9, 3, 7)):
        labels: dict[str, Any] = {
            "class": number % 3,
            "tokens": [-100, *((number + i) % 3 for i in range(length - 2)), -100],
            "target": torch.randint(3, 1024, (length - 1,)).tolist(),
        }
        made.append({"input_ids": torch.randint(3, 1024, (length,)).tolist(), "labels": labels[kind]})
    return made


def loader(rows: list[Any], size: int) -> Any:
    return DataLoader(rows, batch_size=size, collate_fn=partial(pad, pad_token_id=2))  # type: ignore[arg-type]


CASES: dict[str, tuple[type[Task], str, str]] = {
    "sequence, BERT": (SequenceClassification, "bert", "class"),
    "sequence, Llama": (SequenceClassification, "llama", "class"),
    "tokens, BERT": (TokenClassification, "bert", "tokens"),
    "T5": (Seq2SeqLM, "t5", "target"),
    "BART": (Seq2SeqLM, "bart", "target"),
}


def make(case: str, base: Base) -> tuple[Any, dict[str, Tensor]]:
    task, name, kind = CASES[case]
    options: dict[str, Any] = {} if kind == "target" else {"num_classes": 3}
    return task(base(name), **options), pad(examples(kind), 2)


def logits_of(task: Any, batch: dict[str, Tensor]) -> Tensor:
    found: Tensor = task(batch) if isinstance(task, Seq2SeqLM) else task(**task._inputs(batch))
    return found


@pytest.mark.parametrize("case", CASES)
def test_exact_at_injection_every_rotation_learns_and_a_merge_changes_nothing(case: str, base: Base) -> None:
    task, batch = make(case, base)
    # Frozen, as OFT leaves it: torch's attention takes another kernel where T5's position bias is trained.
    task.eval().requires_grad_(False)
    before = logits_of(task, batch)
    heads = task.new_head or None
    inject(task, OFTConfig(oft_block_size=4, target_modules="all-linear", modules_to_save=heads))
    assert torch.equal(logits_of(task, batch), before)
    (logits_of(task, batch).float() * torch.randn(before.shape)).sum().backward()
    rotations = {name: p for name, p in task.named_parameters() if ".oft_R." in name}
    assert rotations
    assert [name for name, p in rotations.items() if p.grad is None or not p.grad.any()] == []
    for rotation in rotations.values():
        rotation.data.normal_(std=0.2)
    turned = logits_of(task, batch)
    assert not torch.allclose(turned, before, atol=1e-3)
    merge(task)
    torch.testing.assert_close(logits_of(task, batch), turned, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("case", CASES)
def test_padding_is_ignored(case: str, base: Base) -> None:
    task, batch = make(case, base)
    task.eval()
    together = logits_of(task, batch)
    for row, example in enumerate(examples_of(batch)):
        alone = logits_of(task, pad([example], 2))[0]
        kept = together[row][: len(alone)] if alone.dim() > 1 else together[row]
        torch.testing.assert_close(kept, alone, atol=1e-5, rtol=1e-4)


def examples_of(batch: dict[str, Tensor]) -> list[dict[str, Any]]:
    """The rows of a batch without their padding."""
    rows = []
    for ids, mask, label in zip(batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True):
        whole = label.dim() and len(label) != len(ids)
        labels = label[label >= 0].tolist() if whole else label[mask.bool()].tolist() if label.dim() else label.item()
        rows.append({"input_ids": ids[mask.bool()].tolist(), "labels": labels})
    return rows


@pytest.mark.parametrize("case", ["sequence, BERT", "tokens, BERT"])
def test_scores_of_classes_are_those_of_all_labels_at_once(case: str, base: Base) -> None:
    task, batch = make(case, base)
    (scores,) = trainer().test(task, loader(examples_of(batch), 3), verbose=False)
    task.eval()
    labels = batch["labels"].flatten()
    logits = logits_of(task, batch).reshape(-1, 3)[labels >= 0].detach()
    labels = labels[labels >= 0]
    expected = {
        "test/loss": float(cross_entropy(logits, labels)),
        "test/accuracy": float((logits.argmax(-1) == labels).float().mean()),
        "test/f1": float(multiclass_f1_score(logits, labels, 3, average="macro")),
    }
    assert scores == pytest.approx(expected, rel=1e-4)
    assert int(task.confusion["test"].sum()) == len(labels)


@pytest.mark.parametrize("case", ["T5", "BART"])
def test_scores_of_targets_are_the_models_own(case: str, base: Base) -> None:
    task, batch = make(case, base)
    (scores,) = trainer().test(task, loader(examples_of(batch), 3), verbose=False)
    task.eval()
    found = task.model(**batch)
    right = (found.logits.argmax(-1) == batch["labels"])[batch["labels"] >= 0].float().mean()
    assert scores == pytest.approx(
        {"test/loss": found.loss.item(), "test/perplexity": found.loss.exp().item(), "test/accuracy": float(right)},
        rel=1e-4,
    )


def test_labels_need_not_be_contiguous(base: Base) -> None:
    for case in ("T5", "BART"):
        task, batch = make(case, base)
        strided = {**batch, "labels": batch["labels"].t().contiguous().t()}
        assert torch.equal(task.eval()(strided), task(batch))


def test_an_answer_has_no_source_in_it(base: Base) -> None:
    task = Seq2SeqLM(base("t5"), prompts=["One two"], generation={"max_new_tokens": 3})
    source = task.tokenizer("One two", return_tensors="pt")
    made = task.eval().model.generate(**source, max_new_tokens=3)
    assert task.samples() == {"One two": task.tokenizer.decode(made[0], skip_special_tokens=True)}


def test_target_that_is_never_called_is_said(base: Base, caplog: pytest.LogCaptureFixture) -> None:
    task, batch = make("T5", base)
    inject(task.model, OFTConfig(oft_block_size=4, target_modules=["shared", "q"]))
    with caplog.at_level("WARNING"):
        task(batch)
    (line,) = [message for message in caplog.messages if "not called" in message]
    called = "encoder.embed_tokens, decoder.embed_tokens, lm_head"
    assert line.startswith(f"shared: not called in the model's first forward, but {called} with the same weight: ")


def test_new_head_is_trained_whole_and_carries_its_names(base: Base, tmp_path: Path) -> None:
    file = tmp_path / "train.jsonl"
    rows = [{"text": text, "label": label} for text, label in (("One two", "b"), ("Three", "a"), ("Four five", "c"))]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    task = SequenceClassification(base("bert"), num_classes=3, optimizer=partial(torch.optim.SGD, lr=0.5))
    before = task.model.classifier.weight.detach().clone()
    callback = OFTFinetuning(oft_block_size=4, export_dir=str(tmp_path / "out"))
    trainer(callbacks=[callback]).fit(task, TextClassificationDataModule({"train": str(file), "val": str(file)}))
    assert not any("classifier" in name for name in oft_layers(task))
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out" / "merged")
    assert merged.config.id2label == {0: "a", 1: "b", 2: "c"}
    assert not torch.equal(merged.classifier.weight, before)
    adapter = json.loads((tmp_path / "out" / "adapter" / "adapter_config.json").read_text(encoding="utf-8"))
    assert adapter["modules_to_save"] == ["classifier"]
    ids = AutoTokenizer.from_pretrained(tmp_path / "out" / "merged")("One", return_tensors="pt")
    torch.testing.assert_close(merged(**ids).logits, task.eval()(**ids), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("given", "trains"), [({}, True), ({"modules_to_save": []}, False), ({"module": "model.bert"}, False)]
)
def test_head_is_trained_unless_told_otherwise(given: dict[str, Any], trains: bool, base: Base) -> None:
    task = SequenceClassification(base("bert"), num_classes=3, optimizer=partial(torch.optim.SGD, lr=0.5))
    before = task.model.classifier.bias.detach().clone()
    run = trainer(callbacks=[OFTFinetuning(oft_block_size=4, target_modules=["query"], **given)], max_steps=1)
    run.fit(task, loader(examples("class"), 4), loader(examples("class"), 4))
    assert torch.equal(task.model.classifier.bias, before) is not trains


def test_checkpoint_of_the_adapter_holds_the_head(base: Base, tmp_path: Path) -> None:
    task = SequenceClassification(base("bert"), num_classes=3, optimizer=partial(torch.optim.SGD, lr=0.5))
    run = trainer(callbacks=[OFTFinetuning(oft_block_size=4, merge_on_fit_end=False)])
    run.fit(task, loader(examples("class"), 4), loader(examples("class"), 4))
    run.save_checkpoint(tmp_path / "last.ckpt")
    again = load_from_checkpoint(SequenceClassification, tmp_path / "last.ckpt")
    torch.testing.assert_close(again.state_dict(), task.state_dict())


def test_encoder_decoder_is_fitted_and_exported(base: Base, tmp_path: Path) -> None:
    task, batch = make("T5", base)
    task.optimizer = partial(torch.optim.SGD, lr=1.0)
    before = task.eval()(batch)
    data = loader(examples_of(batch), 3)
    trainer(callbacks=[OFTFinetuning(oft_block_size=4, export_dir=str(tmp_path))]).fit(task.train(), data, data)
    merged = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "merged")
    assert not torch.equal(task.eval()(batch), before)
    torch.testing.assert_close(merged(**batch).logits, task(batch), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([[-100, 7, -100]], "labels: found class 7, the model has 0 to 2"),
        ([[-100, -100, -100]], "labels: all are -100, which is not scored"),
        (None, r"found \['input_ids'\]; a batch is a dict of input_ids \(B, L\), attention_mask .* labels \(B, L\)"),
    ],
)
def test_labels_that_are_no_classes_are_refused(labels: Any, message: str, base: Base) -> None:
    task = TokenClassification(base("bert"), num_classes=3)
    batch: Any = {"input_ids": torch.tensor([[3, 4, 5]])}
    if labels is not None:
        batch |= {"attention_mask": torch.ones(1, 3, dtype=torch.int64), "labels": torch.tensor(labels)}
    with pytest.raises(ValueError, match=message):
        task.validation_step(batch, 0)
