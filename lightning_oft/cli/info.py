"""Say what an adapter directory or a Lightning checkpoint holds: layers, block sizes, how far from
orthogonal its rotations are, how far they turn, its configuration and the base it was trained on.

example:
  lightning-oft info runs/adapter --layers
"""

import dataclasses
from collections import Counter

import torch
from torch import Tensor

from lightning_oft import functional
from lightning_oft.cli.errors import OneLineParser
from lightning_oft.config import OFTConfig
from lightning_oft.formats import adapters, checkpoint, checkpoint_file
from lightning_oft.formats.hub import local
from lightning_oft.model.adapter_state import AdapterState
from lightning_oft.model.traversal import joined, some

_CONTENTS = {
    "adapter": "with an adapter and without its base",
    "full": "with an adapter and its base",
    "plain": "without an adapter",
    "merged": "of a merged model",
}


def run(arguments: list[str]) -> int:
    """Print what the path holds."""
    options = _parser().parse_args(arguments[1:])
    path = local(options.path)
    name = adapters.find_format(path).name
    if name == "checkpoint":  # also one without an adapter
        found = checkpoint_file.read(path)
        states, contents = checkpoint_file.read_states(found), _CONTENTS[checkpoint.content_of(found)]
        where = f"epoch {found.get('epoch', '?')}, step {found.get('global_step', '?')}"
        print(f"{path}: a Lightning checkpoint {contents}; {where}")
    else:
        states, kind = adapters.read_adapters(path), f"adapters of format {name}"
        if name == "peft":
            kind = f"an adapter directory, written for PEFT {states[0].extra.get('peft_version', 'before 0.18')}"
        print(f"{path}: {kind}")
    for state in states:
        print("\n".join(lines(state, options.layers)))
    return 0


def _parser() -> OneLineParser:
    parser = OneLineParser("info", __doc__)
    parser.add_argument("path", help="an adapter directory (PEFT's format), a .ckpt file or a hub id")
    parser.add_argument("--layers", action="store_true", help="a line for each layer")
    return parser


@torch.no_grad()
def geometry(generator: Tensor, config: OFTConfig) -> tuple[float, float]:
    """Error and angle of one layer's rotation, as the adapter's own map computes it."""
    terms = config.num_cayley_neumann_terms if config.use_cayley_neumann else None
    size = functional.block_size_of(generator.shape[1])
    r_nbb = functional.rotation_of(generator.float(), size, terms, config.neumann_series == "halved")
    return float(functional.orthogonality_error(r_nbb).max()), float(functional.rotation_angle(r_nbb).max())


def lines(state: AdapterState, each_layer: bool = False) -> list[str]:
    """The description of one adapter, a line each; of its configuration what differs from the defaults, and what a resume asks for."""
    base = (state.base.name_or_path if state.base is not None else None) or "not named"
    # The first by name: a directory and a checkpoint have them in two orders.
    prints = (f"fingerprint {value} of {layer}" for layer, value in sorted(state.fingerprints.items()))
    fields, default = dataclasses.asdict(state.config), OFTConfig()
    changed = (
        f"{k}={v}" for k, v in fields.items() if v != getattr(default, k) or k in ("oft_block_size", "target_modules")
    )
    text = [
        f"adapter {state.name!r}",
        f"  base         {base}, {next(prints, 'no fingerprint')}",
        f"  config       {' '.join(changed)}",
    ]
    layers, errors, angles = state.generators(), {}, {}
    if not layers:
        return [*text, "  layers       none: their rotations are in the weights already"]
    exact = {joined(name, part) for name, one in state.layers.items() for part in one.exact_parts}
    for name, generator in layers.items():
        config = dataclasses.replace(state.config, use_cayley_neumann=False) if name in exact else state.config
        errors[name], angles[name] = geometry(generator, config)
    sizes = {name: (functional.block_size_of(generator.shape[1]), len(generator)) for name, generator in layers.items()}
    blocks = ", ".join(f"{count} of {n} x {b}" for (b, n), count in sorted(Counter(sizes.values()).items()))
    worst, widest = max(errors, key=errors.__getitem__), max(angles, key=angles.__getitem__)
    total = sum(generator.numel() for generator in layers.values())
    text += [
        f"  layers       {len(layers)} (blocks x block size: {blocks})",
        f"  parameters   {total:,} in rotations{_beside(state)}",
        f"  error        {errors[worst]:.1e} = largest ||R^T R - I||, in {worst}",
        f"  angle        {angles[widest]:.2f} degrees = largest turn of a plane, in {widest}",
    ]
    if exact:
        text.append(f"  map          exact in {some(sorted(exact))}, which left the series in training")
    if each_layer:
        width = max(map(len, layers))
        text.append(f"  {'layer':<{width}}  blocks  size  parameters    error  degrees")
        for name, (b, n) in sizes.items():
            row = f"  {name:<{width}}  {n:>6}  {b:>4}  {layers[name].numel():>10,}"
            text.append(f"{row}  {errors[name]:.1e}  {angles[name]:>7.2f}")
    return text


def _beside(state: AdapterState) -> str:
    """How many parameters an adapter has beside its generators."""
    scales = sum(one.numel() for own in state.layers.values() for one in own.magnitudes.values())
    others = sum(tensor.numel() for tensor in state.saved.values())
    counts = [f"{scales:,} magnitudes"] if scales else []
    counts += [f"{others:,} in {', '.join(state.saved)}"] if others else []
    return "".join(f", {one}" for one in counts)
