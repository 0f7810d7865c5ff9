"""Wrong rows of text, and reward functions that fail."""

from __future__ import annotations

import json
import math
import shutil
from functools import partial
from typing import Any
from unittest.mock import patch

import datasets
import torch
from bad_inputs.table import ROOT, Bench, Mistake
from lightning.pytorch import Trainer

from lightning_oft import OFTFinetuning
from lightning_oft.data import PromptDataModule, TextDataModule
from lightning_oft.tasks import PolicyOptimization

LLAMA = str(ROOT / "examples" / "bases" / "docs-llama")


CHAT = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}]


def _rows(
    name: str, content: Any, error: type[Exception], where: str, what: str, remedy: str, template: str | None = ""
) -> Mistake:
    """A file of rows that a data module reads; with the tokenizer's own template, another one, or None."""

    def make(bench: Bench) -> None:
        lines = content if isinstance(content, bytes) else "".join(json.dumps(row) + "\n" for row in content)
        file = bench.text("rows.jsonl", lines)
        datasets.disable_progress_bars()
        pretrained = LLAMA
        if template is None:
            pretrained = str(bench.directory / "tokenizer")
            shutil.copytree(LLAMA, pretrained, ignore=shutil.ignore_patterns("*.safetensors", "*.jinja"))
        options = {"chat_template": str(bench.text("template.jinja", template))} if template else {}
        with patch.object(datasets.config, "HF_DATASETS_CACHE", bench.directory / "cache"):
            TextDataModule(str(file), pretrained=pretrained, **options).setup("fit")

    return Mistake(name, "data", make, error, where, what, remedy)


def no_number(completions: list[str], **_: Any) -> list[float]:
    return [0.0, math.nan][: len(completions)]


def no_answer(completions: list[str], **_: Any) -> list[float]:
    raise KeyError("answer")


def _reward(name: str, reward: Any, where: str, what: str, remedy: str) -> Mistake:
    """A fit whose function fails; the task is as it was when the fit began."""

    def make(bench: Bench) -> None:
        file = bench.text("prompts.jsonl", '{"prompt": "Return"}\n')
        datasets.disable_progress_bars()
        task = PolicyOptimization(
            LLAMA, [reward], num_generations=2, max_completion_length=2, optimizer=partial(torch.optim.SGD, lr=1.0)
        )
        quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
        trainer: Any = Trainer(accelerator="cpu", max_epochs=1, callbacks=[OFTFinetuning(oft_block_size=32)], **quiet)  # type: ignore[arg-type]
        before = {key: value.clone() for key, value in task.state_dict().items()}
        with patch.object(datasets.config, "HF_DATASETS_CACHE", bench.directory / "cache"):
            try:
                trainer.fit(task, PromptDataModule({"train": str(file)}))
            finally:
                after = {key: value for key, value in task.state_dict().items() if "oft_R" not in key}
                assert all(torch.equal(after[key], value) for key, value in before.items())

    return Mistake(name, "reward", make, ValueError, where, what, remedy, varies=True)


DATA = [
    _rows("a column of another name", [{"body": "a"}], ValueError, "train: found the columns body", "wanted messages, or prompt and completion, or text",
        "map them, as in columns: {text: body}"),
    _rows("an empty text", [{"text": "a"}, {"text": " "}], ValueError, "train, row 2", "text is empty", "leave the row out"),
    _rows("a row longer than the model", [{"text": "word " * 400}], ValueError, "train, row 1", "the model takes 256", "shorten it, or set max_length to cut rows"),
    _rows("a chat without a template", CHAT, ValueError, "train, row 1", "the tokenizer has no chat template", "set chat_template to a file that holds one",
        template=None),
    _rows("a chat template without marks", CHAT, ValueError, "train, row 1", "no {% generation %} marks", "completion_only: false", template="{{ messages }}"),
    _rows("turns that a chat template refuses", CHAT, ValueError, "train, row 1", "the chat template cannot write these turns (no user)", "mend the row, or chat_template",
        template="{% generation %}{{ raise_exception('no user') }}{% endgeneration %}"),
    _rows("text in another encoding", '{"text": "tea"}\n{"text": "caf\xe9"}\n'.encode("latin-1"), ValueError, "rows.jsonl, line 2", "byte 14 is not UTF-8",
        "convert the file"),
    _reward("a reward that is no number", no_number, "reward bad_inputs.text.no_number, row 1", "gave nan (", "a reward is a finite number, or None"),
    _reward("a reward function that raises", no_answer, "reward bad_inputs.text.no_answer, row 1", "raised KeyError: 'answer'", "raised KeyError"),
]  # fmt: skip
