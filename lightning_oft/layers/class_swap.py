"""Changing the class of a living module, so that names, hooks and parameters stay and only a method differs."""

import functools
from typing import Any

from torch import nn


class SwappedClass:
    """Mixed into the class of a module that keeps its identity. Prints, pickles and copies as what it was."""

    _oft_base: type[nn.Module]

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced = super().__reduce_ex__(protocol)
        if type(self).__dict__.get("_oft_base") is None:  # another library has put a class of its own on top
            return reduced
        mixin, base = type(self).__mro__[1], self._oft_base
        return (_rebuild, (mixin, base), *reduced[2:])


@functools.cache
def _subclass(mixin: type, base: type) -> type[nn.Module]:
    names = {key: getattr(base, key) for key in ("__module__", "__qualname__", "__doc__")}
    return type(base.__name__, (mixin, base), {"_oft_base": base, **names})


def _rebuild(mixin: type, base: type[nn.Module]) -> nn.Module:
    cls = _subclass(mixin, base)  # type: ignore[arg-type]
    return cls.__new__(cls)


def swap_class(module: nn.Module, mixin: type) -> None:
    """Let the module's methods be looked up in `mixin` first; once, however often it is called."""
    if not isinstance(module, mixin):
        module.__class__ = _subclass(mixin, type(module))  # type: ignore[arg-type]


def restore_class(module: nn.Module) -> None:
    """Give the module its own class back. Where another class was put on top, ours stays below and does nothing."""
    base = type(module).__dict__.get("_oft_base")
    if base is not None:
        module.__class__ = base
