"""The quantized and packed layers of a model: what is not to happen to them while they have rotations."""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from itertools import accumulate

from torch import nn

from lightning_oft.codecs import Codec, is_sharded, packed_codec
from lightning_oft.model.traversal import Modules, joined


def writable_codec(layer: nn.Module) -> dict[str, Codec] | None:
    """The codec of a layer's packed weight, where it can be written back: this process has it whole and quantized."""
    codec = packed_codec(layer)
    if codec is None or not codec.can_write(layer) or codec.storage(layer) is None:
        return None
    return None if any(is_sharded(p) for p in layer.parameters(recurse=False)) else {"weight": codec}


def packed_names(model: nn.Module) -> list[str]:
    """Names of all quantized and packed modules, adapted or not, as a state dict has them."""
    modules = model.named_modules(remove_duplicate=False)
    return [name for name, module in modules if packed_codec(module) is not None]


@contextmanager
def without_packed(model: nn.Module, names: Collection[str]) -> Iterator[None]:
    """Within this context, layers of whose packed weights there is nothing among the `names` of a state dict have only
    what else they hold. Their classes insist on all of it, and take up half of it, or change what trains (measured of
    bitsandbytes, quanto and HQQ)."""
    own = [name for name in names if "oft_R" not in name.split(".") and not name.endswith(".bias")]
    present = {above for name in own for above in accumulate(name.split("."), joined)}
    stand_ins: dict[int, nn.Module] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if id(module) not in stand_ins and packed_codec(module) is not None and name not in present and name:
            stand_in = stand_ins[id(module)] = nn.Module()
            stand_in._modules.update({key: child for key, child in module._modules.items() if key == "oft_R"})
            if f"{name}.bias" in names:
                stand_in._parameters["bias"] = module._parameters.get("bias")
    places = [
        (parent, key, child)
        for parent in list(model.modules())
        for key, child in parent._modules.items()
        if child is not None and id(child) in stand_ins
    ]
    try:
        for parent, key, child in places:
            parent._modules[key] = stand_ins[id(child)]
        yield
    finally:
        for parent, key, child in places:
            parent._modules[key] = child


def enable_gradients(modules: Modules) -> None:
    """Let packed layers pass gradients to their inputs; idempotent."""
    for module in modules.values():
        if (codec := packed_codec(module)) is not None:
            codec.enable_gradients(module)
