"""Memory of merging an adapter into the files of a base, above what Python holds before: bytes, not a clock.

    python examples/benchmarks/merge_files.py --gigabytes 2

Random Llama weights are written to a temporary directory in bfloat16, in files of 500 MB, with an adapter of all linear
layers beside them. `--check` merges in memory too and compares every tensor.
"""

import argparse
import resource
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from lightning_oft import OFTConfig, inject, oft_layers, save_adapter, save_merged
from lightning_oft.formats.adapters import read_adapter
from lightning_oft.formats.streaming import stream_merge


def write_base(directory: Path, gigabytes: float, hidden: int) -> LlamaForCausalLM:
    """A Llama of about this size: a block of it has 4 h^2 + 3 h (8h / 3) = 12 h^2 weights."""
    layers = max(1, round(gigabytes * 1e9 / 2 / (12 * hidden**2)))
    sizes = {"hidden_size": hidden, "intermediate_size": 8 * hidden // 3 // 64 * 64, "num_hidden_layers": layers}
    heads = {"num_attention_heads": hidden // 64, "num_key_value_heads": hidden // 64, "vocab_size": 512}
    model = LlamaForCausalLM(LlamaConfig(**sizes, **heads)).to(torch.bfloat16)
    model.save_pretrained(directory / "base", max_shard_size="500MB")
    inject(model, OFTConfig(oft_block_size=32))
    for layer in oft_layers(model).values():
        torch.nn.init.normal_(layer.oft_R["default"].weight, std=0.02)
    save_adapter(model, directory / "adapter")
    return model


def resident() -> int:
    """The most bytes that this process has had in memory at any time."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure(directory: Path) -> tuple[int, int]:
    """Bytes above the imports that the merge took at most, and how many tensors it has written."""
    import transformers

    transformers.LlamaForCausalLM(transformers.LlamaConfig(num_hidden_layers=1, hidden_size=64, vocab_size=8))
    read_adapter(directory / "adapter")
    before = resident()
    merge = stream_merge(directory / "base", read_adapter(directory / "adapter"))
    assert merge is not None
    merge.write(directory / "streamed", None)
    return resident() - before, len(merge.tensors)


def main(gigabytes: float, hidden: int, check: bool) -> tuple[int, int]:
    """Writes in a child process, so that its memory is not counted; returns what `measure` returns."""
    import multiprocessing

    with tempfile.TemporaryDirectory() as name:
        directory, context = Path(name), multiprocessing.get_context("spawn")
        writer = context.Process(target=write_base, args=(directory, gigabytes, hidden))
        writer.start()
        writer.join()
        size = sum(file.stat().st_size for file in (directory / "base").glob("*.safetensors"))
        most, tensors = measure(directory)
        print(f"base {size / 1e9:.2f} GB, {tensors} tensors: {most / 1e6:.0f} MB above the imports")
        if check:
            compare(directory)
    return most, size


def compare(directory: Path) -> None:
    """Merge in memory, and compare every tensor to the bit."""
    from lightning_oft import load_adapter

    model = LlamaForCausalLM.from_pretrained(directory / "base", dtype="auto")
    load_adapter(model, directory / "adapter")
    save_merged(model, directory / "merged")
    files = {
        name: [load_file(one) for one in (directory / name).glob("*.safetensors")] for name in ("streamed", "merged")
    }
    streamed, merged = ({n: t for file in found for n, t in file.items()} for found in files.values())
    assert streamed.keys() == merged.keys()
    print(f"equal to the bit: {sum(torch.equal(t, merged[n]) for n, t in streamed.items())} of {len(streamed)} tensors")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--check", action="store_true")
    main(**vars(parser.parse_args()))
