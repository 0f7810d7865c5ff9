import json
import struct
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pytest
import torch
from lightning.pytorch import LightningModule
from pyarrow import parquet
from transformers import AutoModel, BertConfig, MPNetConfig, RobertaConfig

from lightning_oft.data import TextDataModule
from lightning_oft.data.text.batches import LengthGrouped, pack
from lightning_oft.data.text.sources import load_tables
from lightning_oft.data.text.tables import positions_of

BASE = str(Path(__file__).parents[3] / "examples" / "bases" / "docs-llama")
CHAT = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "He."}]


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


def write(tmp_path: Path, rows: list[Any], name: str = "train.jsonl") -> str:
    file = tmp_path / name
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(file)


def set_up(data: Any, **arguments: Any) -> TextDataModule:
    module = TextDataModule(data, pretrained=BASE, **arguments)
    module.setup("fit")
    return module


def learned(module: TextDataModule, split: str = "train", row: int = 0) -> str:
    example: Any = module.splits[split][row]
    return str(module.processor.decode([token for token in example["labels"] if token >= 0]))


@pytest.mark.parametrize(
    ("row", "arguments", "expected"),
    [
        ({"text": "One two."}, {}, "One two.<|end|>"),
        ({"prompt": "One", "completion": " two."}, {}, " two.<|end|>"),
        ({"prompt": CHAT[:1], "completion": CHAT[1:]}, {}, " He.<|end|>\n"),
        ({"messages": CHAT + CHAT}, {}, " He.<|end|> He.<|end|>"),
        ({"prompt": "One", "completion": " two."}, {"completion_only": False}, "One two.<|end|>"),
        ({"messages": CHAT}, {"completion_only": False}, "User: Who?\nAssistant: He.<|end|>\n"),
        ({"body": "One"}, {"columns": {"text": "body"}}, "One<|end|>"),
    ],
)
def test_what_is_learned(tmp_path: Path, row: Any, arguments: Any, expected: str) -> None:
    assert learned(set_up(write(tmp_path, [row]), **arguments)) == expected


BAD: list[tuple[list[Any], dict[str, Any], str]] = [
    ([{"body": "x"}], {}, r"train: found the columns body; wanted messages, or .*columns: \{text: body\}"),
    ([{"text": "x"}], {"columns": {"text": "body"}}, "train: no column 'body'; found text"),
    ([{"text": "x"}, {"text": " "}], {}, "train, row 2: text is empty; leave the row out"),
    ([{"text": "x"}, {"text": None}], {}, "train, row 2: text is missing, not text"),
    ([{"text": 3}], {}, "train, row 1: text is int, not text"),
    ([{"text": "word " * 300}], {}, "train, row 1: .* tokens, the model takes 256; shorten it, or set max_length"),
    ([{"prompt": "a b c d e", "completion": "f"}], {"max_length": 4}, "row 1: the first 4 tokens hold no target"),
    ([{"messages": CHAT[:1]}], {}, "row 1: messages hold no turn of the assistant"),
    ([{"messages": []}], {}, "row 1: messages is empty"),
    ([{"messages": [{"role": "user", "content": None}]}], {}, "row 1: messages: message 1 has no role and content"),
    ([{"text": "x"}], {"max_length": 999}, "max_length=999: the model takes 256 tokens"),
]


@pytest.mark.parametrize(("rows", "arguments", "message"), BAD, ids=[message for *_, message in BAD])
def test_bad_row_is_one_line_that_names_it(tmp_path: Path, rows: Any, arguments: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        set_up(write(tmp_path, rows), **arguments)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "row 1: the tokenizer has no chat template; set chat_template"),
        ("{{ messages[0].content }}", r"row 1: the chat template has no \{% generation %\} marks"),
        (
            "{% generation %}{{ raise_exception('no system turns\n') }}{% endgeneration %}",
            r"row 1: the chat template cannot write these turns \(no system turns\); mend the row, or chat_template$",
        ),
    ],
)
def test_chat_template_of_no_use_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, template: str | None, message: str
) -> None:
    module = TextDataModule(write(tmp_path, [{"messages": CHAT}]), pretrained=BASE)
    tokenizer, limit = module._tokenizer()
    tokenizer.chat_template = template
    monkeypatch.setattr(module, "_tokenizer", lambda: (tokenizer, limit))
    with pytest.raises(ValueError, match=message):
        module.setup("fit")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"one\n\xff\n", r"a.txt, line 2: byte 1 is not UTF-8; convert the file"),
        ("a.jsonl", b'{"text": "x"}\n{"text": \n', "a.jsonl, line 2: not a JSON object"),
        ("a.csv", b"text\n\xff\n", "a.csv, line 2: byte 1 is not UTF-8"),
        ("a.parquet", b"text", "a.parquet: could not be read"),
    ],
)
def test_unreadable_file_is_named_with_its_line(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        set_up(str(tmp_path / name))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("streaming", [False, True])
def test_cell_of_parquet_that_is_not_utf8_is_named(tmp_path: Path, streaming: bool) -> None:
    ends, letters = (pyarrow.py_buffer(part) for part in (struct.pack("<3i", 0, 3, 5), b"onen\xff"))
    cells = pyarrow.Array.from_buffers(pyarrow.string(), 2, [None, ends, letters])
    parquet.write_table(pyarrow.table({"text": cells}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"a\.parquet, row 2: text is not UTF-8; write the file anew$"):
        list(set_up(str(tmp_path / "a.parquet"), streaming=streaming).train_dataloader())


@pytest.mark.parametrize(("name", "content"), [("a.jsonl", ""), ("a.csv", "text\n"), ("a.txt", "")])
def test_a_streamed_file_without_a_row_is_said(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=rf"{name}: could not be read \(it holds no row\)"):
        set_up(str(tmp_path / name), streaming=True)


@pytest.mark.parametrize("kind", [BertConfig, RobertaConfig, MPNetConfig])
def test_a_row_as_long_as_the_model_takes_is_the_longest(kind: Any) -> None:
    model = AutoModel.from_config(
        kind(vocab_size=9, hidden_size=4, num_hidden_layers=1, num_attention_heads=1, max_position_embeddings=20)
    )
    longest = positions_of(model) or 0
    model(input_ids=torch.full((1, longest), 5))
    with pytest.raises((IndexError, RuntimeError)):
        model(input_ids=torch.full((1, longest + 1), 5))


@pytest.mark.parametrize("source", ["./none", "none.txt", "a/b/c"])
def test_absent_source_is_said(source: str) -> None:
    with pytest.raises(FileNotFoundError, match=f"^{source}: no such file"):
        load_tables(source)


@pytest.mark.parametrize("suffix", ["txt", "csv", "tsv", "parquet", "json", "saved"])
def test_kinds_of_files(tmp_path: Path, suffix: str) -> None:
    table = datasets.Dataset.from_dict({"text": ["one, two", "three"]})
    file = str(tmp_path / f"x.{suffix}")
    if suffix == "txt":
        Path(file).write_text("one, two\nthree\n", encoding="utf-8")
    elif suffix == "saved":
        table.save_to_disk(file)
    elif suffix in ("csv", "tsv"):
        table.to_csv(file, sep="," if suffix == "csv" else "\t")
    else:
        getattr(table, f"to_{suffix}")(file)
    assert load_tables(file)["train"]["text"][:] == ["one, two", "three"]


def test_splits_of_a_folder_and_of_a_mapping(tmp_path: Path) -> None:
    for name in ("train-00", "train-01", "validation", "test_new"):
        (tmp_path / f"{name}.txt").write_text(f"{name}\n", encoding="utf-8")
    found = {split: table["text"][:] for split, table in load_tables(str(tmp_path)).items()}
    assert found == {"train": ["train-00", "train-01"], "val": ["validation"], "test_new": ["test_new"]}
    module = set_up({"train": str(tmp_path / "train-00.txt"), "new": str(tmp_path / "test_new.txt")})
    assert module.test_names == ["new"]


def test_examples_are_made_again_when_data_tokenizer_or_arguments_change(tmp_path: Path) -> None:
    data = write(tmp_path, [{"messages": CHAT}])
    template = tmp_path / "chat.jinja"
    template.write_text("{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}")

    def files(**arguments: Any) -> str:
        return str(set_up(data, **arguments).splits["train"].cache_files)  # type: ignore[attr-defined]

    first = files()
    assert files() == first
    made = {first, files(max_length=99), files(completion_only=False), files(chat_template=str(template))}
    write(tmp_path, [{"messages": CHAT + CHAT}])
    made.add(files())
    assert len(made) == 5


# datasets does not close a CSV file of which not every row is read.
CSV_LEFT_OPEN = "ignore:Exception ignored in.*_io:pytest.PytestUnraisableExceptionWarning"


@pytest.mark.filterwarnings(CSV_LEFT_OPEN)
@pytest.mark.parametrize("suffix", ["jsonl", "csv", "tsv", "txt", "parquet"])
def test_streamed_rows_are_those_that_are_read_at_once(suffix: str, tmp_path: Path) -> None:
    rows, data = [{"text": f"number {i}"} for i in range(20)], str(tmp_path / f"rows.{suffix}")
    if suffix == "jsonl":
        data = write(tmp_path, rows)
    elif suffix == "parquet":
        datasets.Dataset.from_list(rows).to_parquet(data)
    else:
        lines = [row["text"] for row in rows]
        Path(data).write_text("\n".join(lines if suffix == "txt" else ["text", *lines]) + "\n")
    streamed = set_up(data, streaming=True, batch_size=20).train_dataloader()
    (batch,) = [*streamed]
    (whole,) = [*set_up(data, batch_size=20).train_dataloader()]
    assert sorted(batch["input_ids"].tolist()) == sorted(whole["input_ids"].tolist())


@pytest.mark.filterwarnings(CSV_LEFT_OPEN)
def test_a_streamed_column_may_be_empty_for_long(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("body,note\n" + "one,\n" * 20_000 + "one,late\n")
    module = set_up(str(tmp_path / "rows.csv"), streaming=True, columns={"text": "body"}, batch_size=1000)
    assert sum(len(batch["input_ids"]) for batch in module.train_dataloader()) == 20_001


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "txt"])
@pytest.mark.parametrize("count", [4, 3000])
def test_a_streamed_line_that_is_not_utf8_is_named(count: int, suffix: str, tmp_path: Path) -> None:
    lines = [b'{"text": "one"}' if suffix == "jsonl" else b"one"] * count
    lines[-2] = lines[-2].replace(b"n", b"\xff")
    (tmp_path / f"rows.{suffix}").write_bytes(b"\n".join([b"text", *lines] if suffix == "csv" else lines) + b"\n")
    number = count - 1 + (suffix == "csv")
    with pytest.raises(ValueError, match=f"rows.{suffix}, line {number}: byte .* is not UTF-8; convert the file"):
        list(set_up(str(tmp_path / f"rows.{suffix}"), streaming=True).train_dataloader())


def test_a_streamed_row_of_several_files_is_told_by_its_beginning(tmp_path: Path) -> None:
    write(tmp_path, [{"prompt": "one", "completion": " two"}], "a.jsonl")
    write(tmp_path, [{"prompt": "three", "completion": ""}], "b.jsonl")
    with pytest.raises(
        ValueError, match=r"train, row 1 of one of its files, {'prompt': 'three'.*: completion is empty"
    ):
        list(set_up(str(tmp_path), streaming=True).train_dataloader())


def test_packed_rows_hold_every_token_once_and_no_more_than_fit() -> None:
    examples = [{"input_ids": [i] * n, "labels": [i] * n} for i, n in enumerate((3, 9, 2, 4, 10, 1))]
    rows = pack(examples, 10)
    assert max(len(row["input_ids"]) for row in rows) == 10
    tokens = [[token for row in made for token in row["input_ids"]] for made in (rows, examples)]
    assert sorted(tokens[0]) == sorted(tokens[1])
    assert all(row["position_ids"].count(0) == len(set(row["input_ids"])) for row in rows)
    assert len(rows) == 3


def test_batches_are_grouped_by_length_and_shared_among_processes() -> None:
    lengths = torch.randint(1, 100, (64,)).tolist()
    parts = [list(LengthGrouped(lengths, 4, 2, rank)) for rank in range(2)]
    assert sorted(parts[0] + parts[1]) == list(range(64))
    spread = [max(lengths[i] for i in part[at : at + 4]) - min(lengths[i] for i in part[at : at + 4])
              for part in parts for at in range(0, 32, 4)]  # fmt: skip
    assert sum(spread) / len(spread) < 20
    assert parts[0] != sorted(parts[0], key=lambda i: -lengths[i])


def test_prompts_of_test_sets_are_padded_on_the_left(tmp_path: Path) -> None:
    data = {"new": write(tmp_path, [{"prompt": "a b c", "completion": "d"}, {"prompt": "a", "completion": "d"}])}
    (loader,) = set_up(data).predict_dataloader()
    (batch,) = list(loader)
    assert set(batch) == {"input_ids", "attention_mask"}
    assert batch["attention_mask"][1].tolist()[:1] == [0]
    assert bool(batch["attention_mask"][:, -1].all())


def test_task_without_a_tokenizer_is_said(tmp_path: Path) -> None:
    module = TextDataModule(write(tmp_path, [{"text": "x"}]))
    module.trainer = type("Run", (), {"lightning_module": LightningModule()})()  # type: ignore[assignment]
    with pytest.raises(ValueError, match=r"set data.init_args.pretrained"):
        module.setup("fit")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_length": 1}, "max_length=1"),
        ({"val_fraction": 1.0}, "val_fraction=1.0"),
        ({"val_fraction": 0.1, "streaming": True}, "val_fraction=0.1: .* 0 for streamed"),
        ({"packing": True, "group_by_length": True}, "group_by_length: packed"),
    ],
)
def test_impossible_arguments_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TextDataModule("x.txt", **arguments)
