import json
from pathlib import Path
from typing import Any

import datasets
import pytest

from lightning_oft.data import PreferenceDataModule

BASE = str(Path(__file__).parents[3] / "examples" / "bases" / "docs-llama")
ASK = [{"role": "user", "content": "Who?"}]
HE, SHE = ([{"role": "assistant", "content": name}] for name in ("He.", "She."))
PAIR = {"prompt": "Who?", "chosen": " He.", "rejected": " She is."}


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


def set_up(tmp_path: Path, rows: list[Any], **arguments: Any) -> PreferenceDataModule:
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    module = PreferenceDataModule({"train": str(file), "test": str(file)}, pretrained=BASE, **arguments)
    module.setup("fit")
    return module


@pytest.mark.parametrize(
    ("row", "arguments", "expected"),
    [
        (PAIR, {}, [" He.<|end|>", " She is.<|end|>"]),
        ({"prompt": ASK, "chosen": HE, "rejected": SHE}, {}, [" He.<|end|>\n", " She.<|end|>\n"]),
        ({"chosen": ASK + HE, "rejected": ASK + SHE}, {}, [" He.<|end|>\n", " She.<|end|>\n"]),
        ({**PAIR, "better": "x"}, {"columns": {"chosen": "better"}}, ["x<|end|>", " She is.<|end|>"]),
    ],
)
def test_what_is_compared(tmp_path: Path, row: Any, arguments: Any, expected: list[str]) -> None:
    module = set_up(tmp_path, [row], **arguments)
    (batch,) = module.train_dataloader()
    learned = [[int(token) for token in labels if token >= 0] for labels in batch["labels"]]
    assert [module.processor.decode(tokens) for tokens in learned] == expected
    (prompts,) = module.predict_dataloader()[0]
    (prompt,) = module.processor.batch_decode(prompts["input_ids"])
    whole = module.processor.decode(batch["input_ids"][0][batch["attention_mask"][0].bool()])
    assert whole == prompt + expected[0]


def test_chosen_come_before_rejected_and_rows_are_numbered_in_their_split(tmp_path: Path) -> None:
    rows = [{"prompt": "Say", "chosen": f" {i}", "rejected": " no no no"} for i in range(9)]
    module = set_up(tmp_path, rows, batch_size=4, val_fraction=0.5)
    assert [len(module.splits[name]) for name in ("train", "val", "test")] == [4, 5, 9]  # type: ignore[arg-type]
    (batch,) = module.train_dataloader()
    assert sorted(batch["row"].tolist()) == [0, 1, 2, 3]
    for place, row in enumerate(batch["row"].tolist()):
        example: Any = module.splits["train"][row]
        for side, ids in (("chosen", batch["input_ids"][place]), ("rejected", batch["input_ids"][4 + place])):
            assert ids[: len(example[side])].tolist() == example[side]


BAD: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({"prompt": "a", "chosen": "b"}, {}, r"train: found the columns prompt, chosen; wanted prompt and chosen and reje.*"
     r"or chosen and rejected: map them, as in columns: \{chosen: prompt\}"),
    ({**PAIR, "rejected": " "}, {}, "train, row 2: rejected: completion is empty; leave the row out"),
    ({**PAIR, "chosen": None}, {}, "train, row 2: chosen: completion is missing, not text"),
    ({**PAIR, "prompt": ""}, {}, "train, row 2: chosen: prompt is empty"),
    ({**PAIR, "rejected": " He."}, {}, "train, row 2: chosen and rejected are the same; leave the row out"),
    ({**PAIR, "rejected": "word " * 300}, {}, "train, row 2: rejected: .* tokens, the model takes 256"),
    ({**PAIR, "prompt": "word " * 9}, {"max_length": 6}, "train, row 2: chosen: the first 6 tokens hold no target"),
]  # fmt: skip


@pytest.mark.parametrize(("row", "arguments", "message"), BAD, ids=[message for *_, message in BAD])
def test_bad_row_is_one_line_that_names_it(tmp_path: Path, row: Any, arguments: Any, message: str) -> None:
    good = PAIR if row.keys() == PAIR.keys() else row
    with pytest.raises(ValueError, match=message) as error:
        set_up(tmp_path, [good, row], **arguments)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"chosen": HE, "rejected": SHE}, "row 1: chosen and rejected begin with no turn in common"),
        ({"chosen": ASK + HE, "rejected": ASK}, "row 1: rejected: completion is empty, not a list of messages"),
        ({"chosen": ASK, "rejected": []}, "row 1: rejected is empty, not a list of messages"),
    ],
)
def test_bad_chats_are_one_line_that_names_the_row(tmp_path: Path, row: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        set_up(tmp_path, [row])


def test_streamed_pairs_are_checked_as_they_are_reached(tmp_path: Path) -> None:
    module = set_up(tmp_path, [PAIR, {**PAIR, "rejected": ""}], streaming=True, batch_size=1)
    with pytest.raises(ValueError, match="train, row 2: rejected: completion is empty"):
        list(module.train_dataloader())
