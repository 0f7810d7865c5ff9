"""PolicyOptimization: a language model learns from what functions say of its own completions (GRPO)."""

from inspect import signature
from typing import Any, Literal

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor
from typing_extensions import override

from lightning_oft.model.merging import merged_where_possible
from lightning_oft.tasks.base import Dtype, LRInterval
from lightning_oft.tasks.modes import evaluating
from lightning_oft.tasks.text.compared import ComparedTask
from lightning_oft.tasks.text.completions import Sampled, check_batch, ends_of, is_end, own_tokens
from lightning_oft.tasks.text.losses import POLICY_LOSSES, divergences, group_advantages, policy_losses, token_log_probs
from lightning_oft.tasks.text.metrics import Rewards
from lightning_oft.tasks.text.rewards import Reward, import_reward, path_of, rewards_of
from lightning_oft.tasks.text.token_mean import TokenMean

_AS_THE_MODEL_SAYS: dict[str, Any] = {
    "top_k": 0, "top_p": 1.0, "min_p": 0.0, "typical_p": 1.0, "epsilon_cutoff": 0.0, "eta_cutoff": 0.0,
    "repetition_penalty": 1.0, "no_repeat_ngram_size": 0,
}  # fmt: skip
"""Off is all, in a checkpoint's own settings too, that would draw tokens with other odds than they are learned with."""


class PolicyOptimization(TokenMean, ComparedTask):
    """Group relative policy optimization (Shao et al. 2024) of any model of transformers' AutoModelForCausalLM.

    Each step samples completions of its prompts, with the rotations folded into the weights meanwhile, lets functions
    judge them, and makes those likelier that are better than the others of their prompt.

    Batches are PromptDataModule's. Logs, of a step, `train/` `loss`, `reward`, `reward_std` (within a prompt's completions),
    `flat` (the share of prompts whose completions are all judged alike, from which nothing is learned), `length` (tokens),
    `ended` (the share that ended by itself), `clipped`, `kl` where beta is above 0, and `reward/<function>`; in validation
    and test `reward` and `length` of one completion a prompt.

    Args:
        pretrained: The model to start from: a folder written by save_pretrained, or a hub id.
        rewards: Functions by import path, such as package.module.function; called with prompts, completions,
            completion_ids and each other column of the data by name, they return a number for each completion. TRL's fit.
        reward_weights: What each counts; all 1 by default.
        num_generations: Completions of each prompt.
        max_completion_length: Tokens of a completion at most.
        temperature: Of sampling: lower keeps to what is likely.
        loss: grpo (a mean over the tokens of each completion, then over these), dr_grpo (each token over
            max_completion_length), dapo (a mean over all tokens of an optimizer's step).
        beta: Weight of the divergence from the model that the fit starts from; above 0 costs a forward more.
        epsilon: How far the odds of a token may move from those of the model that wrote it, before it stops counting.
        epsilon_high: The same upwards; epsilon by default.
        scale_rewards: Divide by the spread of rewards: of the group, of the batch, or by none.
        num_iterations: Steps of the optimizer that learn from one set of completions.
        prompts: Texts that the model continues after each validation, and before and after the fit.
        generation: Options of transformers' generate for those, such as max_new_tokens.
        activation_checkpointing: Recompute activations in the backward pass: half the memory, a third more time.
        optimizer: Gets what is trainable when the run starts; rotations are never decayed.
        lr_scheduler: Gets the optimizer. None keeps the learning rate.
        lr_interval: When the schedule advances; auto is every step for OneCycleLR and CyclicLR, else every epoch.
        dtype: Data type that the weights are loaded in; "auto" for the checkpoint's.
        quantization_config: transformers' description of a quantized base.

    Raises:
        OSError: When there is no such model or tokenizer at `pretrained`.
        ValueError: When an argument is out of its range; when a reward function fails, with its name and the row's.
    """

    shown_scores = ("reward", "length")
    auto_class = "AutoModelForCausalLM"
    metric_class = Rewards

    def __init__(
        self,
        pretrained: str,
        rewards: list[str],
        reward_weights: list[float] | None = None,
        num_generations: int = 8,
        max_completion_length: int = 256,
        temperature: float = 1.0,
        loss: Literal["grpo", "dr_grpo", "dapo"] = "dapo",
        beta: float = 0.0,
        epsilon: float = 0.2,
        epsilon_high: float | None = None,
        scale_rewards: Literal["group", "batch", "none"] = "group",
        num_iterations: int = 1,
        prompts: list[str] | None = None,
        generation: dict[str, Any] | None = None,
        activation_checkpointing: bool = False,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        lr_scheduler: LRSchedulerCallable | None = None,
        lr_interval: LRInterval = "auto",
        dtype: Dtype = "float32",
        quantization_config: Any = None,
    ) -> None:
        super().__init__(
            pretrained, dtype, quantization_config, activation_checkpointing,
            optimizer=optimizer, lr_scheduler=lr_scheduler, lr_interval=lr_interval,
        )  # fmt: skip
        given: list[str | Reward] = list(rewards)
        rewards = [path_of(reward) for reward in given]
        self.save_hyperparameters(ignore=["optimizer", "lr_scheduler"])
        self.rewards = {
            path: import_reward(one) if isinstance(one, str) else one for path, one in zip(rewards, given, strict=True)
        }
        self.reward_weights = reward_weights or [1.0] * len(rewards)
        self.num_generations, self.max_completion_length = num_generations, max_completion_length
        self.temperature, self.loss, self.beta, self.scale_rewards = temperature, loss, beta, scale_rewards
        self.epsilons = (epsilon, epsilon if epsilon_high is None else epsilon_high)
        self.num_iterations = num_iterations
        check_arguments(self)
        self.load_generator(prompts, generation)
        self.sampled: list[Sampled] = []
        """Completions that are still to be learned from."""

    @property
    @override
    def compares(self) -> bool:
        return self.beta > 0

    def forward(self, input_ids: Tensor, attention_mask: Tensor, count: int) -> Tensor:
        """-> log-probabilities (N, T) float32 of the last `count` = T tokens of N rows, at the temperature of sampling."""
        options: dict[str, Any] = {}
        if "position_ids" in self._arguments:  # as generate counts them: padding before a prompt has no place
            options["position_ids"] = (attention_mask.cumsum(-1) - 1).clamp(min=0)
        if "logits_to_keep" in self._arguments:
            options["logits_to_keep"] = count + 1
        logits = self.model(input_ids, attention_mask=attention_mask, use_cache=False, **options).logits
        return token_log_probs(logits[:, -count - 1 : -1].float() / self.temperature, input_ids[:, -count:])

    def reference(self, sampled: Sampled) -> Tensor:
        """-> log-probabilities (N, T) float32 by the reference, without gradient and dropout."""
        with self.at_reference(), evaluating(self.library_model):
            found: Tensor = self(sampled.input_ids, sampled.attention_mask, sampled.mask.shape[1])
        return found

    @torch.no_grad()
    def sample(self, batch: dict[str, Any], count: int) -> Sampled:
        """Write `count` completions of each of B prompts, N = B count in all, and have them judged."""
        check_batch(batch)
        prompt_ids = batch["input_ids"].repeat_interleave(count, 0)
        prompt_mask = batch["attention_mask"].repeat_interleave(count, 0)
        ends = self._ends()
        made = self._generate(prompt_ids, prompt_mask, ends)
        written = made[:, prompt_ids.shape[1] :]
        mask = own_tokens(written, ends)
        rewards = self._judge(batch["columns"], written, mask, count).to(written.device)
        attention_mask = torch.cat([prompt_mask, mask.to(prompt_mask.dtype)], 1)
        advantages = self._advantages(self.total(rewards), count)
        return Sampled(made, attention_mask, mask, rewards, advantages)

    def total(self, rewards_fn: Tensor) -> Tensor:
        """The weighted sum (N,) of what F functions gave (F, N)."""
        weights = torch.tensor(self.reward_weights, device=rewards_fn.device)
        return (weights[:, None] * rewards_fn).nansum(0)

    def losses(self, sampled: Sampled) -> tuple[Tensor, dict[str, Tensor]]:
        """Losses of the tokens (N, T), 0 where there are none, and scores of them."""
        mask = sampled.mask
        policy = self(sampled.input_ids, sampled.attention_mask, mask.shape[1])
        if sampled.old is None:
            sampled.old = policy.detach()
        losses, is_held = policy_losses(policy, sampled.old, sampled.advantages, *self.epsilons)
        scores = {"clipped": (is_held & mask).sum() / mask.sum()}
        if self.compares:
            if sampled.reference is None:
                sampled.reference = self.reference(sampled)
            kl = divergences(policy, sampled.reference, sampled.old)
            losses = losses + self.beta * kl
            scores["kl"] = (kl.detach() * mask).sum() / mask.sum()
        return losses * mask, scores

    def reduced(self, losses: Tensor, mask: Tensor) -> Tensor:
        """What a training step returns for losses (N, T), a scalar."""
        if self.loss == "grpo":
            return (losses.sum(-1) / mask.sum(-1)).mean()
        if self.loss == "dr_grpo":
            return losses.sum() / (len(losses) * self.max_completion_length)
        return self.token_mean(losses.sum(), mask.sum())

    @override
    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        sampled = self._take(batch)
        losses, scores = self.losses(sampled)
        self.has_trained = True
        total, mask = self.total(sampled.rewards).view(-1, self.num_generations), sampled.mask
        ended = is_end(sampled.input_ids[:, -mask.shape[1] :], self._ends())
        by_function = dict(zip(self.rewards, sampled.rewards.nanmean(1), strict=True))
        scores |= {
            "loss": losses.detach().sum() / mask.sum(), "reward": total.mean(), "reward_std": total.std(1).mean(),
            "flat": (total.std(1) == 0).float().mean(), "length": mask.sum(-1).float().mean(),
            "ended": (ended & mask).any(-1).float().mean(),
            **{f"reward/{path.rpartition('.')[2]}": value for path, value in by_function.items()},
        }  # fmt: skip
        self.log_dict({f"train/{name}": value for name, value in scores.items()}, batch_size=len(total))
        return self.reduced(losses, mask)

    @override
    def score(self, batch: dict[str, Any], metric: Rewards, split: str) -> None:
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(0)  # the same draws before and after
            sampled = self.sample(batch, 1)
        metric.update(self.total(sampled.rewards), sampled.mask.sum(-1))

    def _take(self, batch: dict[str, Any]) -> Sampled:
        """The completions of a batch: those that it had the last time, as often as num_iterations says."""
        length = batch["input_ids"].shape[1]
        asked = batch["input_ids"].repeat_interleave(self.num_generations, 0)
        kept = (one for one in self.sampled if torch.equal(one.input_ids[:, :length], asked))
        sampled = next(kept, None)
        if sampled is None:
            sampled = self.sample(batch, self.num_generations)
            self.sampled.append(sampled)
        sampled.uses += 1
        unused = [one for one in self.sampled if one.uses < self.num_iterations]
        self.sampled = unused[-self.trainer.accumulate_grad_batches :]  # a batch that never comes again is forgotten
        return sampled

    def _generate(self, prompt_ids: Tensor, prompt_mask: Tensor, ends: list[int]) -> Tensor:
        pad = self.tokenizer.pad_token_id
        with merged_where_possible(self.library_model), evaluating(self.library_model):
            made: Tensor = self.model.generate(
                input_ids=prompt_ids,
                attention_mask=prompt_mask,
                max_new_tokens=self.max_completion_length,
                pad_token_id=pad if pad is not None else (ends or [0])[0],
                eos_token_id=ends or None,
                synced_gpus=self.device_mesh is not None,  # shards of one model must be called together
                do_sample=True,
                temperature=self.temperature,
                **_AS_THE_MODEL_SAYS,
            )
        return made

    def _judge(self, columns: dict[str, Any], written: Tensor, mask: Tensor, count: int) -> Tensor:
        """(F, N) float32."""
        ids = [row[is_own].tolist() for row, is_own in zip(written, mask, strict=True)]
        texts: list[Any] = self.tokenizer.batch_decode(ids, skip_special_tokens=True)
        repeated = {name: [value for value in values for _ in range(count)] for name, values in columns.items()}
        rows, prompts = repeated.pop("row", None), repeated.pop("prompt")
        names = ["a prompt" if row is None else f"row {int(row) + 1}" for row in rows or [None] * len(ids)]
        if not isinstance(prompts[0], str):  # a chat: its answer is one more turn
            texts = [[{"role": "assistant", "content": text}] for text in texts]
        return rewards_of(self.rewards, prompts, texts, ids, repeated, names)

    def _advantages(self, total: Tensor, count: int) -> Tensor:
        groups = total.view(-1, count)
        if count == 1:
            return torch.zeros_like(total)
        everyone: Any = self.all_gather(groups) if self.scale_rewards == "batch" else groups
        return group_advantages(groups, self.scale_rewards, everyone).flatten()

    def _ends(self) -> list[int]:
        return ends_of(self.model, self.tokenizer)

    @property
    def _arguments(self) -> Any:
        return signature(self.model.forward).parameters


def check_arguments(task: PolicyOptimization) -> None:
    """Raise ValueError, one line, when an argument is out of its range."""
    low, high = task.epsilons
    if not task.rewards:
        raise ValueError("rewards: give at least one function, as package.module.function")
    if len(task.reward_weights) != len(task.rewards):
        raise ValueError(f"reward_weights: {len(task.reward_weights)} for {len(task.rewards)} functions; one for each")
    if task.num_generations < 2:
        raise ValueError(f"num_generations={task.num_generations}: completions are compared, so at least 2")
    if task.max_completion_length < 1 or task.num_iterations < 1:
        raise ValueError("max_completion_length and num_iterations: must be at least 1")
    if task.temperature <= 0:
        raise ValueError(f"temperature={task.temperature}: must be above 0, or all completions are the same")
    if task.loss not in POLICY_LOSSES:
        raise ValueError(f"loss={task.loss!r}: must be one of {', '.join(POLICY_LOSSES)}")
    if task.beta < 0 or not 0 < low < 1 or high <= 0:
        raise ValueError(f"beta={task.beta}, epsilon={low}, epsilon_high={high}: at least 0, in (0, 1), above 0")
    if task.scale_rewards not in ("group", "batch", "none"):
        raise ValueError(f"scale_rewards={task.scale_rewards!r}: must be one of group, batch, none")
