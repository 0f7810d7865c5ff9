"""Rows with labels or targets: what becomes of them, and which are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest

from lightning_oft.data import Seq2SeqDataModule, TextClassificationDataModule, TokenClassificationDataModule

BASE = str(Path(__file__).parents[3] / "examples" / "bases" / "docs-llama")
TEXT, WORDS, PAIRS = TextClassificationDataModule, TokenClassificationDataModule, Seq2SeqDataModule


@pytest.fixture(autouse=True)
def _quiet() -> None:
    datasets.disable_progress_bars()


def set_up(module: Any, tmp_path: Path, rows: list[Any], task: Any = None, **arguments: Any) -> Any:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    made = module(str(file), pretrained=BASE, **arguments)
    if task is not None:
        made.trainer = type("Run", (), {"lightning_module": task})()
    made.setup("fit")
    return made


def task_of(label2id: dict[str, int]) -> Any:
    config = type("Config", (), {"label2id": label2id, "max_position_embeddings": 64})()
    return type("Model", (), {"num_classes": len(label2id), "model": type("Inner", (), {"config": config})()})()


def rows_of(*labels: Any) -> list[dict[str, Any]]:
    return [{"text": f"number {i}", "label": label} for i, label in enumerate(labels)]


@pytest.mark.parametrize(
    ("labels", "task", "arguments", "expected", "names"),
    [
        (["b", "a"], None, {}, [1, 0], ["a", "b"]),
        ([1, 0, 2], None, {}, [1, 0, 2], []),
        (["b", "a"], None, {"class_names": ["b", "c", "a"]}, [0, 2], ["b", "c", "a"]),
        (["b", "a"], task_of({"b": 0, "a": 1, "c": 2}), {}, [0, 1], ["b", "a", "c"]),
        (["b", "a"], task_of({"LABEL_0": 0, "LABEL_1": 1}), {}, [1, 0], ["a", "b"]),
    ],
    ids=["names", "ids", "given names", "the model's order", "a new head"],
)
def test_ids_of_classes(
    tmp_path: Path, labels: Any, task: Any, arguments: Any, expected: list[int], names: list[str]
) -> None:
    made = set_up(TEXT, tmp_path, rows_of(*labels), task, **arguments)
    assert (made.splits["train"]["labels"][:], made.class_names) == (expected, names)


def test_ids_that_have_names_are_put_in_the_models_order(tmp_path: Path) -> None:
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["a", "b"])})
    datasets.Dataset.from_dict({"text": ["x", "y"], "label": [0, 1]}, features).save_to_disk(tmp_path / "saved")
    made = TEXT(str(tmp_path / "saved"), pretrained=BASE)
    made.trainer = type("Run", (), {"lightning_module": task_of({"b": 0, "a": 1})})()  # type: ignore[assignment]
    made.setup("fit")
    assert (made.splits["train"]["labels"][:], made.class_names) == ([1, 0], ["b", "a"])  # type: ignore[index]


def test_first_token_of_each_word_has_its_label(tmp_path: Path) -> None:
    row = {"tokens": ["documentation", "of", "Python"], "tags": ["X", "O", "X"]}
    made = set_up(WORDS, tmp_path, [row])
    (example,) = made.splits["train"]
    places = made.processor(row["tokens"], is_split_into_words=True).word_ids()
    assert len(places) > 3, "a word of several tokens"
    assert [label for label in example["labels"] if label >= 0] == [1, 0, 1]
    assert [places[i] for i, label in enumerate(example["labels"]) if label >= 0] == [0, 1, 2]
    assert [i for i, label in enumerate(example["labels"]) if label >= 0] == [places.index(i) for i in range(3)]


def test_batch_of_sources_and_targets_of_unlike_length(tmp_path: Path) -> None:
    rows = [{"source": "One", "target": "Two three four"}, {"source": "A long source", "target": "x"}]
    made = set_up(PAIRS, tmp_path, rows)
    (batch,) = made.train_dataloader()
    targets = {made.processor.decode(row[row >= 0]) for row in batch["labels"]}
    assert targets == {"<|start|>Two three four<|end|>", "<|start|>x<|end|>"}
    assert batch["labels"].shape[1] != batch["input_ids"].shape[1]
    assert batch["attention_mask"].shape == batch["input_ids"].shape
    assert (batch["labels"] == -100).any()


def test_two_texts_are_one_example(tmp_path: Path) -> None:
    made = set_up(TEXT, tmp_path, [{"text": "One", "text_pair": "two", "label": 0}])
    assert made.processor.decode(made.splits["train"][0]["input_ids"]).replace(" ", "") == "Onetwo"


LONG = {"text": "word " * 300, "label": 0}
BAD: list[tuple[Any, list[Any], dict[str, Any], str]] = [
    (TEXT, [{"body": "x", "label": 0}], {}, r"train: found the columns body, label; wanted text and text_pair and label"),
    (TEXT, rows_of("a", None), {}, "train, row 2: label is missing, not the name or the id of a class"),
    (TEXT, rows_of(0, None), {}, "train, row 2: label is missing"),
    (TEXT, rows_of(0, -1), {}, "train, row 2: label -1 is no class; the classes are 0 and more"),
    (TEXT, rows_of(0, 2), {"task": task_of({"a": 0, "b": 1})}, "train, row 2: label 2 is no class; the classes are 0 to 1"),
    (TEXT, rows_of("a", "x"), {"class_names": ["a", "b"]}, "train, row 2: label 'x' is no class; the classes are a, b"),
    (TEXT, [*rows_of(0), {"text": " ", "label": 0}], {}, "train, row 2: text is empty; leave the row out"),
    (TEXT, [LONG], {}, "train, row 1: .* tokens, the model takes 256; shorten it, or set max_length"),
    (WORDS, [{"tokens": ["a", "b"], "tags": ["x"]}], {}, "train, row 1: 2 tokens and 1 tags; there is one for each"),
    (WORDS, [{"tokens": ["a", " "], "tags": ["x", "y"]}], {}, "train, row 1: a word is empty"),
    (WORDS, [{"tokens": [], "tags": []}], {}, "train, row 1: tokens is empty, not a list"),
    (WORDS, [{"tokens": "a b", "tags": "x y"}], {}, "train, row 1: tokens is str, not a list"),
    (PAIRS, [{"source": "x", "target": None}, {"source": "x", "target": "y"}], {}, "row 1: target is missing, not text"),
]  # fmt: skip


@pytest.mark.parametrize(("module", "rows", "arguments", "message"), BAD, ids=[message for *_, message in BAD])
def test_bad_row_is_one_line_that_names_it(
    tmp_path: Path, module: Any, rows: Any, arguments: Any, message: str
) -> None:
    with pytest.raises(ValueError, match=message) as error:
        set_up(module, tmp_path, rows, **arguments)
    assert "\n" not in str(error.value)
