from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from lightning.pytorch import Trainer
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BloomConfig,
    BloomForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from lightning_oft import OFTFinetuning
from lightning_oft.callback.samples import Samples
from lightning_oft.data import TextDataModule
from lightning_oft.data.text.batches import pack, pad
from lightning_oft.tasks import CausalLM
from lightning_oft.tasks.text.generation import check_packing
from lightning_oft.tasks.text.losses import token_losses

TOKENIZER = Path(__file__).parents[3] / "examples" / "bases" / "docs-llama"
SMALL = LlamaConfig(
    vocab_size=1024, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
    max_position_embeddings=64, tie_word_embeddings=True, bos_token_id=0, eos_token_id=1, pad_token_id=2,
)  # fmt: skip
LENGTHS = (5, 9, 2, 7, 3, 12, 4, 6)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    model = LlamaForCausalLM(SMALL)
    model.model.embed_tokens.weight.data.mul_(20)  # so that tokens matter
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(TOKENIZER).save_pretrained(folder)
    return str(folder)


def examples() -> list[dict[str, list[int]]]:
    """Documents of unlike length, of each of which the second half is learned."""
    made = []
    for length in LENGTHS:
        ids = torch.randint(3, 1024, (length,)).tolist()
        made.append({"input_ids": ids, "labels": [-100] * (length // 2) + ids[length // 2 :]})
        made[-1]["labels"][0] = -100
    return made


def trainer(**options: Any) -> Trainer:
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    return Trainer(accelerator="cpu", max_epochs=1, **{**quiet, **options})


def batches(size: int, rows: list[Any]) -> Any:
    return DataLoader(rows, batch_size=size, collate_fn=partial(pad, pad_token_id=2))  # type: ignore[arg-type]


def test_loss_is_the_formula() -> None:
    logits, labels = torch.randn(2, 5, 7), torch.tensor([[-100, 3, 4, -100, 6], [-100, -100, 0, 1, -100]])
    expected = torch.zeros(2, 4)
    for row in range(2):
        for place in range(1, 5):
            if labels[row, place] != -100:
                scores = logits[row, place - 1]
                expected[row, place - 1] = scores.exp().sum().log() - scores[labels[row, place]]
    torch.testing.assert_close(token_losses(logits, labels), expected)


@pytest.mark.filterwarnings("ignore")  # TRL's own
def test_loss_and_gradient_are_those_of_trl(base: str, tmp_path: Path) -> None:
    """Over all tokens of a step, of which this batch has a part."""
    import trl

    task, theirs = CausalLM(base), LlamaForCausalLM.from_pretrained(base)
    config = trl.SFTConfig(str(tmp_path), report_to="none", use_cpu=True, bf16=False)
    oracle = trl.SFTTrainer(theirs, config, train_dataset=datasets.Dataset.from_list([{"text": "x"}]),
                            processing_class=AutoTokenizer.from_pretrained(base))  # fmt: skip
    batch, count = pad(examples(), 2), torch.tensor(100)
    expected = oracle.compute_loss(theirs.train(), dict(batch), num_items_in_batch=count)
    found = token_losses(task(batch), batch["labels"]).sum() / count
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    found.backward()
    expected.backward()
    for mine, other in zip(task.model.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_documents_have_the_losses_that_they_have_alone(base: str, attention: str) -> None:
    task = CausalLM(base)
    task.model.set_attn_implementation(attention)
    documents = examples()
    alone = {}
    for document in documents:
        batch = pad([document], 2)
        alone[tuple(document["input_ids"])] = token_losses(task(batch), batch["labels"])[0]
    found = 0
    for order in (documents, documents[::-1]):
        for rows in (pack(order, 20), [pack([document], 64)[0] for document in order]):
            batch = pad(rows, 2)
            losses = token_losses(task(batch), batch["labels"])
            for row, places, ids in zip(losses, batch["position_ids"], batch["input_ids"], strict=True):
                starts = [*(places == 0).nonzero().flatten().tolist(), len(places)]
                for start, end in pairwise(starts):
                    if (known := alone.get(tuple(ids[start:end].tolist()))) is not None:
                        torch.testing.assert_close(row[start : end - 1], known, atol=1e-5, rtol=1e-5)
                        found += 1
    assert found == 4 * len(documents)


def test_model_that_lets_packed_documents_see_each_other_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    check_packing(LlamaForCausalLM(SMALL))
    with pytest.raises(ValueError, match="packing: BloomForCausalLM lets the documents of a row see each other"):
        check_packing(BloomForCausalLM(BloomConfig(hidden_size=8, n_layer=1, n_head=1, vocab_size=8)))
    model = GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=8))
    called = model.forward
    monkeypatch.setattr(model, "forward", lambda **inputs: called(**{**inputs, "attention_mask": torch.ones(2, 4)}))
    with pytest.raises(ValueError, match="packing: GPT2LMHeadModel lets the documents of a row see each other"):
        check_packing(model)


def test_a_step_has_the_mean_over_its_tokens_however_they_are_cut_into_batches(base: str) -> None:
    def gradients(size: int, accumulate: int, rows: list[Any]) -> list[Tensor]:
        task = CausalLM(base, optimizer=partial(torch.optim.SGD, lr=1.0))
        before = [p.detach().clone() for p in task.parameters()]
        trainer(accumulate_grad_batches=accumulate).fit(task, batches(size, rows), batches(8, rows))
        return [b - a.detach() for b, a in zip(before, task.parameters(), strict=True)]

    documents = examples()
    task = CausalLM(base)
    whole = pad(documents, 2)
    losses = token_losses(task(whole), whole["labels"])
    (losses.sum() / (whole["labels"] >= 0).sum()).backward()
    expected = [p.grad for p in task.parameters()]
    for size, accumulate, rows in (
        (8, 1, documents),
        (1, 8, documents),
        (3, 8, documents),
        (1, 8, pack(documents, 20)),
    ):
        torch.testing.assert_close(gradients(size, accumulate, rows), expected, atol=1e-6, rtol=1e-4)


def test_scores_are_means_over_tokens(base: str) -> None:
    task = CausalLM(base)
    documents = examples()
    (scores,) = trainer().test(task, batches(3, documents), verbose=False)
    whole = pad(documents, 2)
    logits, targets = task(whole)[:, :-1], whole["labels"][:, 1:]
    loss = torch.nn.functional.cross_entropy(logits[targets >= 0], targets[targets >= 0])
    right = (logits.argmax(-1) == targets)[targets >= 0].float().mean()
    expected = {"test/loss": loss.item(), "test/perplexity": loss.exp().item(), "test/accuracy": float(right)}
    assert scores == pytest.approx(expected, rel=1e-5)


def test_checkpointing_changes_no_gradient_and_noise_only_training(base: str) -> None:
    batch = pad(examples(), 2)

    def gradient(**options: Any) -> Tensor:
        task = CausalLM(base, **options)
        task.model.model.embed_tokens.requires_grad_(False)  # as OFT leaves it
        token_losses(task(batch), batch["labels"]).sum().backward()
        return torch.as_tensor(task.model.model.layers[0].mlp.up_proj.weight.grad)

    torch.testing.assert_close(gradient(activation_checkpointing=True), gradient())
    noisy, plain = CausalLM(base, neftune_alpha=5.0), CausalLM(base)
    assert not torch.allclose(noisy(batch), plain(batch))
    torch.testing.assert_close(noisy.eval()(batch), plain.eval()(batch))


def test_noise_has_the_size_of_its_definition(base: str) -> None:
    task = CausalLM(base, neftune_alpha=5.0)
    embeddings = task.model.get_input_embeddings()
    ids = torch.randint(1024, (4, 9))
    noise = embeddings(ids) - embeddings.weight[ids]
    assert 0.95 * 5 / (9 * 16) ** 0.5 < float(noise.detach().abs().max()) <= 5 / (9 * 16) ** 0.5 + 1e-6


def test_new_tokens_are_said_trained_and_written(base: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        task = CausalLM(base, new_tokens=["<a>", "<b>"], optimizer=partial(torch.optim.SGD, lr=1.0))
    assert "stay frozen with OFT unless they train whole: oft.modules_to_save: [model.embed_tokens]" in caplog.text
    row = [0, 1024, 1025, 1]
    callback = OFTFinetuning(oft_block_size=8, modules_to_save=["embed_tokens"], export_dir=str(tmp_path))
    before = task.model.model.embed_tokens.weight[1024:].detach().clone()
    rows = [{"input_ids": row, "labels": [-100, *row[1:]]}]
    trainer(callbacks=[callback]).fit(task, batches(1, rows), batches(1, rows))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert tokenizer("<a><b>").input_ids == row[:3]
    assert not torch.equal(merged.get_input_embeddings().weight[1024:], before)
    torch.testing.assert_close(merged.state_dict(), task.model.state_dict())


@pytest.mark.parametrize("enabled", [True, False])
def test_samples_are_logged_after_validation_and_disturb_nothing(
    base: str, caplog: pytest.LogCaptureFixture, enabled: bool
) -> None:
    task = CausalLM(base, prompts=["One", "Two"], generation={"max_new_tokens": 3, "do_sample": True})
    loader = batches(4, examples())
    modes, state = [m.training for m in task.modules()], torch.get_rng_state()
    assert task.samples() == task.samples()
    assert torch.equal(state, torch.get_rng_state())
    assert modes == [m.training for m in task.modules()]
    with caplog.at_level("INFO"):
        run = trainer(callbacks=[OFTFinetuning(enabled, oft_block_size=8, merge_on_fit_end=False), Samples()])
        run.fit(task, loader, loader)
    assert [line for line in caplog.messages if line.startswith("step 2: One")]
    assert [line for line in caplog.messages if line.startswith("step 2: Two")]


def test_predictions_continue_their_prompts_whatever_the_padding(base: str) -> None:
    task = CausalLM(base, generation={"max_new_tokens": 4})
    prompts = [{"input_ids": [0, 7, 8, 9]}, {"input_ids": [0, 7]}]
    loader: Any = DataLoader(prompts, 2, collate_fn=partial(pad, pad_token_id=2, side="left"))  # type: ignore[arg-type]
    together = trainer().predict(task, loader)
    alone = trainer().predict(task, DataLoader(prompts, 1, collate_fn=partial(pad, pad_token_id=2)))  # type: ignore[arg-type]
    assert together == [[texts[0] for texts in alone or []]]


def test_the_prompts_of_a_data_modules_test_sets_are_continued(base: str, tmp_path: Path) -> None:
    (tmp_path / "new.txt").write_text("one\ntwo\nthree\n")
    task = CausalLM(base, generation={"max_new_tokens": 2})
    texts: Any = trainer().predict(task, TextDataModule({"new": str(tmp_path / "new.txt")}, batch_size=2))
    assert [len(batch) for batch in texts] == [2, 1]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"neftune_alpha": -1.0}, ValueError, "neftune_alpha=-1.0"),
        ({"new_tokens": ["<|end|>"]}, ValueError, r"new_tokens: '<\|end\|>' is in the vocabulary already"),
        ({"pretrained": "./none"}, FileNotFoundError, "./none: no such folder"),
    ],
)
def test_impossible_arguments_are_refused(base: str, arguments: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        CausalLM(**{"pretrained": base, **arguments})


@pytest.mark.parametrize(("wrong", "found"), [([torch.zeros(1)], "list"), ({"input_ids": 1}, r"\['input_ids'\]")])
def test_batch_of_another_shape_is_refused(base: str, wrong: Any, found: str) -> None:
    with pytest.raises(ValueError, match=f"found {found}; a batch is a dict of input_ids"):
        CausalLM(base).validation_step(wrong, 0)
