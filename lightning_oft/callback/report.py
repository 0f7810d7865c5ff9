"""The lines a user reads: one when the fit starts, one when it ends, and warnings about constraints."""

from __future__ import annotations

import warnings
from collections import Counter

from torch import nn

from lightning_oft import functional
from lightning_oft.layers.state import rotations_of
from lightning_oft.model.traversal import adapted, merged_layers, some, walk


def start_line(pl_module: nn.Module, root: nn.Module, adapter_name: str) -> str:
    """What is adapted: layers, trainable and total parameters, block sizes, the largest angle a constraint allows."""
    sizes: Counter[int] = Counter()
    layers, radius = 0, None
    for _, layer, state in adapted(walk(root)):
        if adapter_name not in state.configs:
            continue
        layers += 1
        for rotation in rotations_of(layer, adapter_name).values():
            sizes[rotation.block_size] += 1
            if rotation.radius is not None:
                radius = max(radius or 0.0, rotation.radius)
    trainable = sum(p.numel() for p in pl_module.parameters() if p.requires_grad)
    total = sum(p.numel() for p in pl_module.parameters())
    blocks = ", ".join(f"{size} (x{count})" for size, count in sorted(sizes.items()))
    share = 100 * trainable / max(total, 1)
    line = f"OFT adapter {adapter_name!r}: {layers} layers, {trainable:,} of {total:,} parameters train ({share:.2f}%)"
    line += f", block size {blocks}"
    if radius is not None:
        line += f"; the constraint allows rotations up to {functional.largest_angle(radius):.3g} degrees"
    return line


def warn_about_constraint(root: nn.Module, adapter_name: str) -> None:
    """Warn where a constraint allows next to nothing, or more than the truncated series can represent."""
    tight, loose = {}, {}
    for name, layer, state in adapted(walk(root)):
        if adapter_name not in state.configs:
            continue
        for rotation in rotations_of(layer, adapter_name).values():
            if rotation.radius is None:
                continue
            if functional.largest_angle(rotation.radius) < 1:
                tight[name] = functional.largest_angle(rotation.radius)
            reach = functional.series_reach(rotation.terms) if rotation.terms is not None else float("inf")
            if rotation.radius / 2**0.5 > reach:
                loose[name] = functional.largest_angle(rotation.radius)
    if tight:
        warnings.warn(
            f"the constraint lets {some(tight)} turn by at most {max(tight.values()):.2g} degrees, which trains next to "
            "nothing: raise eps, or give max_angle in degrees",
            stacklevel=2,
        )
    if loose:
        warnings.warn(
            f"the constraint lets {some(loose)} turn by up to {max(loose.values()):.3g} degrees, where the truncated "
            "series is no longer orthogonal to float32: set use_cayley_neumann=false, or a smaller eps or max_angle",
            stacklevel=2,
        )


def end_line(root: nn.Module, adapter_name: str, written: dict[str, str]) -> str:
    """What became of the adapter, and where it was written."""
    modules = walk(root)
    layers = len(list(adapted(modules)))
    how = f"merged into {layers} layers" if merged_layers(modules) else f"not merged, active beside {layers} layers"
    places = "".join(f"; {what} written to {place}" for what, place in written.items())
    return f"OFT adapter {adapter_name!r}: {how}{places}"
