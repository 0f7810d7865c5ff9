"""Fingerprints: which base weight an adapter was trained on, told in a few bytes."""

import hashlib
import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lightning_oft.codecs import parameter_of
from lightning_oft.layers.base import rotated_weights_of
from lightning_oft.model.traversal import Modules, adapted


def fingerprint(weight: Tensor | None) -> str | None:
    """A short digest of a weight, `float32:9f2c...`: of its shape and 1,024 entries rounded to bfloat16, so that a
    base loaded in bfloat16 is recognised. None where the entries cannot be read (meta, packed or sharded)."""
    if weight is None or type(weight.data) is not Tensor or not weight.is_floating_point():
        return None
    if weight.is_meta or weight.numel() == 0:
        return None
    flat = weight.detach().reshape(-1)
    entries = flat[:: max(1, flat.numel() // 1024)][:1024].to(torch.bfloat16).view(torch.int16).cpu()
    digest = hashlib.sha256(repr(tuple(weight.shape)).encode() + entries.numpy().tobytes()).hexdigest()
    return f"{str(weight.dtype).removeprefix('torch.')}:{digest[:16]}"


def checksum(weight: Tensor) -> int:
    """The sum of a tensor's bits as whole numbers: another one for any change of one entry, at the speed of memory."""
    flat = weight.detach().reshape(-1)
    width = math.gcd(8, flat.nbytes, flat.storage_offset() * flat.element_size())
    numbers = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.int8}[width]
    return int(flat.view(numbers).sum(dtype=torch.int64))


def layer_fingerprint(layer: nn.Module) -> str | None:
    """The fingerprint of a layer's first rotated weight, as it is now; None where nothing of it can be rotated."""
    return next((fingerprint(parameter_of(layer, one.parameter)) for one in rotated_weights_of(layer).values()), None)


def same_base(mine: str | None, theirs: str | None) -> bool:
    """Whether two fingerprints can be of one weight. float16 rounds otherwise than bfloat16, so it only equals itself,
    and what cannot be told counts as the same."""
    if mine is None or theirs is None:
        return True
    (my_dtype, mine), (their_dtype, theirs) = mine.split(":", 1), theirs.split(":", 1)
    if my_dtype != their_dtype and "float16" in (my_dtype, their_dtype):
        return True
    return mine == theirs


def other_bases(modules: Modules, fingerprints: Mapping[str, str | None]) -> list[str]:
    """Names of the layers whose base weight is not that of a fingerprint. What cannot be told counts as the same."""
    layers = {name: module for name, module in modules.items() if name in fingerprints}
    known = {name: state.fingerprint for name, _, state in adapted(layers)}
    mine = {name: known[name] if name in known else layer_fingerprint(layer) for name, layer in layers.items()}
    return [name for name in mine if not same_base(mine[name], fingerprints[name])]


def refresh_fingerprints(modules: Modules) -> None:
    """Recognise the base that is in the model now, after it was replaced."""
    for _, layer, state in adapted(modules):
        state.fingerprint = layer_fingerprint(layer)
