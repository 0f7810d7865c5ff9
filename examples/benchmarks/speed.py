"""Measure this library beside the frozen base, PEFT's LoRA and PEFT's OFT: time, memory and operators.

    pip install '.[test]'
    python examples/benchmarks/speed.py                        # about five minutes on two cores
    python examples/benchmarks/speed.py --list                 # the bounds we hold ourselves to; about half an hour
    python examples/benchmarks/speed.py --full --compile --output speed.json --plot speed.png    # hours
    python examples/benchmarks/speed.py --read speed.json --list

All variants run in one process, a round of each after the other, so that a busy machine disturbs them alike; the clock
is the CPU time of one thread, and again the wall time of several. The table shows medians, quartiles and ratios to the
frozen base: in training that is the model without an adapter and with a gradient through it to its input, the limit
that no adapter can go below. An optimizer step is not measured. A GPU, where there is one, is measured after the CPU.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import models
import suites
import torch
from bounds import listed
from measuring import Effort, device_name, threads
from report import Row, draw, markdown, read, save
from suites import Setup

SUITES = ("operators", "kept", "training", "generation", "merging", "unet", "vit", "files", "injection")
WIDTHS = {"quick": [768], "list": [768, 2048], "full": [256, 768, 2048, 4096]}
KEPT_WIDTHS = {"quick": [256, 768], "list": [256, 768, 2048, 4096], "full": [256, 768, 2048, 4096]}
SIZES = {"quick": ["2x64", "2x512"], "list": ["2x64", "2x512", "8x1024"], "full": ["2x64", "2x512", "8x1024"]}
LONG_UP_TO = 768
"""Widest model for 8,192 tokens, unless sizes are given: beyond, a step takes minutes."""


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--list", action="store_true", help="measure what the bounds need, and print only them, each held or not")
    add("--full", action="store_true", help="all widths and sizes")
    add("--compile", action="store_true", help="add the compiled base and ours compiled to the training steps")
    add("--only", nargs="+", choices=SUITES, help="measure only these")
    add("--hidden", nargs="+", type=int, help="widths of the Llama-like models")
    add("--layers", type=int, help="layers of each; by default what fits")
    add("--tokens", nargs="+", help="sizes of a training step, as batch x length: 2x64 2x512 8x1024")
    add("--linear", type=int, default=4096, help="width of the single layer that is merged")
    add("--count", nargs=2, type=int, default=(2000, 1000), help="linears to inject into, and to save and load")
    add("--unet", type=int, default=128, help="channels of the UNet")
    add("--vit", type=int, default=384, help="width of the ViT")
    add("--image", type=int, help="pixels of the pictures; the UNet's latents have an eighth; 128, or 256 for --list")
    add("--block-size", type=int, default=32)
    add("--threads", type=int, default=2, help="of the wall clock; the CPU clock has one")
    add("--seconds", type=float, help="rounds of a measurement are added until these are over; 6, or 30 for --list")
    add("--rounds", nargs=2, type=int, default=(3, 15), help="fewest and most rounds of a measurement")
    add("--devices", nargs="+", choices=("cpu", "cuda"), help="by default all there are")
    add("--cpu-bfloat16", action="store_true", help="also time bfloat16 on the CPU; a GPU has it timed always")
    add("--output", help="save every sample as JSON")
    add("--plot", help="draw one picture; needs the extra `plot`")
    add("--read", help="print or draw a saved JSON instead of measuring")
    options = parser.parse_args(arguments)
    options.only = options.only or [name for name in SUITES if name != "vit" or not options.list]  # no bound for a ViT
    return options


def main(arguments: Sequence[str] | None = None) -> list[Row]:
    """Measure, print the table, save and draw; returns the rows."""
    options = parse(arguments)
    if options.read:
        environment, rows = read(options.read)
    else:
        environment, rows = _measure(options)
    print("\n".join(f"{key}: {value}" for key, value in environment.items()), end="\n\n")
    print(listed(rows) if options.list else markdown(rows))
    if options.plot:
        draw(options.plot, environment, rows)
    return rows


def _measure(options: argparse.Namespace) -> tuple[dict[str, str], list[Row]]:
    started = time.perf_counter()
    devices = options.devices or ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    environment, rows = _environment(options, devices), []
    with warnings.catch_warnings(), threads(1):  # counts need no second one; clocks set their own
        warnings.simplefilter("ignore")  # PEFT's and transformers' own
        for setup in _setups(options, devices):
            for row in _rows(options, setup):
                rows.append(row)
                taken = time.perf_counter() - started
                environment["measured"] = f"{time.strftime('%Y-%m-%d')}, in {taken:.0f} s"
                print(f"{taken:6.0f} s  {row.model}: {row.what}, {row.clock}", file=sys.stderr)
                if options.output:  # a run of hours that is interrupted has its rows
                    save(options.output, environment, rows)
    return environment, rows


def _environment(options: argparse.Namespace, devices: Sequence[str]) -> dict[str, str]:
    found = {device: device_name(device) for device in devices}
    found |= {"torch": str(torch.__version__), "block size": str(options.block_size)}
    if models.HAS_PEFT:
        import peft

        found["peft"] = peft.__version__
    return found


def _setups(options: argparse.Namespace, devices: Sequence[str]) -> Iterator[Setup]:
    effort = Effort(options.seconds or (30.0 if options.list or options.full else 6.0), *options.rounds)
    for device in devices:
        dtypes = [torch.float32]
        if device == "cuda" or options.cpu_bfloat16:
            dtypes.append(torch.bfloat16)
        for dtype in dtypes:
            yield Setup(device, dtype, models.CHOSEN, options.block_size, options.threads, effort)


def _rows(options: argparse.Namespace, setup: Setup) -> Iterator[Row]:
    """All rows of one device and number format."""
    places: dict[str, Any] = {"device": setup.device, "dtype": setup.dtype}
    image = options.image or (256 if options.list or options.full else 128)
    if "unet" in options.only:
        for convolutions in (False, True):
            case = models.unet(options.unet, **places, convolutions=convolutions, size=image // 8)
            yield from suites.training(case, setup, "2 pictures")
    if "vit" in options.only:
        case = models.vit(options.vit, options.layers or 6, **places, size=image)
        yield from suites.training(case, setup, "4 pictures")
    yield from _llamas(options, setup)
    if "merging" in options.only:
        linear = suites.linears(1, options.linear, setup.device).to(setup.dtype)
        yield from suites.merging(f"linear {options.linear}", linear, ["0"], setup)
    many = r"\d+"
    if "injection" in options.only and (setup.device, setup.dtype) == ("cpu", torch.float32):
        count = options.count[0]
        yield from suites.injecting(f"{count:,} linears on meta", suites.linears(count, 768, "meta"), many, setup)
    if "files" in options.only:
        count = options.count[1]
        yield from suites.files(f"{count:,} linears", suites.linears(count, 256, setup.device), many, setup)


def _llamas(options: argparse.Namespace, setup: Setup) -> Iterator[Row]:
    preset = "full" if options.full else "list" if options.list else "quick"
    for hidden in sorted({*(options.hidden or WIDTHS[preset]), *(options.hidden or KEPT_WIDTHS[preset])}):
        layers = options.layers or models.layers_for(hidden)
        build = partial(models.llama, hidden, layers)
        timed = hidden in (options.hidden or WIDTHS[preset])
        for size in options.tokens or SIZES[preset]:
            batch, length = map(int, size.split("x"))
            is_long = batch * length > 1024
            if timed and (options.tokens or not is_long or hidden <= LONG_UP_TO):
                yield from _training(options, setup, partial(build, batch, length), f"{batch} x {length}", is_long)
            if "kept" in options.only and not is_long:
                for dtype in (torch.float32, torch.bfloat16) if setup.dtype == torch.float32 else ():
                    case = build(batch, length, setup.device, dtype)
                    yield from suites.kept(case, replace(setup, dtype=dtype), f"{batch} x {length}")
        if timed and hidden <= 1024:
            yield from _whole(options, setup, build(1, 1, setup.device, setup.dtype))


def _training(options: argparse.Namespace, setup: Setup, build: Any, size: str, is_long: bool) -> Iterator[Row]:
    if "operators" in options.only and not is_long and setup.dtype == torch.float32:
        yield from suites.operators(build(setup.device, setup.dtype), setup, size)
    if "training" in options.only:
        if options.compile:
            setup = replace(setup, names=(*models.CHOSEN, models.BASE_COMPILED, models.OURS_COMPILED))
        yield from suites.training(build(setup.device, setup.dtype), setup, size)


def _whole(options: argparse.Namespace, setup: Setup, case: models.Case) -> Iterator[Row]:
    """Generation, merging and files of one Llama."""
    if "generation" in options.only:
        yield from suites.generation(case, setup)
    if "merging" in options.only:
        yield from suites.merging(case.name, case.base, case.targets, setup)
    if "injection" in options.only:
        yield from suites.injecting(case.name, case.base, case.targets, setup)
    if "files" in options.only:
        yield from suites.files(case.name, case.base, case.targets, setup)


if __name__ == "__main__":
    main()
