from __future__ import annotations

import json
import math
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from lightning.pytorch import Trainer
from text_models import save_as
from torch import Tensor
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from lightning_oft import OFTConfig, OFTFinetuning, inject
from lightning_oft.data import PromptDataModule
from lightning_oft.model.reference import REFERENCE
from lightning_oft.model.traversal import adapter_names, merged_layers, walk
from lightning_oft.tasks import PolicyOptimization
from lightning_oft.tasks.text.completions import Sampled
from lightning_oft.tasks.text.losses import POLICY_LOSSES, divergences, group_advantages, policy_losses

ROOT = Path(__file__).parents[3]
SMALL = LlamaConfig(
    vocab_size=1024, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
    max_position_embeddings=64, tie_word_embeddings=False, bos_token_id=0, eos_token_id=1, pad_token_id=2,
)  # fmt: skip
ROWS = [
    {"prompt": prompt, "wanted": wanted} for prompt, wanted in [("Say it", "e"), ("Read", "a"), ("The list of", "t")]
]
CALLS: list[dict[str, Any]] = []


def share(completions: list[str], wanted: list[str], **_: Any) -> list[float]:
    return [text.count(letter) / max(len(text), 1) for text, letter in zip(completions, wanted, strict=True)]


def short(completion_ids: list[list[int]], **given: Any) -> list[float | None]:
    CALLS.append({"completion_ids": completion_ids, **given})
    return [-len(ids) if len(ids) % 2 else None for ids in completion_ids]


def raises(**_: Any) -> list[float]:
    raise KeyError("answer")


def nan(completions: list[str], wanted: list[str], **_: Any) -> list[float]:
    return [math.nan if letter == "a" else 0.0 for letter in wanted]


def silent(completions: list[str], **_: Any) -> list[None]:
    return [None] * len(completions)


def few(**_: Any) -> list[float]:
    return [1.0]


@pytest.fixture(autouse=True)
def no_calls() -> None:
    CALLS.clear()


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_as(LlamaForCausalLM, SMALL, tmp_path_factory.mktemp("llama"))


def task_of(base: str, *rewards: Any, **options: Any) -> PolicyOptimization:
    given = {"num_generations": 3, "max_completion_length": 5, **options}
    return PolicyOptimization(base, list(rewards or [share]), optimizer=partial(torch.optim.SGD, lr=1.0), **given)


def data_of(tmp_path: Path, rows: Any = ROWS, **options: Any) -> PromptDataModule:
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    names = dict.fromkeys(("train", "val", "test"), str(tmp_path / "prompts.jsonl"))
    return PromptDataModule(names, **{"batch_size": 2, **options})


def trainer(*callbacks: Any, **options: Any) -> Trainer:
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    oft = OFTFinetuning(merge_on_fit_end=False, oft_block_size=8)
    given = {**quiet, "max_epochs": 1, "num_sanity_val_steps": 0, **options}
    return Trainer(accelerator="cpu", callbacks=[*(callbacks or [oft])], **given)


def generators(task: PolicyOptimization) -> list[Tensor]:
    return [tensor.clone() for name, tensor in task.state_dict().items() if "oft_R" in name]


def sampled(task: PolicyOptimization) -> Sampled:
    """Six completions of four tokens, two of them ended early, after prompts of three, padded and not."""
    ids = torch.randint(3, 1024, (6, 7))
    mask = torch.arange(4)[None] < torch.tensor([4, 4, 2, 4, 1, 4])[:, None]
    prompt_mask = (torch.arange(3)[None] >= torch.tensor([0, 0, 1, 1, 2, 0])[:, None]).long()
    old = task(ids, torch.cat([prompt_mask, mask.long()], 1), 4).detach() + 0.3 * torch.randn(6, 4)
    advantages = torch.randn(6)
    return Sampled(ids, torch.cat([prompt_mask, mask.long()], 1), mask, torch.zeros(1, 6), advantages, old=old)


@pytest.mark.filterwarnings("ignore")  # TRL's own
@pytest.mark.parametrize("loss", POLICY_LOSSES)
@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_loss_and_gradient_are_those_of_trl(base: str, tmp_path: Path, loss: str, beta: float) -> None:
    import trl

    torch.manual_seed(0)
    task = task_of(base, loss=loss, beta=beta, max_completion_length=9, epsilon=0.2, epsilon_high=0.28).eval()
    theirs = LlamaForCausalLM.from_pretrained(base).eval()
    one = sampled(task)
    one.reference = task(one.input_ids, one.attention_mask, 4).detach() + 0.3 * torch.randn(6, 4)
    config = trl.GRPOConfig(
        str(tmp_path), loss_type=loss, epsilon=0.2, epsilon_high=0.28, max_completion_length=9, num_generations=3,
        per_device_train_batch_size=6, report_to="none", use_cpu=True, bf16=False,
    )  # fmt: skip
    oracle = trl.GRPOTrainer(theirs, lambda completions, **_: [0.0], config, train_dataset=datasets.Dataset.from_list(ROWS),
                             processing_class=AutoTokenizer.from_pretrained(base))  # fmt: skip
    oracle.current_gradient_accumulation_steps, oracle.beta = 1, beta
    theirs.eval()
    count = one.mask.sum()
    given = {
        "prompt_ids": one.input_ids[:, :3], "prompt_mask": one.attention_mask[:, :3], "advantages": one.advantages,
        "completion_ids": one.input_ids[:, 3:], "completion_mask": one.mask.long(), "old_per_token_logps": one.old,
        "ref_per_token_logps": one.reference, "num_items_in_batch": count,
    }  # fmt: skip
    expected = oracle._compute_loss(theirs, given)
    losses, _ = task.losses(one)
    found = losses.sum() / count if loss == "dapo" else task.reduced(losses, one.mask)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    found.backward()
    expected.backward()
    for mine, other in zip(task.model.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("scale_rewards", ["group", "batch", "none"])
def test_advantages_are_rewards_within_their_group(scale_rewards: str) -> None:
    rewards = torch.tensor([[1.0, 2.0, 6.0], [5.0, 5.0, 5.0]])
    spread = {"group": torch.tensor([[7.0**0.5], [0.0]]) + 1e-4, "batch": rewards.std() + 1e-4, "none": 1.0}
    expected = torch.tensor([[-2.0, -1.0, 3.0], [0.0, 0.0, 0.0]]) / spread[scale_rewards]
    torch.testing.assert_close(group_advantages(rewards, scale_rewards), expected)


def test_what_the_clip_holds_has_no_gradient() -> None:
    policy = torch.tensor([[0.5, -0.5, 0.0]] * 2, requires_grad=True)
    losses, is_held = policy_losses(policy, torch.zeros(2, 3), torch.tensor([1.0, -1.0]))
    losses.sum().backward()
    assert torch.equal(is_held, torch.tensor([[True, False, False], [False, True, False]]))
    assert policy.grad is not None
    assert torch.equal(policy.grad == 0, is_held)


def test_divergence_is_that_of_the_two_distributions() -> None:
    policy, reference = torch.randn(2, 1, 9, dtype=torch.float64).log_softmax(-1)
    expected = (policy.exp() * (policy - reference)).sum()
    found = (policy.exp() * divergences(policy, reference, policy)).sum()
    torch.testing.assert_close(found, expected)


def test_completions_end_with_their_end_and_are_drawn_from_the_model_itself(base: str) -> None:
    """The odds that a completion is drawn with are those that it is learned with, behind padding too."""
    torch.manual_seed(0)
    task = task_of(base, short, share, max_completion_length=8, temperature=0.7)
    inject(task.model, OFTConfig(oft_block_size=8))
    task.model.generation_config.update(top_k=1, min_p=0.9)  # a checkpoint's own taste
    with torch.no_grad():
        task.model.lm_head.weight[1] += 0.2  # ends are likely
        for name, parameter in task.named_parameters():
            if "oft_R" in name:
                parameter += 0.3 * torch.randn_like(parameter)
    batch = {
        "input_ids": torch.tensor([[5, 6, 7], [2, 2, 9]]),
        "attention_mask": torch.tensor([[1, 1, 1], [0, 0, 1]]),
        "columns": {"prompt": ["one", "two"], "row": [4, 7], "wanted": ["e", "a"]},
    }
    one = task.sample(batch, 40)
    written = one.input_ids[:, 3:]
    assert len(written[:40, 0].unique()) > 10
    for ids, mask in zip(written, one.mask, strict=True):
        own = ids[mask].tolist()
        assert 1 not in own[:-1]
        assert own[-1] == 1 or len(own) == written.shape[1]
    (call,) = CALLS
    assert call["completion_ids"] == [ids[mask].tolist() for ids, mask in zip(written, one.mask, strict=True)]
    assert call["prompts"] == ["one"] * 40 + ["two"] * 40
    assert call["wanted"] == ["e"] * 40 + ["a"] * 40
    odds = task(one.input_ids, one.attention_mask, written.shape[1])
    alone = one.input_ids[40:, 2:]  # the padded prompt, without padding
    plain = task(alone, one.attention_mask[40:, 2:], written.shape[1])
    torch.testing.assert_close(odds[40:][one.mask[40:]], plain[one.mask[40:]], atol=1e-5, rtol=1e-5)
    scores = (task.model(alone[:1]).logits[0, :-1].float() / 0.7).log_softmax(-1)
    own = scores.gather(-1, alone[0, 1:, None])[:, 0]
    torch.testing.assert_close(own[one.mask[40]], plain[0][one.mask[40]], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "options", [{}, {"num_iterations": 2}, {"loss": "grpo", "beta": 0.1}], ids=["once", "twice", "kl"]
)
def test_a_run_learns_and_samples_as_often_as_it_is_told(base: str, tmp_path: Path, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    task = task_of(base, short, share, **options)
    run = trainer(limit_val_batches=1, limit_train_batches=4)
    run.fit(task, data_of(tmp_path))
    times = options.get("num_iterations", 1)
    assert run.global_step == 2 * times
    training = [call for call in CALLS if len(call["prompts"]) > 2]
    assert len(training) == 2
    assert all(bool(tensor.any()) for tensor in generators(task))
    assert {"train/reward", "train/reward_std", "train/flat", "train/length", "train/ended", "train/clipped",
            "train/reward/short", "train/reward/share", "val/reward", "val/length"} <= run.callback_metrics.keys()  # fmt: skip
    assert ("train/kl" in run.callback_metrics) is ("beta" in options)
    assert task.sampled == []


def test_the_mean_over_tokens_is_that_of_a_whole_step(base: str, tmp_path: Path) -> None:
    """Two batches of one prompt each, with completions of unlike length, learn what one batch of two does."""
    found = []
    for batches in (1, 2):
        torch.manual_seed(0)
        task = task_of(base, max_completion_length=4)
        table = {name: sampled_of(task, name) for name in ("Say it", "Read")}
        task._take = lambda batch, table=table: joined([table[p] for p in batch["columns"]["prompt"]])  # type: ignore[method-assign]
        data = data_of(tmp_path, ROWS[:2], batch_size=2 // batches)
        trainer(accumulate_grad_batches=batches, limit_val_batches=0).fit(task, data)
        found.append(generators(task))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("loss", POLICY_LOSSES)
def test_a_step_has_the_gradient_of_its_loss(base: str, tmp_path: Path, loss: str) -> None:
    task, alone = (task_of(base, max_completion_length=4, loss=loss) for _ in range(2))
    inject(alone.model, OFTConfig(oft_block_size=8))
    table = {name: sampled_of(task, name) for name in ("Say it", "Read")}
    task._take = lambda batch: joined([table[p] for p in batch["columns"]["prompt"]])  # type: ignore[method-assign]
    trainer(limit_val_batches=0).fit(task, data_of(tmp_path, ROWS[:2]))
    one = joined(list(table.values()))
    losses, _ = alone.losses(one)
    (losses.sum() / one.mask.sum() if loss == "dapo" else alone.reduced(losses, one.mask)).backward()
    expected = [-parameter.grad for name, parameter in alone.named_parameters() if "oft_R" in name]  # SGD, rate 1
    for mine, other in zip(generators(task), expected, strict=True):
        torch.testing.assert_close(mine, other, atol=1e-6, rtol=1e-4)


def sampled_of(task: PolicyOptimization, prompt: str) -> Sampled:
    generator = torch.Generator().manual_seed(len(prompt))
    ids = torch.randint(3, 1024, (3, 7), generator=generator)
    mask = torch.arange(4)[None] < torch.tensor([[1], [2], [1]] if prompt == "Read" else [[4], [4], [3]])
    whole = torch.cat([torch.ones(3, 3), mask], 1).long()
    return Sampled(ids, whole, mask, torch.zeros(1, 3), torch.randn(3, generator=generator))


def joined(parts: list[Sampled]) -> Sampled:
    names = ("input_ids", "attention_mask", "mask", "advantages")
    together = {name: torch.cat([getattr(part, name) for part in parts]) for name in names}
    return Sampled(**together, rewards=torch.cat([part.rewards for part in parts], 1))


@pytest.mark.parametrize(
    ("reward", "said"),
    [
        (raises, r"reward .*\.raises, row \d, row \d: raised KeyError: 'answer'"),
        (nan, r"reward .*\.nan, row 2: gave nan .*; a reward is a finite number, or None"),
        (silent, r"rewards, row \d: every function gave None; one must give a number"),
        (few, r"reward .*\.few, .*: gave 1 numbers for \d completions"),
    ],
)
def test_a_reward_function_that_fails_is_named_with_the_row_and_nothing_is_lost(
    base: str, tmp_path: Path, reward: Any, said: str
) -> None:
    task = task_of(base, reward)
    with pytest.raises(ValueError, match=said):
        trainer(limit_val_batches=0).fit(task, data_of(tmp_path))
    modules = walk(task.model)
    assert adapter_names(modules)
    assert not merged_layers(modules)
    untouched = LlamaForCausalLM.from_pretrained(base).state_dict()
    mine = {name: tensor for name, tensor in task.model.state_dict().items() if "oft_R" not in name}
    assert mine.keys() == untouched.keys()
    assert all(torch.equal(mine[name], untouched[name]) for name in mine)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"num_generations": 1}, "completions are compared"),
        ({"temperature": 0.0}, "must be above 0"),
        ({"loss": "ppo"}, "must be one of grpo, dr_grpo, dapo"),
        ({"reward_weights": [1.0, 2.0]}, "2 for 1 functions"),
        ({"beta": -1.0}, "at least 0"),
        ({"num_iterations": 0}, "at least 1"),
        ({"scale_rewards": "all"}, "one of group, batch, none"),
    ],
)
def test_arguments_out_of_range_are_refused(base: str, options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        task_of(base, **options)


@pytest.mark.parametrize("path", ["nowhere.at.all", "json.nothing", "nothing"])
def test_a_reward_that_is_nowhere_is_named(base: str, path: str) -> None:
    with pytest.raises(ValueError, match=f"rewards: {path}: .*give package.module.function"):
        task_of(base, path)


def test_the_reference_of_a_fit_from_an_adapter_is_a_copy_of_it(base: str) -> None:
    torch.manual_seed(0)
    task = task_of(base, beta=0.1)
    inject(task.model, OFTConfig(oft_block_size=8))
    with torch.no_grad():
        next(p for n, p in task.named_parameters() if "oft_R" in n).add_(1.0)
    with pytest.raises(ValueError, match="came too late"):
        task.on_fit_start()
    task.setup("fit")
    assert REFERENCE in adapter_names(walk(task.model))
    one = sampled(task)
    before = task.reference(one)
    with torch.no_grad():
        next(p for n, p in task.named_parameters() if "oft_R.default" in n).add_(1.0)
    assert torch.equal(task.reference(one), before)


def test_rows_that_are_no_prompts_are_named(base: str, tmp_path: Path) -> None:
    for rows, said in [
        ([{"text": "a"}], "found the columns text; wanted prompt"),
        ([{"prompt": "a"}, {"prompt": " "}], "row 2: prompt is empty"),
        ([{"prompt": "a" * 400}], "row 1: .* tokens, the model takes 64"),
        ([{"prompt": "a", "completions": "b"}], "a column 'completions' is made here"),
    ]:
        with pytest.raises(ValueError, match=said):
            trainer().fit(task_of(base), data_of(tmp_path, rows))
