"""`lightning-oft info PATH`: what an adapter directory or a Lightning checkpoint holds. Reads with torch only."""

import dataclasses
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_oft import functional
from lightning_oft.cli.errors import OneLineParser, UserError
from lightning_oft.config import OFTConfig
from lightning_oft.formats.adapters import read_adapters
from lightning_oft.formats.checkpoint import content_of
from lightning_oft.formats.checkpoint_file import read as read_checkpoint
from lightning_oft.formats.checkpoint_file import read_states
from lightning_oft.model.adapter_state import AdapterState

DESCRIPTION = """\
Say what an adapter directory or a Lightning checkpoint holds: layers, block sizes, how far from
orthogonal its rotations are, how far they turn, its configuration and the base it was trained on.

example:
  lightning-oft info runs/adapter --layers
"""


class Geometry(NamedTuple):
    """One layer's rotation in numbers."""

    blocks: int
    block_size: int
    parameters: int
    error: float
    angle: float


def run(arguments: list[str]) -> int:
    """Print what the path holds."""
    options = _parser().parse_args(arguments)
    path = Path(options.path)
    if not path.exists():
        raise UserError(f"info: no file or directory {str(path)!r}; give an adapter directory or a .ckpt file")
    kind, states = _read(path)
    print(f"{path}: {kind}")
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
    if path.is_dir():
        states = read_adapters(path)
        return f"an adapter directory, written for PEFT {states[0].extra.get('peft_version', 'before 0.18')}", states
    checkpoint = read_checkpoint(path)
    kind = _CONTENTS[content_of(checkpoint)]
    where = f"epoch {checkpoint.get('epoch', '?')}, step {checkpoint.get('global_step', '?')}"
    return f"{kind}; {where}", read_states(checkpoint)


_CONTENTS = {
    "adapter": "a Lightning checkpoint with an adapter and without its base",
    "full": "a Lightning checkpoint with an adapter and its base",
    "plain": "a Lightning checkpoint without an adapter",
    "merged": "a Lightning checkpoint of a merged model",
}


def _base(state: AdapterState) -> str:
    """Where the base comes from, as far as the file says."""
    name = (state.base.name_or_path if state.base is not None else None) or "not named"
    layer, print_ = next(iter(state.fingerprints.items()), ("", None))
    return f"{name}, fingerprint {print_} of {layer}" if print_ else f"{name}, no fingerprint"


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
    """The description of one adapter, a line each."""
    layers = {name: geometry(generator, state.config) for name, generator in state.generators().items()}
    text = [f"adapter {state.name!r}", f"  base         {_base(state)}", f"  config       {_config(state.config)}"]
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


def _config(config: OFTConfig) -> str:
    """The fields that differ from their defaults; the block size always."""
    fields, default = dataclasses.asdict(config), OFTConfig()
    return " ".join(f"{k}={v}" for k, v in fields.items() if v != getattr(default, k) or k == "oft_block_size")
