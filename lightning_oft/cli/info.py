"""`lightning-oft info PATH`: what an adapter directory or a Lightning checkpoint holds. Reads with torch only."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_oft import checkpoints
from lightning_oft import rotation as maths
from lightning_oft.adapters import read_adapter
from lightning_oft.cli.errors import OneLineParser, UserError
from lightning_oft.config import OFTConfig

DESCRIPTION = """\
Say what an adapter directory or a Lightning checkpoint holds: layers, block sizes, how far from
orthogonal its rotations are, how far they turn, its configuration and the base it was trained on.

example:
  lightning-oft info runs/adapter --layers
"""


@dataclasses.dataclass(frozen=True)
class Adapter:
    """What is printed of one adapter."""

    name: str
    config: OFTConfig
    generators: dict[str, Tensor]
    """By layer (and part of it), (n, b(b-1)/2)."""
    others: dict[str, Tensor]
    """Modules trained whole and biases."""
    base: str
    """Where the base comes from, as far as the file says."""


@dataclasses.dataclass(frozen=True)
class Geometry:
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
    kind, adapters = read(path)
    print(f"{path}: {kind}")
    for adapter in adapters:
        print("\n".join(lines(adapter, options.layers)))
    return 0


def _parser() -> OneLineParser:
    parser = OneLineParser(prog="lightning-oft info", description=DESCRIPTION)
    parser.add_argument("path", help="an adapter directory (PEFT's format) or a .ckpt file")
    parser.add_argument("--layers", action="store_true", help="a line for each layer")
    return parser


def read(path: Path) -> tuple[str, list[Adapter]]:
    """What kind of thing `path` is, and the adapters in it."""
    if path.is_dir():
        return _read_directory(path)
    if not path.is_file():
        raise UserError(f"info: no file or directory {str(path)!r}; give an adapter directory or a .ckpt file")
    return _read_checkpoint(path)


def _read_directory(path: Path) -> tuple[str, list[Adapter]]:
    file = read_adapter(path)
    prints = next(iter((file.fingerprint or {}).items()), None)
    name = file.extra.get("base_model_name_or_path") or "not named"
    base = f"{name}, fingerprint {prints[1]} of {prints[0]}" if prints else f"{name}, no fingerprint"
    writer = f"written for PEFT {file.extra.get('peft_version', 'before 0.18')}"
    return f"an adapter directory, {writer}", [Adapter("default", file.config, file.rotations, file.saved, base)]


def _read_checkpoint(path: Path) -> tuple[str, list[Adapter]]:
    checkpoint = checkpoints.read(path)
    where = f"epoch {checkpoint.get('epoch', '?')}, step {checkpoint.get('global_step', '?')}"
    return f"{_KINDS[checkpoints.content_of(checkpoint)]}; {where}", list(adapters_of(checkpoint))


_KINDS = {
    "adapter": "a Lightning checkpoint with an adapter and without its base",
    "full": "a Lightning checkpoint with an adapter and its base",
    "plain": "a Lightning checkpoint without an adapter",
    "merged": "a Lightning checkpoint of a merged model",
}


def adapters_of(checkpoint: dict[str, Any]) -> Iterator[Adapter]:
    """The adapters of a Lightning checkpoint, by the names that its LightningModule gives the layers."""
    state: dict[str, Tensor] = checkpoint["state_dict"]
    entry = checkpoint.get(checkpoints.ENTRY, {})
    for name, content in entry.get("adapters", {}).items():
        generators = {}
        for key in filter(checkpoints.is_rotation_key, state):
            layer, _, rest = key.partition(".oft_R.")
            adapter, _, part = rest.removesuffix(".weight").partition(".")
            if adapter == name:
                generators[f"{layer}.{part}" if part else layer] = state[key]
        waiting = {key: owners[name] for key, owners in entry.get("waiting", {}).items() if name in owners}
        others = {key: waiting.get(key, state.get(key)) for key in content.get("owned", ())}
        prints = next(((layer, p) for layer, p in content.get("fingerprints", {}).items() if p), None)
        base = f"fingerprint {prints[1]} of {prints[0]}" if prints else "no fingerprint"
        present = {key: value for key, value in others.items() if value is not None}
        yield Adapter(name, OFTConfig(**content["config"]), generators, present, base)


@torch.no_grad()
def geometry(generator: Tensor, config: OFTConfig) -> Geometry:
    """Error and angle of one layer's rotation, as the adapter's own map computes it."""
    block_size = maths.block_size_of(generator.shape[1])
    q_nbb = maths.skew(generator.float(), block_size)
    terms, halved = config.num_cayley_neumann_terms, config.neumann_series == "halved"
    r_nbb = maths.cayley_neumann(q_nbb, terms, halved) if config.use_cayley_neumann else maths.cayley(q_nbb)
    error, angle = maths.orthogonality_error(r_nbb).max(), maths.rotation_angle(r_nbb).max()
    return Geometry(len(generator), block_size, generator.numel(), float(error), float(angle))


def lines(adapter: Adapter, each_layer: bool = False) -> list[str]:
    """The description of one adapter, a line each."""
    layers = {name: geometry(generator, adapter.config) for name, generator in adapter.generators.items()}
    text = [f"adapter {adapter.name!r}", f"  base         {adapter.base}", f"  config       {_config(adapter.config)}"]
    if not layers:
        return [*text, "  layers       none: their rotations are in the weights already"]
    shapes = Counter((g.block_size, g.blocks) for g in layers.values())
    blocks = ", ".join(f"{count} of {n} x {b}" for (b, n), count in sorted(shapes.items()))
    worst = max(layers, key=lambda name: layers[name].error)
    widest = max(layers, key=lambda name: layers[name].angle)
    total = sum(g.parameters for g in layers.values())
    text += [
        f"  layers       {len(layers)} (blocks x block size: {blocks})",
        f"  parameters   {total:,} in rotations" + _and_others(adapter.others),
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


def _and_others(others: dict[str, Tensor]) -> str:
    return f", {sum(t.numel() for t in others.values()):,} in {', '.join(others)}" if others else ""


def _config(config: OFTConfig) -> str:
    """The fields that differ from their defaults; the block size always."""
    default = OFTConfig()
    changed = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    changed = {k: v for k, v in changed.items() if v != getattr(default, k) or k == "oft_block_size"}
    return " ".join(f"{key}={value}" for key, value in changed.items())
