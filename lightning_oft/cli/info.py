"""`lightning-oft info PATH`: what an adapter directory or a Lightning checkpoint holds. Reads with torch only."""

import dataclasses
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_oft import functional
from lightning_oft.cli.errors import OneLineParser
from lightning_oft.config import OFTConfig
from lightning_oft.formats import adapters, checkpoint, checkpoint_file
from lightning_oft.model.adapter_state import AdapterState

DESCRIPTION = """\
Say what an adapter directory or a Lightning checkpoint holds: layers, block sizes, how far from
orthogonal its rotations are, how far they turn, its configuration and the base it was trained on.

example:
  lightning-oft info runs/adapter --layers
"""
_CONTENTS = {
    "adapter": "with an adapter and without its base",
    "full": "with an adapter and its base",
    "plain": "without an adapter",
    "merged": "of a merged model",
}


def run(arguments: list[str]) -> int:
    """Print what the path holds."""
    options = _parser().parse_args(arguments)
    kind, states = _read(Path(options.path))
    print(f"{options.path}: {kind}")
    for state in states:
        print("\n".join(lines(state, options.layers)))
    return 0


def _parser() -> OneLineParser:
    parser = OneLineParser(prog="lightning-oft info", description=DESCRIPTION)
    parser.add_argument("path", help="an adapter directory (PEFT's format) or a .ckpt file")
    parser.add_argument("--layers", action="store_true", help="a line for each layer")
    return parser


def _read(path: Path) -> tuple[str, list[AdapterState]]:
    """What kind of thing `path` is, and the adapters in it."""
    name = adapters.find_format(path).name
    if name == "checkpoint":  # read here: one without an adapter has something to say too
        found = checkpoint_file.read(path)
        where = f"epoch {found.get('epoch', '?')}, step {found.get('global_step', '?')}"
        kind = f"a Lightning checkpoint {_CONTENTS[checkpoint.content_of(found)]}; {where}"
        return kind, checkpoint_file.read_states(found)
    states = adapters.read_adapters(path)
    if name == "peft":
        return f"an adapter directory, written for PEFT {states[0].extra.get('peft_version', 'before 0.18')}", states
    return f"of format {name}", states


class Geometry(NamedTuple):
    """One layer's rotation in numbers."""

    blocks: int
    block_size: int
    parameters: int
    error: float
    angle: float


@torch.no_grad()
def geometry(generator: Tensor, config: OFTConfig) -> Geometry:
    """Error and angle of one layer's rotation, as the adapter's own map computes it."""
    block_size = functional.block_size_of(generator.shape[1])
    q_nbb = functional.skew(generator.float(), block_size)
    terms, halved = config.num_cayley_neumann_terms, config.neumann_series == "halved"
    r_nbb = functional.cayley_neumann(q_nbb, terms, halved) if config.use_cayley_neumann else functional.cayley(q_nbb)
    error, angle = functional.orthogonality_error(r_nbb).max(), functional.rotation_angle(r_nbb).max()
    return Geometry(len(generator), block_size, generator.numel(), float(error), float(angle))


def lines(state: AdapterState, each_layer: bool = False) -> list[str]:
    """The description of one adapter, a line each; of its configuration what differs from the defaults."""
    base = (state.base.name_or_path if state.base is not None else None) or "not named"
    prints = (f"fingerprint {value} of {layer}" for layer, value in state.fingerprints.items())
    fields, default = dataclasses.asdict(state.config), OFTConfig()
    changed = (f"{k}={v}" for k, v in fields.items() if v != getattr(default, k) or k == "oft_block_size")
    text = [
        f"adapter {state.name!r}",
        f"  base         {base}, {next(prints, 'no fingerprint')}",
        f"  config       {' '.join(changed)}",
    ]
    layers = {name: geometry(generator, state.config) for name, generator in state.generators().items()}
    if not layers:
        return [*text, "  layers       none: their rotations are in the weights already"]
    shapes = Counter((g.block_size, g.blocks) for g in layers.values())
    blocks = ", ".join(f"{count} of {n} x {b}" for (b, n), count in sorted(shapes.items()))
    worst = max(layers, key=lambda name: layers[name].error)
    widest = max(layers, key=lambda name: layers[name].angle)
    total, others = sum(g.parameters for g in layers.values()), sum(tensor.numel() for tensor in state.saved.values())
    text += [
        f"  layers       {len(layers)} (blocks x block size: {blocks})",
        f"  parameters   {total:,} in rotations" + (f", {others:,} in {', '.join(state.saved)}" if others else ""),
        f"  error        {layers[worst].error:.1e} = largest ||R^T R - I||, in {worst}",
        f"  angle        {layers[widest].angle:.2f} degrees = largest turn of a plane, in {widest}",
    ]
    if each_layer:
        width = max(map(len, layers))
        text.append(f"  {'layer':<{width}}  blocks  size  parameters    error  degrees")
        text += [
            f"  {name:<{width}}  {g.blocks:>6}  {g.block_size:>4}  {g.parameters:>10,}  {g.error:.1e}  {g.angle:>7.2f}"
            for name, g in layers.items()
        ]
    return text
