"""Codec: how one storage of a weight is read (to floating point) and written, and the table in which it is looked up.

Nothing here knows of rotations. A codec is asked about a module and the name of one of its parameters, because some
storages spread a weight over several tensors of the module.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

Change = Callable[[Tensor, slice], Tensor]
"""From some rows of a weight, and the columns that they are cut to, to the same rows, changed."""


class Codec:
    """One storage of a weight: a subclass needs `name`, `matches`, `read` and `write`."""

    name = ""
    is_exact = True
    """Whether what is written is read again as it was; of a quantized storage it is not."""

    def matches(self, module: nn.Module, parameter: str) -> bool:
        """Whether a module stores this parameter in this way."""
        raise AssertionError(f"{type(self).__name__} must say what it matches")

    def read(self, module: nn.Module, parameter: str) -> Tensor:
        """The values in floating point, as far as this process holds them; they may share the parameter's memory."""
        raise AssertionError(f"{type(self).__name__} must read")

    def write(self, module: nn.Module, parameter: str, values: Tensor) -> None:
        """Store new values of the shape and dtype that `read` gave."""
        raise AssertionError(f"{type(self).__name__} must write")

    def changed(self, module: nn.Module, parameter: str, row_dim: int, step: int, change: Change) -> Tensor:
        """What `write` takes after a row-wise change of the weight.

        Args:
            module: holds the weight.
            parameter: its name.
            row_dim: the dimension that counts rows: of a linear layer 0, of transformers' Conv1D 1.
            step: how many columns must stay together, for a storage that is cut along them.
            change: changes some rows.
        """
        return change(self.read(module, parameter), slice(None))

    def keep(self, module: nn.Module, parameter: str) -> Any:
        """What `restore` needs to bring the values of now back to the bit, on the CPU."""
        return self.read(module, parameter).detach().to("cpu", copy=True)

    def restore(self, module: nn.Module, parameter: str, kept: Any) -> None:
        """Store what `keep` returned."""
        values = self.read(module, parameter)
        self.write(module, parameter, kept.to(device=values.device, dtype=values.dtype))


_codecs: list[Codec] = []


def register_codec(codec: Codec) -> None:
    """Add a storage. The last one registered is asked first."""
    _codecs.insert(0, codec)


def codec_of(module: nn.Module, parameter: str) -> Codec | None:
    """The codec of a module's parameter; None where its storage is not known, as of packed weights of other packages."""
    return next((codec for codec in _codecs if codec.matches(module, parameter)), None)


def parameter_of(module: nn.Module, parameter: str) -> torch.nn.Parameter | None:
    """The parameter of a dotted name below a module; None where the module keeps no parameter of this name."""
    owner, _, key = parameter.rpartition(".")
    return module.get_submodule(owner)._parameters.get(key)
