"""From a row of a table to an example: token ids, and for each of them whether it is learned.

An example is {"input_ids": (T,), "labels": (T,)} as lists of int. A label is its token, or -100 where nothing is
learned: prompts, other people's turns, and always the first token, which nothing comes before.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

IGNORED = -100
"""The label of a token that is not learned; torch's cross_entropy leaves it out."""

KINDS = (("messages",), ("prompt", "completion"), ("text",))
"""The columns that a table of each kind has."""


@dataclass(frozen=True)
class Encoder:
    """Makes examples with a tokenizer.

    Args:
        tokenizer: transformers' tokenizer.
        kind: The columns that rows have, one of `KINDS`.
        limit: Tokens that the model takes.
        max_length: Tokens kept of a row; None refuses a row that is longer than `limit`.
        completion_only: Learn completions and the assistant's turns only, else every token.
    """

    tokenizer: Any
    kind: tuple[str, ...]
    limit: int | None = None
    max_length: int | None = None
    completion_only: bool = True

    def __call__(self, row: Mapping[str, Any]) -> dict[str, list[int]]:
        """Raises ValueError, with what and the remedy but not the row, when nothing can be learned from a row."""
        ids, learned = getattr(self, f"_{'_'.join(self.kind)}")(*(row[name] for name in self.kind))
        if not self.completion_only:
            learned = [True] * len(ids)
        check_length(ids, self.limit, self.max_length)
        whole = any(learned[1:])
        ids, learned = ids[: self.max_length], learned[: self.max_length]
        if not any(learned[1:]):
            cut = f"the first {self.max_length} tokens hold no target; raise max_length" if whole else ""
            raise ValueError(cut or f"{len(ids)} tokens, none of which can be learned; leave the row out")
        labels = [token if learn else IGNORED for token, learn in zip(ids, learned, strict=True)]
        return {"input_ids": ids, "labels": [IGNORED, *labels[1:]]}

    def prompt(self, row: Mapping[str, Any]) -> list[int]:
        """The tokens that a model continues: the prompt, the turns before the assistant's last, or the text."""
        if self.kind == ("text",):
            return self._ids("text", row["text"])
        if self.kind == ("messages",):
            turns = turns_of("messages", row["messages"])
            return self._chat(turns[:-1] if turns[-1]["role"] == "assistant" else turns, add_generation_prompt=True)
        return self._prompt(row["prompt"])

    def _text(self, text: Any) -> tuple[list[int], list[bool]]:
        ids = ended(self.tokenizer, self._ids("text", text))
        return ids, [True] * len(ids)

    def _prompt_completion(self, prompt: Any, completion: Any) -> tuple[list[int], list[bool]]:
        before = self._prompt(prompt)
        if isinstance(prompt, str):
            after = ended(self.tokenizer, self._ids("completion", completion, add_special_tokens=False))
        else:
            ids = self._chat([*prompt, *turns_of("completion", completion)])
            if ids[: len(before)] != before:
                raise ValueError("the chat template writes the prompt otherwise once an answer follows; give messages")
            after = ids[len(before) :]
        return before + after, [False] * len(before) + [True] * len(after)

    def _messages(self, messages: Any) -> tuple[list[int], list[bool]]:
        turns = turns_of("messages", messages)
        if not self.completion_only:
            ids = self._chat(turns)
            return ids, [True] * len(ids)
        if "generation" not in str(self._template()):
            raise ValueError(
                "the chat template has no {% generation %} marks around the assistant's turns; set chat_template to one "
                "that has, or completion_only: false to learn every turn"
            )
        found = self._templated(turns, return_assistant_tokens_mask=True)
        if not any(found["assistant_masks"]):
            raise ValueError("messages hold no turn of the assistant; leave the row out")
        return list(found["input_ids"]), [bool(learn) for learn in found["assistant_masks"]]

    def _prompt(self, prompt: Any) -> list[int]:
        if isinstance(prompt, str):
            return self._ids("prompt", prompt)
        return self._chat(turns_of("prompt", prompt), add_generation_prompt=True)

    def _ids(self, column: str, text: Any, **options: Any) -> list[int]:
        check_text(column, text)
        return list(self.tokenizer(text, verbose=False, **options)["input_ids"])

    def _chat(self, turns: list[Any], **options: Any) -> list[int]:
        return list(self._templated(turns, **options)["input_ids"])

    def _template(self) -> Any:
        if not self.tokenizer.chat_template:
            raise ValueError("the tokenizer has no chat template; set chat_template to a file that holds one")
        return self.tokenizer.get_chat_template()

    def _templated(self, turns: list[Any], **options: Any) -> Any:
        self._template()
        try:
            return self.tokenizer.apply_chat_template(turns, tokenize=True, return_dict=True, **options)
        except Exception as error:  # a template is a program, which raises what it likes
            said = str(error).split("\n")[0][:300]
            raise ValueError(
                f"the chat template cannot write these turns ({said}); mend the row, or chat_template"
            ) from None


def check_text(column: str, text: Any) -> None:
    """Raise ValueError when a cell holds no text."""
    if not isinstance(text, str):
        raise ValueError(f"{column} is {what_is(text)}, not text")
    if not text.strip():
        raise ValueError(f"{column} is empty; leave the row out")


def what_is(cell: Any) -> str:
    """A word for a cell that is not what it should be."""
    if cell is None:
        return "missing"
    return "empty" if isinstance(cell, (str, list)) and not cell else type(cell).__name__


def check_length(ids: list[int], limit: int | None, max_length: int | None) -> None:
    """Raise ValueError when a row is longer than the model takes, and nothing says to cut it."""
    if max_length is None and limit is not None and len(ids) > limit:
        raise ValueError(f"{len(ids)} tokens, the model takes {limit}; shorten it, or set max_length to cut rows")


def ended(tokenizer: Any, ids: list[int]) -> list[int]:
    """Tokens with the one that ends a text, which some tokenizers put there themselves."""
    end = tokenizer.eos_token_id
    return ids if end is None or ids[-1:] == [end] else [*ids, end]


def kind_of(columns: list[str], kinds: tuple[tuple[str, ...], ...] = KINDS) -> tuple[str, ...]:
    """Which of `kinds` a table with these columns is. Raises ValueError, which names the columns, for none."""
    for kind in kinds:
        if set(kind) <= set(columns):
            return kind
    wanted = ", or ".join(" and ".join(kind) for kind in kinds)
    raise ValueError(
        f"found the columns {', '.join(columns)}; wanted {wanted}: map them, as in columns: {{{kinds[-1][0]}: {columns[0]}}}"
    )


def turns_of(column: str, messages: Any) -> list[dict[str, Any]]:
    """The messages in a column. Raises ValueError, with what but not the row, where they are none."""
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"{column} is {what_is(messages)}, not a list of messages")
    for number, turn in enumerate(messages, 1):
        if not isinstance(turn, dict) or not isinstance(turn.get("role"), str) or turn.get("content") is None:
            raise ValueError(f"{column}: message {number} has no role and content")
    return messages
