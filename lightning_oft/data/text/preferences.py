"""PreferenceDataModule: pairs of completions of one prompt, of which one was preferred to the other."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from lightning_oft.data.text.batches import pad
from lightning_oft.data.text.examples import Encoder, turns_of
from lightning_oft.data.text.rows import PlacedDataModule

SIDES = ("chosen", "rejected")


class PreferenceEncoder(Encoder):
    """Makes examples of pairs: {"chosen", "chosen_labels", "rejected", "rejected_labels"}, as Encoder makes those of
    prompts with completions."""

    @override
    def __call__(self, row: Mapping[str, Any]) -> dict[str, list[int]]:
        prompt, *completions = self._parts(row)
        if completions[0] == completions[1]:
            raise ValueError("chosen and rejected are the same; leave the row out")
        single = Encoder(self.tokenizer, ("prompt", "completion"), self.limit, self.max_length)
        example: dict[str, list[int]] = {}
        for side, completion in zip(SIDES, completions, strict=True):
            try:
                made = single({"prompt": prompt, "completion": completion})
            except ValueError as error:
                raise ValueError(f"{side}: {error}") from None
            example |= {side: made["input_ids"], f"{side}_labels": made["labels"]}
        return example

    @override
    def prompt(self, row: Mapping[str, Any]) -> list[int]:
        return self._prompt(self._parts(row)[0])

    def _parts(self, row: Mapping[str, Any]) -> tuple[Any, Any, Any]:
        """Prompt and completions; without a column prompt, the turns that two chats begin with in common are it."""
        if "prompt" in self.kind:
            return row["prompt"], row["chosen"], row["rejected"]
        chosen, rejected = (turns_of(side, row[side]) for side in SIDES)
        pairs = enumerate(zip(chosen, rejected, strict=False))
        start = next((i for i, (one, other) in pairs if one != other), min(len(chosen), len(rejected)))
        if start == 0:
            raise ValueError("chosen and rejected begin with no turn in common; give the prompt a column of its own")
        return chosen[:start], chosen[start:], rejected[start:]


def pad_pairs(examples: Sequence[Mapping[str, Any]], pad_token_id: int) -> dict[str, Tensor]:
    """B examples of pairs as a batch: (2B, L), chosen before rejected; and their rows, where they are known."""
    sides = [{"input_ids": one[side], "labels": one[f"{side}_labels"]} for side in SIDES for one in examples]
    batch = pad(sides, pad_token_id)
    if "row" in examples[0]:
        batch["row"] = torch.tensor([one["row"] for one in examples])
    return batch


class PreferenceDataModule(PlacedDataModule):
    """Pairs to learn a preference from, read by `datasets`; every row is checked before the run begins.

    A table has columns prompt, chosen and rejected (text or messages), or chosen and rejected alone: chats that begin
    alike. Batches of B pairs are {"input_ids", "labels", "attention_mask"} (2B, L) int64, the B chosen completions before
    the B rejected ones, labels -100 on prompts and padding; and "row" (B,) int64, the pairs' places in their split.

    Args:
        chat_template: File with a chat template in the place of the tokenizer's.
        table: Arguments of TableDataModule, but group_by_length.

    Raises:
        OSError: When there is nothing at `data`, on setup.
        ValueError: When an argument is out of its range; on setup, one line that names the first row of no use.
    """

    columns = ("input_ids", "labels", "attention_mask", "row")
    kinds = (("prompt", *SIDES), SIDES)
    collate = staticmethod(pad_pairs)

    @override
    def encoder(self, kind: tuple[str, ...], limit: int | None) -> Encoder:
        return PreferenceEncoder(self.processor, kind, limit, self.max_length)
