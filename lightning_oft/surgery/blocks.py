"""Block sizes: what a layer takes where the configured size does not divide its fan-in."""

from __future__ import annotations

import warnings
from typing import NamedTuple

from lightning_oft.config import OFTConfig
from lightning_oft.rotation import generator_size

from .targets import Target
from .walk import some


class Size(NamedTuple):
    """The block size of one rotation, and a note where it is not the configured one."""

    block_size: int
    note: str | None


def nearest_divisor(number: int, wanted: int) -> int:
    """The divisor of `number` nearest to `wanted`, the lower one of two at the same distance; as in PEFT."""
    if wanted >= number:
        return number
    divisors = [d for d in range(1, number + 1) if number % d == 0]
    return min(divisors, key=lambda d: (abs(d - wanted), d))


def block_size(fan_in: int, config: OFTConfig) -> Size:
    """The block size for a fan-in."""
    if config.r:
        blocks = nearest_divisor(fan_in, config.r)
        note = None if blocks == config.r else f"r={blocks} instead of {config.r} for fan-in {fan_in}"
        return Size(fan_in // blocks, note)
    wanted = config.oft_block_size or 0
    size = nearest_divisor(fan_in, wanted)
    note = None if size == wanted else f"block size {size} instead of {wanted} for fan-in {fan_in}"
    return Size(size, note)


def block_sizes(targets: dict[str, Target], config: OFTConfig, warn: bool = True) -> dict[str, dict[str, int]]:
    """Block sizes by layer and part; one warning names the layers whose size had to be adjusted.

    Raises:
        ValueError: a layer would be left without parameters, such as a prime fan-in that gets blocks of size 1.
    """
    sizes: dict[str, dict[str, int]] = {}
    adjusted: dict[str, list[str]] = {}
    for name, target in targets.items():
        parts = target.kind.parts(target.module)
        sizes[name] = {}
        for part in target.parts:
            fan_in = parts[part].fan_in
            size = block_size(fan_in, config)
            if generator_size(size.block_size) == 0:
                asked = f"r={config.r}" if config.r else f"oft_block_size={config.oft_block_size}"
                raise ValueError(
                    f"{name or 'the model itself'}: fan-in {fan_in} with {asked} leaves blocks of size 1, that is no "
                    f"parameter at all; add it to exclude_modules, or use a block size near a divisor of {fan_in}"
                )
            sizes[name][part] = size.block_size
            if size.note:
                adjusted.setdefault(size.note, []).append(name)
    if adjusted and warn:
        lines = "; ".join(f"{note}: {some(dict.fromkeys(names))}" for note, names in adjusted.items())
        warnings.warn(f"block sizes adjusted to divide the fan-in: {lines}", stacklevel=3)
    return sizes
