"""Fingerprints: which base weight an adapter was trained on, told in a few bytes."""

import contextlib
import hashlib
import math
from collections.abc import Iterator, Mapping
from contextvars import ContextVar

import torch
from torch import Tensor, nn

from lightning_oft.codecs import codec_of, is_scattered, is_sharded, packed_codec, parameter_of
from lightning_oft.layers.base import rotated_weights_of
from lightning_oft.layers.state import LayerState, Record, make_record, record_of
from lightning_oft.model.saved_modules import saved_tensors
from lightning_oft.model.traversal import Modules, adapted, joined, own_tensors, tensor_of

_known: ContextVar[dict[int, tuple[Tensor, str | None]] | None] = ContextVar("_known", default=None)


@contextlib.contextmanager
def each_read_once() -> Iterator[None]:
    """Within, nobody writes to the model's parameters, and each is read for its fingerprint once."""
    before = _known.set({})
    try:
        yield
    finally:
        _known.reset(before)


def fingerprint(weight: Tensor | None, storage: str | None = None) -> str | None:
    """A short digest of a weight, `float32:9f2c...`: of its shape and 1,024 entries rounded to bfloat16, so that a
    base loaded in bfloat16 is recognised; `int8-float32-cpu:9f2c...` of what a quantized weight stands for on a
    device, since another one may round it otherwise. None where the entries cannot be read (meta, packed or sharded)."""
    known = _known.get() if storage is None and isinstance(weight, nn.Parameter) else None
    if known is None or weight is None:
        return _read(weight, storage)
    if id(weight) not in known:
        known[id(weight)] = weight, _read(weight)  # the weight too, so that no other can have its id
    return known[id(weight)][1]


def _read(weight: Tensor | None, storage: str | None = None) -> str | None:
    if weight is None or type(weight.data) is not Tensor or not weight.is_floating_point():
        return None
    if weight.is_meta or weight.numel() == 0:
        return None
    flat = weight.detach().reshape(-1)
    some = flat[:: max(1, flat.numel() // 1024)][:1024]
    entries = some.to(torch.bfloat16, copy=True).view(torch.int16).cpu()  # numpy marks what it shares, for good
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
        is_here = weight is None or not (weight.is_meta or is_sharded(weight))
        if not is_here or not packed.has_own_reading or packed.storage(layer) is None:
            return None
        name, values = packed.lasting(layer, parameter)
        return fingerprint(values, name)
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
    known = {name: base_fingerprint(layer, state) for name, layer, state in adapted(layers)}
    mine = {name: known[name] if name in known else layer_fingerprint(layer) for name, layer in layers.items()}
    return [name for name in mine if not same_base(mine[name], fingerprints[name])]


def base_fingerprint(layer: nn.Module, state: LayerState) -> str | None:
    """The fingerprint of the base that an adapted layer turns now, which may have been loaded or trained since the
    injection. Of a weight that is merged, sharded or quantized it is the one that was known."""
    names = [one.parameter for one in rotated_weights_of(layer).values()]
    weight = parameter_of(layer, names[0]) if names and state.merged is None else None
    now = fingerprint(weight) if weight is not None and not is_scattered(weight) else None
    return state.fingerprint if now is None or (state.fingerprint and same_base(now, state.fingerprint)) else now


def changed_bases(modules: Mapping[str, nn.Module]) -> list[str]:
    """Names of the adapted layers whose base weight is another one than it was."""
    known = ((name, state.fingerprint, base_fingerprint(layer, state)) for name, layer, state in adapted(modules))
    return [name for name, then, now in known if then is not None and then != now]


def note_base(modules: Modules, again: bool = False) -> None:
    """Remember the tensors that are in the model now, for `trained_beside`; `again` those that are known, too, and the
    weights as those that its adapters belong to."""
    for module in modules.values():
        for key in own_tensors(module):
            if again or key not in make_record(module).base:
                make_record(module).base[key] = _own_fingerprint(module, key)
    for _, layer, state in adapted(modules) if again else ():
        state.fingerprint = base_fingerprint(layer, state)


def trained_beside(modules: Modules) -> list[str]:
    """Names of the parameters and buffers that train, or have changed since the injection, and that no adapter has."""
    skipped = {id(one.tensor) for one in saved_tensors(modules) if one.slot.owners}
    for _, layer, state in adapted(modules):
        parts = (parameter_of(layer, one.parameter) for one in rotated_weights_of(layer).values())
        skipped |= {id(weight) for weight in parts if state.merged is not None}
    found = []
    for name, module in modules.items():
        record = record_of(module) or Record()
        for key in own_tensors(module):
            tensor = tensor_of(module, key)
            trains = record.released.get(key, tensor.requires_grad)  # a merged model trains again as it once did
            changed = key in record.base and not same_base(record.base[key], _own_fingerprint(module, key))
            if id(tensor) not in skipped and (trains or changed):
                found.append(joined(name, key))
    return found


def _own_fingerprint(module: nn.Module, key: str) -> str | None:
    tensor = tensor_of(module, key)
    return None if is_scattered(tensor) else fingerprint(tensor)


def refresh_fingerprints(modules: Modules) -> None:
    """Recognise the base that is in the model now, after it was replaced."""
    note_base(modules, again=True)
    for _, layer, state in adapted(modules):
        state.fingerprint = layer_fingerprint(layer)
