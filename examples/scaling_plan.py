"""Prints what finetuning Llama-3-70B by OFT with FSDP2 needs: bytes per GPU by part, and communication per step.

    python examples/scaling_plan.py --tokens 4096 --gpus 8 16 32 64

The formulas are those of docs/scaling.md; tests/distributed/test_scaling.py compares each with measured bytes, exactly.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass


@dataclass(frozen=True)
class Llama:
    """A Llama in bfloat16 whose linear layers, save the output embedding, have rotations of blocks of size `block`."""

    hidden: int = 8192
    ffn: int = 28672
    layers: int = 80
    heads: int = 64
    kv_heads: int = 8
    vocab: int = 128256
    block: int = 32

    @property
    def kv(self) -> int:
        """Size of keys, and of values: fewer heads than queries have."""
        return self.hidden // self.heads * self.kv_heads

    @property
    def fan_in(self) -> int:
        """Of the seven linear layers of a block together: query, key, value, output, gate, up; down."""
        return 6 * self.hidden + self.ffn

    @property
    def layer(self) -> int:
        """Base parameters of a transformer block."""
        return 2 * self.hidden * (self.hidden + self.kv) + 3 * self.hidden * self.ffn + 2 * self.hidden

    @property
    def rest(self) -> int:
        """Base parameters outside the blocks: two embeddings and a norm."""
        return 2 * self.vocab * self.hidden + self.hidden

    @property
    def generators(self) -> int:
        """Trained parameters: b(b-1)/2 for each b of a fan-in."""
        return self.layers * self.fan_in * (self.block - 1) // 2


def held(m: Llama, gpus: int) -> dict[str, int]:
    """Bytes that a GPU holds between steps: bfloat16 base, float32 generators and their two Adam moments, all sharded."""
    base, generators = 2 * (m.layers * m.layer + m.rest), 4 * m.generators
    return {"base": base // gpus, "generators": generators // gpus, "optimizer": 2 * generators // gpus}


def layer_activations(m: Llama, tokens: int) -> int:
    """Bytes that autograd keeps of one block: for each token, and for the rotations whatever the number of tokens."""
    token = 16 * m.hidden + 8 * m.ffn + 4 * m.kv + 4 * m.heads + 8
    rotations = 14 * m.block * m.fan_in
    return tokens * token + rotations


def activations(m: Llama, tokens: int, checkpointing: bool) -> int:
    """Bytes that autograd keeps of a forward. With checkpointing a block keeps its input, and in backward one keeps all."""
    logits = tokens * (4 * m.vocab + 8) + 12  # with the labels and the loss itself
    if checkpointing:
        return tokens * (2 * m.hidden * m.layers + 4 * m.hidden + 4) + logits
    return m.layers * layer_activations(m, tokens) + tokens * 4 * m.hidden // m.heads + logits


def traffic(m: Llama) -> dict[str, int]:
    """Whole bytes gathered and reduced in a step, and calls: blocks and rotations are gathered twice, the rest once.
    A norm of each rotation says whether one leaves its series."""
    gathered = 2 * (2 * m.layers * m.layer + m.rest) + 2 * 4 * m.generators
    calls = {"gathers": 2 * m.layers + 1 + 2 * 7 * m.layers, "reductions": 7 * m.layers}
    return {"gathered": gathered, "reduced": 4 * m.generators, "norms": 4 * 7 * m.layers, **calls}


def plan(m: Llama, gpus: int, tokens: int) -> list[float]:
    """The columns of the table, in GB."""
    parts, moved = held(m, gpus), traffic(m)
    units = 2 * (2 * m.layer + m.rest)  # the block in use, the next one, and the embeddings, which stay
    saved = activations(m, tokens, checkpointing=True) + layer_activations(m, tokens)
    memory = [parts["base"], 2 * parts["generators"], parts["optimizer"], units, saved]
    wire = (moved["gathered"] + moved["reduced"]) * (gpus - 1) / gpus
    return [value / 1e9 for value in (*memory, sum(memory), wire)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096, help="tokens per GPU and step")
    parser.add_argument("--gpus", type=int, nargs="+", default=[8, 16, 32, 64])
    options = parser.parse_args()
    names = [
        "base shard",
        "generators and gradients",
        "Adam",
        "gathered units",
        "activations",
        "sum",
        "received in a step",
    ]
    print(f"| GPUs | {' | '.join(names)} |\n|{'---|' * (len(names) + 1)}")
    for gpus in options.gpus:
        print(f"| {gpus} | {' | '.join(f'{value:.2f}' for value in plan(Llama(), gpus, options.tokens))} |")


if __name__ == "__main__":
    main()
