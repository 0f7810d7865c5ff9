"""The lines a user reads: one when the fit starts, with warnings about constraints, and one when it ends."""

import warnings
from collections import Counter
from collections.abc import Mapping

from lightning.pytorch.utilities import rank_zero_info
from torch import nn

from lightning_oft import functional
from lightning_oft.layers.rotation import Rotation
from lightning_oft.model.folding import packed_layers
from lightning_oft.model.traversal import Modules, adapted, counted, merged_layers, some


def report_start(
    adapter_name: str, layers: Mapping[str, nn.Module], rotations: Mapping[str, Rotation], pl_module: nn.Module
) -> None:
    """Log what is adapted; warn where a constraint allows next to nothing, or more than a truncated series can do."""
    total = sum(p.numel() for p in pl_module.parameters())
    trainable = sum(p.numel() for p in pl_module.parameters() if p.requires_grad)
    sizes = Counter(rotation.block_size for rotation in rotations.values())
    blocks = "block size " + ", ".join(f"{size} (x{count})" for size, count in sorted(sizes.items()))
    blocks = blocks if rotations else "and no rotation of it"
    kinds = Counter(state.layer_type.name for _, _, state in adapted(layers))
    each = f" ({', '.join(f'{count} {kind}' for kind, count in kinds.items())})" if len(kinds) > 1 else ""
    radii = {name: rotation.radius for name, rotation in rotations.items() if rotation.radius is not None}
    angles = {name: functional.largest_angle(radius) for name, radius in radii.items()}
    limit = f"; the constraint allows rotations up to {max(angles.values()):.3g} degrees" if angles else ""
    rank_zero_info(
        f"OFT adapter {adapter_name!r}: {counted(len(layers), 'layer')}{each}, {trainable:,} of {total:,} parameters train "
        f"({100 * trainable / max(total, 1):.2f}%), {blocks}{limit}"
    )
    if tight := [name for name, angle in angles.items() if angle < 1]:
        warnings.warn(
            f"the constraint lets {some(tight)} turn by at most {max(angles[name] for name in tight):.2g} degrees, "
            "which trains next to nothing: raise eps, or give max_angle in degrees",
        )
    terms = {name: terms for name in radii if (terms := rotations[name].terms) is not None}
    warned = [name for name in terms if rotations[name].guard == "warn"]
    if loose := [name for name in warned if radii[name] / 2**0.5 > functional.series_reach(terms[name])]:
        warnings.warn(
            f"the constraint lets {some(loose)} turn by up to {max(angles[name] for name in loose):.3g} degrees, where "
            "the truncated series is no longer orthogonal to float32: set series_guard='exact', "
            "use_cayley_neumann=false, or a smaller eps or max_angle",
        )


def report_end(adapter_name: str, modules: Modules, written: Mapping[str, str]) -> None:
    """Log what became of the adapter, and where it was written."""
    layers = sum(adapter_name in state.configs for _, _, state in adapted(modules))
    how = f"{'merged into' if merged_layers(modules) else 'not merged, active beside'} {counted(layers, 'layer')}"
    if packed_layers(modules) and not merged_layers(modules):
        how += ", since the base is quantized"
        how += "" if "merged model" in written else " (save_merged(model, directory) writes a merged model)"
    places = "".join(f"; {what} written to {place}" for what, place in written.items())
    rank_zero_info(f"OFT adapter {adapter_name!r}: {how}{places}")
