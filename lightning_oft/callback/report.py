"""The lines a user reads: one when the fit starts, one when it ends, and warnings about constraints."""

import warnings
from collections import Counter
from collections.abc import Mapping

from torch import nn

from lightning_oft import functional
from lightning_oft.layers.rotation import Rotation
from lightning_oft.model.traversal import Modules, adapted, merged_layers, some


def start_line(adapter_name: str, layers: int, rotations: Mapping[str, Rotation], pl_module: nn.Module) -> str:
    """What is adapted: layers, trainable and total parameters, block sizes, the largest angle a constraint allows."""
    trainable = sum(p.numel() for p in pl_module.parameters() if p.requires_grad)
    total = sum(p.numel() for p in pl_module.parameters())
    sizes = Counter(rotation.block_size for rotation in rotations.values())
    blocks = ", ".join(f"{size} (x{count})" for size, count in sorted(sizes.items()))
    line = (
        f"OFT adapter {adapter_name!r}: {layers} layers, {trainable:,} of {total:,} parameters train "
        f"({100 * trainable / max(total, 1):.2f}%), block size {blocks}"
    )
    angles = [_largest_angle(rotation) for rotation in rotations.values() if rotation.radius is not None]
    return f"{line}; the constraint allows rotations up to {max(angles):.3g} degrees" if angles else line


def _largest_angle(rotation: Rotation) -> float:
    return functional.largest_angle(rotation.radius or 0.0)


def warn_about_constraint(rotations: Mapping[str, Rotation]) -> None:
    """Warn where a constraint allows next to nothing, or more than the truncated series can represent."""
    held = {name: rotation for name, rotation in rotations.items() if rotation.radius is not None}
    tight = {name: angle for name, rotation in held.items() if (angle := _largest_angle(rotation)) < 1}
    if tight:
        warnings.warn(
            f"the constraint lets {some(tight)} turn by at most {max(tight.values()):.2g} degrees, which trains next to "
            "nothing: raise eps, or give max_angle in degrees",
            stacklevel=2,
        )
    reach = {name: functional.series_reach(one.terms) for name, one in held.items() if one.terms is not None}
    loose = {name: _largest_angle(held[name]) for name in reach if (held[name].radius or 0) / 2**0.5 > reach[name]}
    if loose:
        warnings.warn(
            f"the constraint lets {some(loose)} turn by up to {max(loose.values()):.3g} degrees, where the truncated "
            "series is no longer orthogonal to float32: set use_cayley_neumann=false, or a smaller eps or max_angle",
            stacklevel=2,
        )


def end_line(adapter_name: str, modules: Modules, written: Mapping[str, str]) -> str:
    """What became of the adapter, and where it was written."""
    layers = len(list(adapted(modules)))
    how = f"merged into {layers} layers" if merged_layers(modules) else f"not merged, active beside {layers} layers"
    places = "".join(f"; {what} written to {place}" for what, place in written.items())
    return f"OFT adapter {adapter_name!r}: {how}{places}"
