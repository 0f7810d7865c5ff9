import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from lightning.pytorch import Trainer
from text_models import TOKENIZER, save_as
from torch import Tensor, nn
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from lightning_oft import OFTConfig, OFTFinetuning, inject, load_from_checkpoint, save_adapter, set_adapter
from lightning_oft.cli import main
from lightning_oft.data import PreferenceDataModule
from lightning_oft.model.reference import REFERENCE, keep_reference
from lightning_oft.model.traversal import adapter_names, walk
from lightning_oft.tasks import PreferenceOptimization
from lightning_oft.tasks.text.losses import log_probs, preference_losses
from lightning_oft.tasks.text.metrics import Preferences

ROOT = Path(__file__).parents[3]
SMALL = LlamaConfig(
    vocab_size=1024, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, mlp_bias=True,
    max_position_embeddings=64, tie_word_embeddings=False, bos_token_id=0, eos_token_id=1, pad_token_id=2,
    attention_dropout=0.5,
)  # fmt: skip
OFT = {"oft_block_size": 8, "use_cayley_neumann": False, "bias": "oft_only", "modules_to_save": ["lm_head"]}
"""An adapter that trains rotations, biases and a module."""
PAIRS = [{"prompt": f"Say {i}", "chosen": " yes" * (i % 3 + 1), "rejected": " no" * (i % 2 + 1)} for i in range(6)]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_as(LlamaForCausalLM, SMALL, tmp_path_factory.mktemp("llama"))


def task_of(base: str, **options: Any) -> PreferenceOptimization:
    return PreferenceOptimization(base, optimizer=partial(torch.optim.SGD, lr=1.0), **{"beta": 1.0, **options})


def data_of(tmp_path: Path, rows: Any = PAIRS, **options: Any) -> PreferenceDataModule:
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    names = dict.fromkeys(("train", "val", "test"), str(tmp_path / "pairs.jsonl"))
    return PreferenceDataModule(names, **{"batch_size": 3, **options})


def trainer(*callbacks: Any, **options: Any) -> Trainer:
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    return Trainer(
        accelerator="cpu", callbacks=[*callbacks], **{**quiet, "max_epochs": 1, "num_sanity_val_steps": 0, **options}
    )


def oft(**options: Any) -> OFTFinetuning:
    return OFTFinetuning(merge_on_fit_end=False, **options)


def batch() -> dict[str, Tensor]:
    ids = torch.randint(3, 1024, (4, 9))
    labels = ids.masked_fill(torch.arange(9) < 4, -100)
    return {"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids)}


def turn(model: nn.Module, adapter_name: str = "default") -> None:
    """Give an adapter other values of all that it trains."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)


FORMULAS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "sigmoid": lambda h, _: (1 + (-0.3 * h).exp()).log(),
    "robust": lambda h, _: (0.8 * (1 + (-0.3 * h).exp()).log() - 0.2 * (1 + (0.3 * h).exp()).log()) / 0.6,
    "ipo": lambda _, per_token: (per_token - 1 / 0.6) ** 2,
    "hinge": lambda h, _: (1 - 0.3 * h).clamp(min=0),
}


@pytest.mark.parametrize("loss", FORMULAS)
def test_loss_is_the_formula(loss: str) -> None:
    policy, reference = 9 * torch.randn(2, 2, 7, dtype=torch.float64)
    lengths = torch.randint(1, 9, (2, 7))
    chosen, rejected = policy - reference
    expected = FORMULAS[loss](chosen - rejected, chosen / lengths[0] - rejected / lengths[1])
    smoothing = 0.2 if loss == "robust" else 0.0
    torch.testing.assert_close(preference_losses(policy, reference, lengths, loss, 0.3, smoothing), expected)


def test_log_probability_is_the_sum_over_the_completion() -> None:
    logits, labels = torch.randn(2, 4, 7), torch.tensor([[-100, -100, 3, 5], [-100, 1, -100, -100]])
    scores = logits.log_softmax(-1)
    found, lengths = log_probs(logits, labels)
    torch.testing.assert_close(found, torch.stack([scores[0, 1, 3] + scores[0, 2, 5], scores[1, 0, 1]]))
    assert lengths.tolist() == [2, 1]


@pytest.mark.parametrize("starts_from", ["base", "adapter"])
def test_reference_is_the_start_to_the_bit_in_one_model(base: str, starts_from: str) -> None:
    torch.manual_seed(0)
    pairs, task, untouched = batch(), task_of(base), LlamaForCausalLM.from_pretrained(base).eval()
    inject(task.model, OFTConfig(**OFT))
    if starts_from == "adapter":
        turn(task.model)
        inject(untouched, OFTConfig(**OFT))
        turn(untouched)
    weights = sum(parameter.nbytes for name, parameter in task.named_parameters() if "oft_R" not in name)
    assert keep_reference(task.model) is (starts_from == "adapter")
    assert keep_reference(task.model) is (starts_from == "adapter")
    turn(task.model)
    policy, _ = task(pairs)
    found = task.reference(pairs)
    policy.sum().backward()  # what it needs is as it was
    expected, _ = log_probs(untouched(pairs["input_ids"], pairs["attention_mask"]).logits, pairs["labels"])
    assert torch.equal(found, expected.view(2, -1))
    assert float((found - policy.detach()).abs().min()) > 1e-3
    assert sum(parameter.nbytes for name, parameter in task.named_parameters() if "oft_R" not in name) == weights
    trained = {name for name, parameter in task.model.named_parameters() if parameter.grad is not None}
    assert trained == {name for name, parameter in task.model.named_parameters() if parameter.requires_grad}
    assert not [name for name in trained if REFERENCE in name]


def test_reference_of_several_active_adapters_is_refused(base: str) -> None:
    model = task_of(base).model
    for name in ("one", "two"):
        with pytest.warns() if name == "two" else torch.enable_grad():
            inject(model, OFTConfig(oft_block_size=8), name)
    set_adapter(model, ["one", "two"])
    turn(model)
    with pytest.raises(ValueError, match=r"adapters \['one', 'two'\] are active"):
        keep_reference(model)


def test_adapter_that_comes_too_late_to_be_copied_is_refused(base: str, tmp_path: Path) -> None:
    task = task_of(base)

    class Late(OFTFinetuning):
        def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
            super().on_fit_start(trainer, pl_module)
            nn.init.normal_(next(p for name, p in pl_module.named_parameters() if "oft_R" in name))

    with pytest.raises(ValueError, match=r"too late to be copied as its reference; merge it first"):
        trainer(Late(merge_on_fit_end=False, oft_block_size=8)).fit(task, data_of(tmp_path))


def test_fit_prefers_what_is_chosen_and_scores_are_means_over_pairs(base: str, tmp_path: Path) -> None:
    task, data = task_of(base), data_of(tmp_path)
    run = trainer(oft(**OFT), max_epochs=3)
    run.fit(task, data)
    assert {"train/accuracy", "val/accuracy", "val/loss", "val/margin"} <= run.callback_metrics.keys()
    (scores,) = trainer(oft(**OFT)).test(task, data_of(tmp_path, batch_size=4), verbose=False)
    whole = data.collate_fn([data.splits["test"][i] for i in range(6)])
    task.eval()
    with torch.no_grad():
        (policy, lengths), theirs = task(whole), task.reference(whole)
    margins = (policy - theirs)[0] - (policy - theirs)[1]
    expected = {
        "test/loss": float(preference_losses(policy, theirs, lengths, beta=1.0).mean()),
        "test/accuracy": float((margins > 0).float().mean()),
        "test/margin": float(margins.mean()),
    }
    assert scores == pytest.approx(expected, rel=1e-4)
    assert scores["test/accuracy"] > 0.9


def test_score_of_no_pair_that_differs_is_no_success() -> None:
    metric = Preferences()
    metric.update(torch.ones(2), torch.zeros(2, 2))
    assert {name: float(value) for name, value in metric.compute().items()} == {"loss": 1, "accuracy": 0, "margin": 0}


@pytest.mark.parametrize("adapted", [True, False])
def test_precomputed_reference_trains_alike(base: str, tmp_path: Path, adapted: bool) -> None:
    class Alike(PreferenceOptimization):
        """Compares with an untouched base, whatever the reference is said to be."""

        def _reference_of(self, batch: dict[str, Tensor], split: str) -> Tensor:
            task = PreferenceOptimization(base).eval()
            with torch.no_grad():
                found: Tensor = task(batch)[0]
            return found

    found = []
    for kind, precompute in ((PreferenceOptimization, True), (Alike, not adapted)):
        torch.manual_seed(0)
        task = kind(base, precompute_reference=precompute, optimizer=partial(torch.optim.SGD, lr=0.1))
        trainer(*([oft(**OFT)] if adapted else []), max_epochs=2).fit(task, data_of(tmp_path))
        found.append({name: one.detach() for name, one in task.named_parameters()})
    torch.testing.assert_close(found[0], found[1])


def test_full_finetuning_remembers_its_reference(base: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no adapter: .* adapt it with OFT, or set precompute_reference: true"):
        trainer().fit(task_of(base), data_of(tmp_path))
    task, data = task_of(base, precompute_reference=True), data_of(tmp_path)
    run = trainer(max_epochs=2)
    run.fit(task, data)
    run.save_checkpoint(tmp_path / "run.ckpt")
    (expected,) = trainer().test(task, data, verbose=False)
    assert expected["test/margin"] > 0
    loaded = PreferenceOptimization.load_from_checkpoint(tmp_path / "run.ckpt")
    assert trainer().test(loaded, data, verbose=False) == [pytest.approx(expected)]
    for rows in (PAIRS[::-1], PAIRS * 2):
        with pytest.raises(ValueError, match="test: the reference's log-probabilities were computed of other data"):
            trainer().test(loaded, data_of(tmp_path, rows), verbose=False)


def test_fit_from_an_adapter_is_compared_with_it_and_resumes(base: str, tmp_path: Path) -> None:
    sft = task_of(base)
    inject(sft.model, OFTConfig(**OFT))
    turn(sft.model)
    save_adapter(sft.model, tmp_path / "sft")
    start, data = {"pretrained_adapter": str(tmp_path / "sft")}, data_of(tmp_path)
    task = task_of(base)
    (before,) = trainer(oft(**start)).test(task, data, verbose=False)
    assert before["test/margin"] == before["test/accuracy"] == 0
    assert adapter_names(walk(task.model)) == []
    run = trainer(oft(**start))
    run.fit(task, data)
    run.save_checkpoint(tmp_path / "run.ckpt")
    assert adapter_names(walk(task.model)) == ["default", REFERENCE]
    pairs = batch()
    expected = sft.eval()(pairs)[0]
    assert torch.equal(task.reference(pairs), expected)
    loaded = load_from_checkpoint(PreferenceOptimization, tmp_path / "run.ckpt")
    assert torch.equal(loaded.reference(pairs), expected)
    again = task_of(base)
    trainer(oft(**start), max_epochs=2).fit(again, data, ckpt_path=str(tmp_path / "run.ckpt"))
    assert torch.equal(again.reference(pairs), expected)


def test_a_later_fit_keeps_the_reference_of_the_first(base: str, tmp_path: Path) -> None:
    task, data = task_of(base), data_of(tmp_path)
    run = trainer(oft(**OFT))
    run.fit(task, data)
    run.save_checkpoint(tmp_path / "run.ckpt")
    for one in (task, load_from_checkpoint(PreferenceOptimization, tmp_path / "run.ckpt")):
        trainer(oft(**OFT)).fit(one.train(), data)
        assert adapter_names(walk(one.model)) == ["default"]


def test_merged_export_holds_no_reference(base: str, tmp_path: Path) -> None:
    sft = task_of(base)
    inject(sft.model, OFTConfig(**OFT))
    turn(sft.model)
    save_adapter(sft.model, tmp_path / "sft")
    task = task_of(base)
    callback = OFTFinetuning(pretrained_adapter=str(tmp_path / "sft"), export_dir=str(tmp_path / "out"))
    trainer(callback).fit(task, data_of(tmp_path))
    pairs = batch()
    merged = LlamaForCausalLM.from_pretrained(tmp_path / "out" / "merged")
    torch.testing.assert_close(merged(pairs["input_ids"]).logits, task.eval().model(pairs["input_ids"]).logits)
    assert not list((tmp_path / "out").rglob("*reference*"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"loss": "dpo"}, "loss='dpo': must be one of sigmoid, robust, ipo, hinge"),
        ({"beta": 0.0}, "beta=0.0: must be above 0"),
        ({"loss": "robust", "label_smoothing": 0.5}, r"label_smoothing=0.5: is a share of wrong pairs, in \[0, 0.5\)"),
        ({"label_smoothing": 0.1}, "label_smoothing=0.1: sigmoid has none; set loss: robust"),
    ],
)
def test_impossible_arguments_are_refused(base: str, arguments: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PreferenceOptimization(base, **arguments)


def test_batch_of_another_shape_is_refused(base: str) -> None:
    with pytest.raises(ValueError, match=r"found \['input_ids'\]; a batch is a dict of attention_mask, input_ids"):
        task_of(base)({"input_ids": torch.zeros(2, 3)})


def test_recipe_runs_with_a_small_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data_of(tmp_path)
    monkeypatch.chdir(tmp_path)
    words = ["fit", "--config", str(ROOT / "configs/recipes/text-dpo.yaml"), "--data.init_args.data", "pairs.jsonl"]
    words += ["--model.init_args.pretrained", str(TOKENIZER), "--model.init_args.dtype", "float32"]
    words += ["--data.init_args.max_length", "64", "--data.init_args.val_fraction", "0.2"]
    words += ["--model.init_args.generation", "{max_new_tokens: 2}", "--trainer.precision", "32-true"]
    words += ["--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false", "--trainer.logger", "false"]
    assert main(words) == 0
    assert {path.name for path in (tmp_path / "runs" / "text-dpo").iterdir()} >= {"adapter", "merged"}


@pytest.mark.filterwarnings("ignore")  # TRL's own
@pytest.mark.parametrize("loss", FORMULAS)
def test_loss_and_gradient_are_those_of_trl(base: str, tmp_path: Path, loss: str) -> None:
    import trl

    pairs, smoothing = batch(), 0.2 if loss == "robust" else 0.0
    task = task_of(base, loss=loss, beta=0.3, label_smoothing=smoothing).eval()
    turn(task.model)
    theirs = LlamaForCausalLM.from_pretrained(base).eval()
    theirs.load_state_dict(task.model.state_dict())
    config = trl.DPOConfig(
        str(tmp_path), loss_type=loss, beta=0.3, label_smoothing=smoothing, report_to="none", use_cpu=True, bf16=False
    )
    rows = datasets.Dataset.from_list(PAIRS)
    oracle = trl.DPOTrainer(theirs, LlamaForCausalLM.from_pretrained(base), config, train_dataset=rows,
                            processing_class=AutoTokenizer.from_pretrained(base))  # fmt: skip
    theirs.eval()
    given = {**{k: pairs[k] for k in ("input_ids", "attention_mask")}, "completion_mask": (pairs["labels"] >= 0).long()}
    expected = oracle.compute_loss(theirs, given)
    policy, lengths = task(pairs)
    reference_model = task_of(base).eval()
    found = preference_losses(policy, reference_model(pairs)[0].detach(), lengths, loss, 0.3, smoothing).mean()
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    found.backward()
    expected.backward()
    for mine, other in zip(task.model.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad, atol=1e-5, rtol=1e-4)
