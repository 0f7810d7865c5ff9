"""What the first forward of a model shows: adapted weights that are read past their layers, and layers not called.

A rotation acts where its layer is called. `F.linear(x, encoder.weight.t())` elsewhere uses the base weight now and the
rotated one after a merge: the model would change with the merge, by 29 to 51% in models where it was measured.
"""

import contextlib
import logging
import sys
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from lightning_oft.codecs import is_scattered, parameter_of
from lightning_oft.functional import RotatedInput, is_traced
from lightning_oft.layers.state import applied_rotations, drop_empty_record, make_record, record_of
from lightning_oft.model.traversal import Modules, adapted, some, walk

log = logging.getLogger(__name__)

_PRODUCTS = {"linear", "matmul", "__matmul__", "__rmatmul__", "mm", "bmm", "mv", "addmm", "addmv", "addbmm", "baddbmm",
             "einsum", "tensordot", "bilinear", "inner", "embedding", "embedding_bag", "conv1d", "conv2d", "conv3d",
             "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "scaled_dot_product_attention", "_grouped_mm"}  # fmt: skip
"""Names of the functions in which a weight meets activations."""


class FirstForward(TorchFunctionMode):
    """Between `open` and `close`: which adapted weights meet activations outside of their layers, and which layers run.

    A weight is followed through what is computed from it, such as its transpose, to the product in which it meets
    something else.
    """

    def __init__(self, modules: Modules) -> None:
        super().__init__()
        self.reads: dict[str, str] = {}  # where the weight of a layer was read, by its name
        self._modules = modules
        self._undo = contextlib.ExitStack()
        self._called = {id(modules[""])}
        self._sources = WeakTensorKeyDictionary()  # the names of the layers whose weights are in a tensor
        self._watched: list[str] = []  # the layers whose weight is at hand, where a call of the layer meets it
        self._readers: dict[str, set[int]] = {}  # ids of the modules that may read a layer's weight
        self._tied: dict[str, set[int]] = {}  # ids of the other modules that hold a layer's weight
        holders: dict[int, set[int]] = {}
        for module in modules.values():
            for parameter in module._parameters.values():
                holders.setdefault(id(parameter), set()).add(id(module))
        for name, layer, state in adapted(modules):
            self._readers[name] = {id(layer)}
            for part, rotated in state.layer_type.rotated_weights(layer).items():
                weight = parameter_of(layer, rotated.parameter)
                if weight is not None and applied_rotations(layer, part) and not is_scattered(weight):
                    self._watched.append(name)
                    # A module that is tied to the weight keeps the base after a merge; a part of the layer does not.
                    owner = layer.get_submodule(rotated.parameter.rpartition(".")[0])
                    self._tied[name] = holders.get(id(weight), set()) - {id(owner)}
                    self._readers[name] |= self._tied[name]
                    self._sources[weight] = self._sources_of(weight) | {name}

    def open(self) -> None:
        """Begin, in this thread."""
        self._undo.enter_context(self)

    def close(self) -> None:
        """End; once, however often it is called."""
        self._undo.close()
        self._sources.clear()  # a quantized tensor that anything refers to weakly moves to no other device

    def uncalled(self) -> list[str]:
        """Names of the adapted layers that were not called although the module around them was."""
        parents = {name: self._modules.get(name.rpartition(".")[0]) for name in self._watched if name}
        called = {name: id(self._modules[name]) in self._called for name in parents}
        return [name for name, above in parents.items() if id(above) in self._called and not called[name]]

    def called_instead(self, layers: list[str]) -> list[str]:
        """Names of the modules that were called and hold the weight of one of these layers."""
        tied = set().union(*(self._tied[name] for name in layers)) & self._called
        return [name for name, module in self._modules.items() if id(module) in tied]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Called for every torch function while this is open."""
        result = func(*args, **(kwargs or {}))
        if torch.compiler.is_compiling():
            return result
        tensors = [x for x in _flat([*args, *(kwargs or {}).values()]) if isinstance(x, Tensor)]
        met = [self._sources_of(tensor) for tensor in tensors]
        if not any(met) or _is_merging():
            return result
        running = {id(module) for module in _running()}
        self._called |= running
        names = [
            name for name, own in self._readers.items() if any(name in found for found in met) and not own & running
        ]
        if names:
            name = getattr(func, "__name__", "")
            if name in _PRODUCTS and not all(met):
                self.reads.update(dict.fromkeys(names, type(next(_running(), None)).__name__))
            elif not _takes_no_values(name, met):
                for tensor in _flat([result]):
                    if isinstance(tensor, Tensor) and tensor.dim() > 0:
                        self._sources[tensor] = frozenset(names)
        return result

    def _sources_of(self, tensor: Tensor) -> frozenset[str]:
        if isinstance(tensor, RotatedInput):  # asked for its base, it would be rotated here and nowhere else
            return frozenset()
        for one in (tensor, tensor._base):  # what it is a view of, where it was made before
            if one is not None and one in self._sources:
                return self._sources[one]  # type: ignore[no-any-return]
        return frozenset()


def _flat(values: Any) -> Iterator[Any]:
    for value in values:
        if isinstance(value, list | tuple):
            yield from _flat(value)
        else:
            yield value


def _takes_no_values(function: str, met: list[frozenset[str]]) -> bool:
    """Whether a function asks a weight for its dtype, device or shape only: `x.to(weight)`, `x.type_as(weight)`."""
    return function.endswith(("_like", "_as")) or function.startswith("new_") or (function == "to" and not met[0])


def _frames() -> Iterator[Any]:
    """What is running in this thread, the innermost first."""
    frame: Any = sys._getframe(1)
    while frame is not None:
        yield frame
        frame = frame.f_back


def _running() -> Iterator[nn.Module]:
    """The modules whose methods are running."""
    found = (frame.f_locals.get("self") for frame in _frames())
    return (module for module in found if isinstance(module, nn.Module))


def _is_merging() -> bool:
    """Whether it is a merge that reads the weights: a training step may generate with a merged model."""
    return any(frame.f_globals.get("__name__") == "lightning_oft.model.merging" for frame in _frames())


def describe_reads(reads: Mapping[str, str]) -> str:
    """Which weights are read where, why that matters, and the remedy."""
    what = f"the weight of {some(reads)} is read in {some(dict.fromkeys(reads.values()))}, past its layer's forward"
    why = "where no rotation reaches it, and a merge would change the model"
    return f"{what}, {why}: call the layer there, or leave it out with exclude_modules"


def watch(modules: Modules) -> None:
    """Look at the next forward of a model, and warn of what it shows. Attention's fused path in eval computes in another
    order while anybody looks, so with such attention it is the next forward in training."""
    model, hooks = modules[""], modules[""]._forward_pre_hooks.values()
    if _open not in hooks and _open_in_training not in hooks:
        is_fused = any(isinstance(module, nn.MultiheadAttention) for module in modules.values())
        model.register_forward_pre_hook(_open_in_training if is_fused else _open)


def unwatch(model: nn.Module) -> None:
    """Take back `watch`, if no forward has come."""
    for hooks in (model._forward_pre_hooks, model._forward_hooks):
        for key in [key for key, hook in hooks.items() if hook in (_open, _open_in_training, _close)]:
            hooks.pop(key)
            model._forward_hooks_always_called.pop(key, None)


def is_compiled(modules: Modules) -> bool:
    """Whether any part is compiled: a mode would be compiled into it."""
    calls = (module._compiled_call_impl is not None for module in modules.values())
    return bool(modules.compiled) or any(calls) or getattr(modules[""], "_compiler_ctx", None) is not None


def _open(model: nn.Module, args: Any) -> None:
    if is_traced() or getattr(model, "_is_replica", False):
        return
    modules = walk(model)
    unwatch(model)
    if not is_compiled(modules):
        make_record(model).first_forward = first = FirstForward(modules)
        model.register_forward_hook(_close, always_call=True)
        first.open()


def _open_in_training(model: nn.Module, args: Any) -> None:
    if model.training:
        _open(model, args)


def _close(model: nn.Module, args: Any, output: Any) -> None:
    record, first = record_of(model), None
    if record is not None and record.first_forward is not None:
        first, record.first_forward = record.first_forward, None
        drop_empty_record(model)
        first.close()
    if output is None:  # the forward has failed, and nothing may change in what torch is looping over
        return
    unwatch(model)
    if first is None:  # it belonged to a forward that failed
        return
    if first.reads:
        warnings.warn(describe_reads(first.reads), stacklevel=2)
    if uncalled := [name for name in first.uncalled() if name not in first.reads]:
        remedy = "where that is always so, as of projections that were fused, leave them out with exclude_modules"
        instead = first.called_instead(uncalled)
        tied = f", but {some(instead)} with the same weight" if instead else ""
        log.warning("%s: not called in the model's first forward%s: %s", some(uncalled), tied, remedy)
