"""Merging adapters into the parts of a diffusers pipeline that they belong to; the rest of its files is copied."""

import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from lightning_oft.cli.bases import load_base, put_adapter
from lightning_oft.formats.pretrained import write_model
from lightning_oft.model import AdapterError, AdapterState, merge, oft_layers, unload
from lightning_oft.model.fingerprint import other_bases
from lightning_oft.model.placement import find_place
from lightning_oft.model.traversal import joined, walk


def merge_pipeline(
    folder: Path, states: Mapping[str, AdapterState], output: Path, dtype: torch.dtype | None, any_base: bool
) -> tuple[str, int]:
    """Write the pipeline of a folder with adapters, by their paths, in its weights. -> names of the parts, number of layers.

    Raises UserError where a part cannot be loaded or an adapter does not fit, and as `write_model`.
    """
    found = [file.parent.name for file in sorted(folder.glob("*/config.json"))]
    names = ((state.root or "", name) for state in states.values() for name in (*state.layers, *state.saved))
    named = {joined(*name).split(".")[0] for name in names}
    # Names that start at a part do not say which part that is; a dtype is for all of them.
    wanted = sorted(named) if named <= set(found) and dtype is None else found
    parts = nn.ModuleDict({name: load_base(str(folder / name)) for name in wanted})
    if dtype is not None:
        parts.to(torch.promote_types(dtype, torch.float32))
    count, adapted = 0, set()
    for path, state in states.items():
        fitting = [name for name, part in parts.items() if _fits(part, state)]
        # Two text encoders may have layers of the same names: the weights tell which one was trained.
        put_adapter(
            nn.ModuleDict({fitting[0]: parts[fitting[0]]}) if len(fitting) == 1 else parts, state, path, any_base
        )
        layers = oft_layers(parts)
        count += len(layers)
        adapted |= {name.split(".")[0] for name in layers}
        merge(parts, keep_base="never")
        unload(parts)
    if dtype is not None:
        parts.to(dtype)
    written = wanted if dtype is not None else sorted(adapted)

    def save(place: Path) -> None:
        shutil.copytree(folder, place, dirs_exist_ok=True, ignore=lambda at, _: written if Path(at) == folder else ())
        for name in written:
            parts[name].save_pretrained(place / name)  # type: ignore[operator]

    write_model(output, save)
    return " and ".join(sorted(adapted)), count


def _fits(part: nn.Module, state: AdapterState) -> bool:
    """Whether an adapter was trained on this part."""
    modules = walk(part)
    try:
        root = find_place(modules, state).root
    except AdapterError:
        return False
    return not other_bases(modules, {joined(root, layer): value for layer, value in state.fingerprints.items()})
