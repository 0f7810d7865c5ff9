"""Fingerprints: which base weight an adapter was trained on, told in a few bytes."""

import hashlib
import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lightning_oft.codecs import codec_of, is_sharded, packed_codec, parameter_of
from lightning_oft.layers.base import rotated_weights_of
from lightning_oft.model.traversal import Modules, adapted


def fingerprint(weight: Tensor | None, storage: str | None = None) -> str | None:
    """A short digest of a weight, `float32:9f2c...`: of its shape and 1,024 entries rounded to bfloat16, so that a
    base loaded in bfloat16 is recognised; `nf4-float32-cpu:9f2c...` of what a quantized weight stands for on a device,
    since another one may round it otherwise. None where the entries cannot be read (meta, packed or sharded)."""
    if weight is None or type(weight.data) is not Tensor or not weight.is_floating_point():
        return None
    if weight.is_meta or weight.numel() == 0:
        return None
    flat = weight.detach().reshape(-1)
    entries = flat[:: max(1, flat.numel() // 1024)][:1024].to(torch.bfloat16).view(torch.int16).cpu()
    digest = hashlib.sha256(repr(tuple(weight.shape)).encode() + entries.numpy().tobytes()).hexdigest()
    dtype = str(weight.dtype).removeprefix("torch.")
    return f"{dtype if storage is None else f'{storage}-{dtype}-{weight.device.type}'}:{digest[:16]}"


def checksum(weight: Tensor) -> int:
    """The sum of a tensor's bits as whole numbers: another one for any change of one entry, at the speed of memory."""
    flat = weight.detach().reshape(-1)
    width = math.gcd(8, flat.nbytes, flat.storage_offset() * flat.element_size())
    numbers = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.int8}[width]
    return int(flat.view(numbers).sum(dtype=torch.int64))


def layer_fingerprint(layer: nn.Module) -> str | None:
    """The fingerprint of a layer's first rotated weight, as it is now; None where nothing of it can be rotated."""
    return next((weight_fingerprint(layer, one.parameter) for one in rotated_weights_of(layer).values()), None)


def weight_fingerprint(layer: nn.Module, parameter: str) -> str | None:
    """The fingerprint of one weight of a layer as it is now; of a quantized one dequantized, where that needs no forward."""
    weight, packed = parameter_of(layer, parameter), packed_codec(layer, parameter)
    if packed is not None:
        storage = packed.storage(layer) if packed.has_own_reading else None
        is_here = weight is None or not (weight.is_meta or is_sharded(weight))
        return fingerprint(packed.read(layer, parameter), storage) if storage is not None and is_here else None
    if weight is None and (codec := codec_of(layer, parameter)) is not None:
        weight = codec.read(layer, parameter)
    return fingerprint(weight)


def same_base(mine: str | None, theirs: str | None) -> bool:
    """Whether two fingerprints can be of one weight. float16 rounds otherwise than bfloat16, and a quantized weight
    otherwise than it was, so they only equal their own kind, and what cannot be told counts as the same."""
    if mine is None or theirs is None:
        return True
    (my_dtype, mine), (their_dtype, theirs) = mine.split(":", 1), theirs.split(":", 1)
    if my_dtype != their_dtype and not {my_dtype, their_dtype} <= {"float32", "float64", "bfloat16"}:
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
