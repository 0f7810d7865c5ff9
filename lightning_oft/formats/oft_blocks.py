"""`oft_blocks`, the files of kohya's sd-scripts (networks/oft.py) and of LyCORIS (diag-oft), which ComfyUI reads too.

`<prefix><layer>.oft_blocks` is B, (n, b, b) over the fan-out, with dots of the layer's name as underscores, and `.alpha` a
number. Q = B - B^T, held to ||Q||_F <= alpha * fan-out over all blocks of a layer, R = (I + Q)(I - Q)^-1, and the rows of the
weight become R^T W: `side="output"` and the exact map. https://github.com/kohya-ss/sd-scripts/blob/main/networks/oft.py and
https://github.com/KohakuBlueleaf/LyCORIS/blob/main/lycoris/modules/diag_oft.py. ComfyUI holds ||Q||_F to alpha itself.
"""

import math
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from lightning_oft import functional
from lightning_oft.config import OFTConfig
from lightning_oft.formats.errors import AdapterFileError, printable, refusing
from lightning_oft.formats.prefixes import KOHYA, placed, prefix_of, split_prefix
from lightning_oft.formats.tensor_file import keys_of, read_tensors, write_tensors
from lightning_oft.model.adapter_state import AdapterState, LayerRotations
from lightning_oft.model.traversal import some

_TYPES = ("linear", "convolution", "")
"""Layers whose weight has the fan-out as its rows, as those tools have it; of a file no type is known."""


def is_blocks(path: Path) -> bool:
    """Whether a path is such a file."""
    return any(".oft_blocks." in f"{key}." for key in keys_of(path))


def read_blocks(file: Path, name: str | None = None) -> list[AdapterState]:
    """The adapters of a file, one for each of its models, named by what their keys begin with. Raises AdapterFileError."""
    entries: dict[tuple[str, str], dict[str, Tensor]] = {}
    for key, tensor in read_tensors(file).items():
        owner, _, kind = key.rpartition(".")
        if kind not in ("oft_blocks", "alpha", "rescale") or not owner:
            raise AdapterFileError(
                f"{file}: {key}: {_stranger(key, kind)}; train it with diag-oft or networks.oft alone"
            )
        entries.setdefault(split_prefix(file, owner), {})[kind] = tensor
    found: dict[str, dict[str, LayerRotations]] = {}
    for (prefix, layer), tensors in entries.items():
        with refusing("cannot be read", f"{file}: {layer}"):
            generator = _generator(tensors, is_kohyas=prefix == KOHYA)
        sizes = {"": functional.block_size_of(generator.shape[1])}
        found.setdefault(prefix, {})[layer] = LayerRotations("", False, sizes, {"": generator})
    return [
        AdapterState(
            name=prefix.rstrip("_."),
            config=_config(layers),
            layers=layers,
            has_flat_names=prefix.endswith("_"),
            source=printable(str(file)),
            extra={"prefix": prefix},
        )
        for prefix, layers in found.items()
    ]


def _stranger(key: str, kind: str) -> str:
    """What a key is that no diag-oft of a single weight has."""
    if kind == "dora_scale":
        return "a weight that is scaled too (DoRA) is turned and stretched"
    return "the blocks of a fused weight" if ".oft_blocks." in key else "no part of an OFT adapter"


def _generator(tensors: Mapping[str, Tensor], is_kohyas: bool) -> Tensor:
    """The upper triangles of Q, (n, b(b-1)/2) float32, as the tool that trained them holds it."""
    blocks, rescale = tensors.get("oft_blocks"), tensors.get("rescale")
    shape = None if blocks is None else tuple(blocks.shape)
    if blocks is None or shape is None or len(shape) != 3 or shape[1] != shape[2] or 0 in shape or shape[1] < 2:
        raise AdapterFileError(f"oft_blocks of shape {shape} are not (blocks, b, b); BOFT's butterflies are not read")
    if rescale is not None and not bool((rescale == 1).all()):
        raise AdapterFileError("its rescale stretches outputs, which no rotation does; train it without `rescaled`")
    alpha = float(tensors["alpha"]) if "alpha" in tensors else None
    blocks = blocks.float()
    if not bool(blocks.isfinite().all()) or (alpha is not None and not 0 <= alpha < math.inf):
        raise AdapterFileError("NaN, infinite or a negative alpha; use an earlier state of the adapter")
    if alpha == 0 and is_kohyas:
        raise AdapterFileError("alpha is 0, by which sd-scripts holds it at the identity; train it with a larger one")
    n, b, _ = blocks.shape
    q = blocks - blocks.mT
    norm, most = float(q.norm()), (alpha or math.inf) * n * b
    rows, columns = torch.triu_indices(b, b, 1)
    generator: Tensor = q[:, rows, columns] if norm <= most else q[:, rows, columns] * (most / norm)
    return generator.contiguous()


def _config(layers: Mapping[str, LayerRotations]) -> OFTConfig:
    sizes = {one.block_sizes[""] for one in layers.values()}
    counts = {len(one.generators[""]) for one in layers.values()}
    r = counts.pop() if len(counts) == 1 < len(sizes) else 0
    size = None if r else max(sizes)
    return OFTConfig(size, r, list(layers), side="output", use_cayley_neumann=False)


def write_blocks(state: AdapterState, file: str | Path) -> Path:
    """Write an adapter of side="output" whose layers are linear or convolutions. A series is written as the exact map that
    turns alike. Warns of what LyCORIS cannot load.

    Raises:
        AdapterFileError: the format cannot say what the adapter does, nothing says what the names begin with, or the file
            cannot be written.
    """
    if refusal := _refusal(state):
        raise AdapterFileError(refusal)
    prefix, state = prefix_of(state), state.in_exact_map()
    tensors: dict[str, Tensor] = {}
    largest = 1.0
    for name, one in state.layers.items():
        b = one.block_sizes[""]
        q = functional.skew(one.generators[""].float(), b)
        largest = max(largest, float(q.norm()))
        tensors[f"{placed(prefix, name)}.oft_blocks"] = q.triu(1).contiguous()
    counts = {len(one.generators[""]) for one in state.layers.values()}
    if prefix == KOHYA and len(counts) > 1:
        what = (
            f"sd-scripts take the number of blocks of one layer for all, and here are {some(map(str, sorted(counts)))}"
        )
        raise AdapterFileError(f"{what}: train with `r`, or write for LyCORIS with another prefix")
    if large := [name for name, one in state.layers.items() if one.block_sizes[""] > len(one.generators[""])]:
        what = f"{some(large)}: more entries in a block than blocks, which ComfyUI reads and LyCORIS cannot load"
        warnings.warn(f"{what}: take a smaller oft_block_size", stacklevel=2)
    # One number for all, as sd-scripts read it, by which none of the three tools holds anything.
    alpha = torch.tensor(2.0 ** math.ceil(math.log2(largest) + 1e-3))
    alphas = {key.replace(".oft_blocks", ".alpha"): alpha.clone() for key in tensors}
    return write_tensors(file, tensors | alphas)


def _refusal(state: AdapterState) -> str:
    """Why an adapter cannot be written; empty where it can."""
    others = [name for name, one in state.layers.items() if one.layer_type not in _TYPES]
    if state.config.side == "input":
        what = "it rotates inputs, and oft_blocks rotate outputs: no rotation of outputs does the same"
        return f"{what}; train with side='output', or write what it changes of the weights (--format comfyui)"
    if others:
        return f"{some(others)}: oft_blocks are of linear layers and convolutions; leave them out with exclude_modules"
    if state.saved:
        return f"{some(state.saved)} were trained whole, and oft_blocks hold rotations alone; write a merged model"
    if state.config.block_share:
        return "block_share: oft_blocks have every block, and the adapter does not say how many; train without it"
    if state.is_beyond_reach():
        return "its series turns so far that it is no rotation any more; call project(model) and save it again"
    return ""
