"""What the first forward of a model shows: adapted weights that are read past their layers, and layers not called.

A rotation acts where its layer is called. `F.linear(x, encoder.weight.t())` elsewhere uses the base weight now and the
rotated one after a merge: the model would change with the merge, by 29 to 51% in models where it was measured.
"""

import contextlib
import logging
import sys
import warnings
from collections.abc import Iterator, Mapping
from types import CodeType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from lightning_oft.codecs import is_scattered, parameter_of
from lightning_oft.functional import RotatedInput, is_traced
from lightning_oft.layers.rotation import Rotation
from lightning_oft.layers.state import applied_rotations, drop_empty_record, make_record, record_of, state_of
from lightning_oft.model.traversal import Modules, adapted, some, walk

log = logging.getLogger(__name__)

_PRODUCTS = {"linear", "matmul", "__matmul__", "__rmatmul__", "mm", "bmm", "mv", "addmm", "addmv", "addbmm", "baddbmm",
             "einsum", "tensordot", "bilinear", "inner", "embedding", "embedding_bag", "conv1d", "conv2d", "conv3d",
             "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "scaled_dot_product_attention", "_grouped_mm"}  # fmt: skip
"""Names of the functions in which a weight meets activations."""

_SET_DATA: Any = Tensor.data.__set__  # type: ignore[attr-defined]
_IN_PLACE = {"__setitem__", "__iadd__", "__isub__", "__imul__", "__itruediv__"}
_KEEPS = {"requires_grad_", "detach_", "share_memory_"}
"""Names of functions that change a tensor, and of those that are named so and do not."""


class FirstForward(TorchFunctionMode):
    """Between `open` and `close`: which adapted weights meet activations outside of their layers, and which layers run.

    A weight is followed through what is computed from it, such as its transpose, to the product in which it meets
    something else.
    """

    def __init__(self, modules: Modules) -> None:
        super().__init__()
        self.reads: dict[str, str] = {}  # where the weight of a layer was read, by its name
        self.writes: set[str] = set()  # the layers whose weight was written when they were called
        self._modules = modules
        self._undo = contextlib.ExitStack()
        self._called = {id(modules[""])}
        self._sources = WeakTensorKeyDictionary()  # the names of the layers whose weights are in a tensor
        self._activations = WeakTensorKeyDictionary()  # tensors that depend on the inputs
        self.scattered: list[str] = []  # the layers of whose weight a process holds a part only, which is not followed
        self._watched: list[str] = []  # the layers whose weight is at hand, where a call of the layer meets it
        self._readers: dict[str, set[int]] = {}  # ids of the modules that may read a layer's weight
        self._hooked: set[int] = set()  # ids of the layers that hooks rotate: `layer.forward(x)` goes past these
        self._mixed: set[int] = set()  # and of those whose methods rotate: hooks read the weight past these
        self._tied: dict[str, set[int]] = {}  # ids of the other modules that hold a layer's weight
        holders: dict[int, set[int]] = {}
        for module in modules.values():
            for parameter in module._parameters.values():
                holders.setdefault(id(parameter), set()).add(id(module))
        self._stored: dict[int, set[str]] = {}  # the names of the layers whose weights are at an address
        self._held = set(holders) | {id(buffer) for module in modules.values() for buffer in module._buffers.values()}
        for name, layer, state in adapted(modules):
            self._readers[name] = {id(layer)}
            if state.layer_type.mixin is not None:
                self._mixed.add(id(layer))
            elif state.layer_type.input_hook or state.layer_type.output_hook:
                self._hooked.add(id(layer))
            for part, rotated in state.layer_type.rotated_weights(layer).items():
                weight = parameter_of(layer, rotated.parameter)
                if weight is not None and is_scattered(weight):
                    self.scattered.append(name)
                elif weight is not None and applied_rotations(layer, part):
                    self._watched.append(name)
                    # A module that is tied to the weight keeps the base after a merge; a part of the layer does not.
                    owner = layer.get_submodule(rotated.parameter.rpartition(".")[0])
                    self._tied[name] = holders.get(id(weight), set()) - {id(owner)}
                    self._readers[name] |= self._tied[name]
                    self._sources[weight] = self._sources_of(weight) | {name}
                    if address := _address(weight):
                        self._stored.setdefault(address, set()).add(name)

    def open(self, inputs: Any = ()) -> None:
        """Begin, in this thread, what is computed from these inputs."""
        for name in self._watched:  # a hook that came since the injection would get its input rotated
            layer = self._modules[name]
            state_of(layer).layer_type.attach(layer)  # type: ignore[union-attr]
        for tensor in _tensors(inputs):
            self._activations[tensor] = True
        self._undo.enter_context(self)

    def close(self) -> None:
        """End; once, however often it is called."""
        self._undo.close()
        for found in (self._sources, self._activations):  # a quantized tensor with a weak reference cannot be moved
            found.clear()

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
        if torch.compiler.is_compiling() or _is_merging():
            return func(*args, **(kwargs or {}))
        name, given = getattr(func, "__name__", ""), [*args, *(kwargs or {}).values()]
        self._note_write(func, name, args)
        result = func(*args, **(kwargs or {}))
        if name.endswith("_like") or name.startswith("new_"):
            return result
        # Of `x.to(weight)` and `x.type_as(weight)` the values are those of x.
        tensors = list(_tensors(given[:1] if name == "to" or name.endswith("_as") else given))
        met = [self._sources_of(tensor) for tensor in tensors]
        is_product = name in _PRODUCTS and not all(met)
        meets = (is_product and any(met)) or any(tensor in self._activations for tensor in tensors)
        results = [tensor for tensor in _tensors([result, *args[: name in _IN_PLACE]]) if tensor.dim() > 0]
        if meets or (is_product and not all(id(tensor) in self._held for tensor in tensors)):
            self._activations.update(dict.fromkeys(results, True))
        if any(met) and (names := self._passed(set().union(*met))):
            if meets and results:
                self.reads.update(dict.fromkeys(names, self._where()))
            elif not meets:
                own = (tensor for tensor in results if id(tensor) not in self._held)
                self._sources.update(dict.fromkeys(own, frozenset(names)))
        return result

    def _passed(self, met: set[str]) -> list[str]:
        """The names of the layers whose weights are met outside of what rotates them."""
        inside = set[int]()
        for module, code in _running():
            self._called.add(number := id(module))
            is_call = code is nn.Module._call_impl.__code__
            is_method = code.co_filename != nn.Module._call_impl.__code__.co_filename
            if is_call if number in self._hooked else is_method or number not in self._mixed:
                inside.add(number)
        return [name for name in met if not self._readers[name] & inside]

    def _note_write(self, func: Any, name: str, args: Any) -> None:
        """Note whose weights a function is about to change in a call of their own layers, as hooks that mask or clip
        do. A weight that gets another dtype or device, as of cast or offloaded layers, stays the same."""
        is_set = func == _SET_DATA
        if not (is_set or name in _IN_PLACE or (name.endswith("_") and name not in _KEEPS and name[-2:] != "__")):
            return
        if not args or not isinstance(args[0], Tensor):
            return
        old, new = args[0], args[1] if is_set else args[0]
        is_same = (old.dtype, old.device) != (new.dtype, new.device) or (is_set and _address(old) == _address(new))
        names = set() if is_same else self._stored.get(_address(old), set())
        self.writes |= names - set(self._passed(names)) if names else set()

    def _where(self) -> str:
        """The class of the innermost module that is running and is not rotated itself."""
        others = (module for module, _ in _running() if not isinstance(module, Rotation) and state_of(module) is None)
        return type(next(others, None)).__name__

    def _sources_of(self, tensor: Tensor) -> frozenset[str]:
        if isinstance(tensor, RotatedInput):  # asked for its base, it would be rotated here and nowhere else
            return frozenset()
        for one in (tensor, tensor._base):  # what it is a view of, where it was made before
            if one is not None and one in self._sources:
                return self._sources[one]  # type: ignore[no-any-return]
        return frozenset()


def _address(tensor: Tensor) -> int:
    """Where the memory begins that a tensor has or is a view into; 0 where there is none, as of quantized tensors, which
    are made of others."""
    is_plain = tensor.layout == torch.strided and type(tensor.data) is Tensor
    return tensor.untyped_storage().data_ptr() if is_plain else 0


def _tensors(values: Any) -> Iterator[Tensor]:
    for value in values.values() if isinstance(values, Mapping) else values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple | Mapping):
            yield from _tensors(value)


def _frames() -> Iterator[Any]:
    """What is running in this thread, the innermost first."""
    frame: Any = sys._getframe(1)
    while frame is not None:
        yield frame
        frame = frame.f_back


def _running() -> Iterator[tuple[nn.Module, CodeType]]:
    """The modules whose methods are running, with the method's code."""
    for frame in _frames():
        module = frame.f_locals.get("self")
        if isinstance(module, nn.Module):
            yield module, frame.f_code


def _is_merging() -> bool:
    """Whether it is a merge that reads the weights: a training step may generate with a merged model."""
    return any(frame.f_globals.get("__name__") == "lightning_oft.model.merging" for frame in _frames())


def describe(first: FirstForward) -> str:
    """Which weights are used where or written, why that matters, and the remedy; empty where there are none."""
    reads, leave_out = first.reads, "leave it out with exclude_modules"
    found = []
    if reads:
        what = f"the weight of {some(reads)} is used in {some(dict.fromkeys(reads.values()))}, past its layer"
        why = "where no rotation reaches it, and a merge would change the model"
        found.append(f"{what}, {why}: call the layer there, or {leave_out}")
    if first.writes:
        what = f"the weight of {some(sorted(first.writes))} is written when its layer is called"
        why = "by a hook that would write a merged one too"
        found.append(f"{what}, {why}: let the forward of a subclass compute with what the hook makes, or {leave_out}")
    return "; ".join(found)


def watch(modules: Modules) -> None:
    """Look at the next forward of a model, and warn of what it shows. Attention's fused path in eval computes in another
    order while anybody looks, so with such attention it is the next forward in training."""
    model, hooks = modules[""], modules[""]._forward_pre_hooks.values()
    if _open not in hooks and _open_in_training not in hooks:
        is_fused = any(isinstance(module, nn.MultiheadAttention) for module in modules.values())
        model.register_forward_pre_hook(_open_in_training if is_fused else _open, with_kwargs=True)


def is_pending(model: nn.Module) -> bool:
    """Whether a model is still to be looked at: no forward has come, or none that could be."""
    return any(hook in (_open, _open_in_training) for hook in model._forward_pre_hooks.values())


def unwatch(model: nn.Module) -> None:
    """Take back `watch`, if no forward has come."""
    for hooks in (model._forward_pre_hooks, model._forward_hooks):
        for key in [key for key, hook in hooks.items() if hook in (_open, _open_in_training, _close)]:
            hooks.pop(key)
            model._forward_hooks_always_called.pop(key, None)
            model._forward_pre_hooks_with_kwargs.pop(key, None)


def is_compiled(modules: Modules) -> bool:
    """Whether any part is compiled: a mode would be compiled into it."""
    calls = (module._compiled_call_impl is not None for module in modules.values())
    return bool(modules.compiled) or any(calls) or getattr(modules[""], "_compiler_ctx", None) is not None


def _open(model: nn.Module, args: Any, kwargs: Any) -> None:
    if is_traced() or getattr(model, "_is_replica", False):
        return
    modules = walk(model)
    unwatch(model)
    if not is_compiled(modules):
        make_record(model).first_forward = first = FirstForward(modules)
        model.register_forward_hook(_close, always_call=True)
        first.open([args, kwargs])


def _open_in_training(model: nn.Module, args: Any, kwargs: Any) -> None:
    if model.training:
        _open(model, args, kwargs)


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
    if said := describe(first):
        warnings.warn(said, stacklevel=2)
    if first.scattered:
        what = (
            "are sharded, so nobody sees whether they are used past their layers, where a merge would change the model"
        )
        log.warning("the weights of %s %s", some(first.scattered), what)
    if uncalled := [name for name in first.uncalled() if name not in first.reads]:
        remedy = "where that is always so, as of projections that were fused, leave them out with exclude_modules"
        instead = first.called_instead(uncalled)
        tied = f", but {some(instead)} with the same weight" if instead else ""
        log.warning("%s: not called in the model's first forward%s: %s", some(uncalled), tied, remedy)
