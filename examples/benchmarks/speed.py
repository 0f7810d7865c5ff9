"""Time this library beside PEFT's OFT and LoRA on one small Llama: training, generating, merging, memory.

    pip install '.[test]'
    python examples/benchmarks/speed.py --width 512 --layers 4 --tokens 256 --rounds 7

All variants run in one process, a round of each after the other, and the clock is the process's CPU time, so that a
busy machine disturbs them little and alike. The table shows medians, and ratios to the base. In training the base is
the frozen model with a gradient through it, the limit that no adapter can go below. The ratios change with the size.
"""

import argparse
import copy
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import peft
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from lightning_oft import OFTConfig, inject, merge, oft_layers

BASE, OURS, OFT, LORA = "base", "lightning_oft", "PEFT OFT", "PEFT LoRA r=16"
Model = nn.Module
Times = dict[str, float]


def build(options: argparse.Namespace, dtype: torch.dtype = torch.float32) -> dict[str, Model]:
    """The same base without an adapter and with each of three; small random adapters stand for trained ones."""
    torch.manual_seed(0)
    heads = max(options.width // 64, 1)
    sizes: dict[str, Any] = {
        "hidden_size": options.width,
        "intermediate_size": 2 * options.width,
        "num_hidden_layers": options.layers,
    }
    config = LlamaConfig(**sizes, num_attention_heads=heads, num_key_value_heads=heads, vocab_size=512)
    base: Any = LlamaForCausalLM(config)
    base.to(dtype).requires_grad_(False)
    # Something below must ask for a gradient, or nothing would be computed backwards.
    base.get_input_embeddings().register_forward_hook(_ask_for_gradient)
    models: dict[str, Model] = {BASE: base, OURS: copy.deepcopy(base)}
    inject(models[OURS], OFTConfig(oft_block_size=options.block_size))
    oft: Any = peft.OFTConfig(oft_block_size=options.block_size, target_modules="all-linear")
    lora: Any = peft.LoraConfig(r=16, lora_alpha=16, target_modules="all-linear")
    models[OFT] = peft.get_peft_model(copy.deepcopy(base), oft)
    models[LORA] = peft.get_peft_model(copy.deepcopy(base), lora)
    for model in models.values():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data.add_(torch.randn_like(parameter), alpha=0.01)
    return models


def _ask_for_gradient(module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
    return output.requires_grad_() if torch.is_grad_enabled() and output.is_leaf else None


def interleaved(actions: dict[str, Callable[[], object]], rounds: int) -> Times:
    """Median CPU seconds of each action; one round of warming up does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in actions}
    for _ in range(rounds + 1):
        for name, action in actions.items():
            started = time.process_time()
            action()
            seconds[name].append(time.process_time() - started)
    return {name: statistics.median(found[1:]) for name, found in seconds.items()}


def training(models: dict[str, Model], tokens: Tensor, rounds: int) -> Times:
    """Forward, backward and an optimizer step."""

    def step(model: Model, optimizer: torch.optim.Optimizer | None) -> None:
        model(input_ids=tokens, labels=tokens).loss.backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()

    actions: dict[str, Callable[[], object]] = {}
    for name, model in models.items():
        trainable = [p for p in model.train().parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trainable, 1e-4) if trainable else None
        actions[name] = partial(step, model, optimizer)
    return interleaved(actions, rounds)


def generating(models: dict[str, Model], rounds: int, count: int = 16) -> Times:
    """One more token with a key-value cache, unmerged."""

    @torch.no_grad()
    def generate(model: Model) -> None:
        cache, token = None, torch.ones(1, 1, dtype=torch.int64)
        for _ in range(count):
            output = model(input_ids=token, past_key_values=cache, use_cache=True)
            cache, token = output.past_key_values, output.logits[:, -1:].argmax(-1)

    evaluated = {name: model.eval() for name, model in models.items()}
    found = interleaved({name: partial(generate, model) for name, model in evaluated.items()}, rounds)
    return {name: seconds / count for name, seconds in found.items()}


def merging(models: dict[str, Model], rounds: int) -> Times:
    """Folding the adapter into the weights; the copy that is merged is made outside the clock."""
    seconds: dict[str, list[float]] = {OURS: [], OFT: [], LORA: []}
    for _ in range(rounds):
        for name, found in seconds.items():
            model: Any = copy.deepcopy(models[name])
            started = time.process_time()
            merge(model, keep_base="never") if name == OURS else model.merge_adapter()
            found.append(time.process_time() - started)
    return {name: statistics.median(found) for name, found in seconds.items()}


def saved_bytes(model: Model, tokens: Tensor) -> float:
    """Bytes a token that autograd keeps for the backward pass, parameters not counted."""
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    kept: dict[int, Tensor] = {}  # the tensors themselves, so that no address is used twice

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            kept.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model.train()(input_ids=tokens, labels=tokens).loss
    size = sum(tensor.untyped_storage().nbytes() for tensor in kept.values()) / tokens.numel()
    loss.backward()
    return size


def main(arguments: Sequence[str] | None = None) -> dict[str, Times]:
    """Print the table; returns its rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = {"width": 512, "layers": 4, "tokens": 256, "rounds": 7, "block-size": 32, "threads": 1}
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args(arguments)
    before = torch.get_num_threads()
    torch.set_num_threads(options.threads)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return _measure(options)
    finally:
        torch.set_num_threads(before)


def _measure(options: argparse.Namespace) -> dict[str, Times]:
    tokens = torch.randint(512, (1, options.tokens))
    models = build(options)
    rows = {
        "training step (ms)": training(models, tokens, options.rounds),
        "generated token (ms)": generating(models, options.rounds),
        "merge (ms)": merging(models, min(options.rounds, 5)),
    }
    rows = {title: {name: 1000 * value for name, value in row.items()} for title, row in rows.items()}
    for title, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        found = {name: saved_bytes(model, tokens) / 1000 for name, model in build(options, dtype).items()}
        rows[f"kept for backward, {title} (kB a token)"] = found
    print(
        f"Llama of {options.layers} layers, width {options.width}, {options.tokens} tokens, {len(oft_layers(models[OURS]))} "
        f"adapted layers, blocks of {options.block_size}; CPU, {options.threads} thread; torch {torch.__version__}, "
        f"peft {peft.__version__}\n"
    )
    counts = {n: float(sum(p.numel() for p in m.parameters() if p.requires_grad)) for n, m in models.items()}
    print(f"{'':40}" + "".join(f"{name:>20}" for name in models))
    print(f"{'trainable parameters':40}" + "".join(f"{counts[name]:>20,.0f}" for name in models))
    for title, row in rows.items():
        limit = row.get(BASE, row[OURS])
        cells = (f"{row[n]:.1f} ({row[n] / limit:.2f}x)" if n in row else "" for n in models)
        print(f"{title:40}" + "".join(f"{cell:>20}" for cell in cells))
    return rows


if __name__ == "__main__":
    main()
