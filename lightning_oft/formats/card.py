"""The model card beside an adapter: what it is, its base, how it was configured and how it is loaded."""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path

from lightning_oft import __version__
from lightning_oft.formats.errors import printable
from lightning_oft.model.adapter_state import AdapterState, Base
from lightning_oft.model.traversal import counted, some

CARD_FILE = "README.md"
_MARK = "<!-- Written by lightning_oft, and again with the adapter. Delete this line to keep what you write here. -->"


def is_own_card(file: str | Path) -> bool:
    """Whether a file is a card that this library may write again."""
    if not Path(file).is_file():
        return False
    with Path(file).open("rb") as stream:
        return _MARK.encode() in stream.read(2**16)


def public_name(base: Base | None) -> str | None:
    """The base as a hub id or a relative path; None where it would say something of the machine."""
    name = (base and base.name_or_path) or ""
    return name if re.fullmatch(r"(?!.*\.\.)[\w.-]+(/[\w.-]+)*", name, re.ASCII) else None


def model_card(state: AdapterState, limits: Iterable[str], metrics: Mapping[str, float], place: str) -> str:
    """The content of `README.md`: equal adapters have equal cards, and no path of the machine is in them.

    `limits` are sentences on what PEFT cannot do with it, `place` is where the examples load it from.
    """
    from huggingface_hub import ModelCardData

    base, name = state.base or Base("", "", None), public_name(state.base)
    is_hub_id = name and re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name) and not Path(name).exists()
    measured = {key: f"{float(metrics[key]):.6g}" for key in sorted(metrics)}
    data = ModelCardData(
        base_model=name if is_hub_id else None,  # the hub refuses anything else
        library_name="peft" if len(state.known_to_peft()) == len(state.layers) else "lightning-oft",
        tags=["oft", "lightning-oft"],
    )
    sections = [
        f"---\n{data.to_yaml()}\n---\n{_MARK}",
        f"# OFT adapter of {_code(name)}" if name else "# OFT adapter",
        _description(state),
        f"## Base\n\n{_base(state, base, name)}",
        f"## Configuration\n\n{_table('field', {k: json.dumps(v) for k, v in asdict(state.config).items()})}",
        f"## Metrics\n\n{_table('metric', measured)}" if measured else "",
        f"## Loading\n\n{_loading(state, base, name, place)}",
        *(re.sub(r"([\\`*_<\[])", r"\\\1", printable(f"{one[0].upper()}{one[1:]}.")) for one in limits),
    ]
    return "\n\n".join(filter(None, sections)) + "\n"


def _description(state: AdapterState) -> str:
    count = sum(generator.numel() for generator in state.generators().values())
    text = (
        f"[Orthogonal finetuning](https://arxiv.org/abs/2306.07280): the weights of {counted(len(state.layers), 'layer')} "
        f"are rotated by block-diagonal orthogonal matrices, which have {count:,} parameters."
    )
    if scales := sum(one.numel() for own in state.layers.values() for one in own.magnitudes.values()):
        text += f" {scales:,} magnitudes scale what their neurons give."
    if state.saved:
        others = sum(tensor.numel() for tensor in state.saved.values())
        text += f" {others:,} parameters more were trained whole: {_code(some(sorted(state.saved)))}."
    return f"{text} Written by lightning_oft {__version__}."


def _base(state: AdapterState, base: Base, name: str | None) -> str:
    text = f"{_code(name)}" if name else "Not named: it was no model of a hub"
    text += f", of class {_code(base.class_name)}." if base.class_name else "."
    if state.fingerprints:
        layer, value = min(state.fingerprints.items())
        text += f" Its weight of {_code(layer)} has the fingerprint {_code(value)}; lightning_oft refuses another base."
    return text


def _loading(state: AdapterState, base: Base, name: str | None, place: str) -> str:
    is_known = base.library.partition(".")[0] == "transformers" and base.class_name.isidentifier()
    start = "base = ...  # the model named above"
    if is_known:
        start = f'from transformers import {base.class_name}\n\nbase = {base.class_name}.from_pretrained("{name or "BASE"}")'
    ways = [f'from lightning_oft import load_adapter\n{start}\nload_adapter(base, "{place}")']
    if state.known_to_peft():
        version = (
            "  # 0.18 or later" if state.config.use_cayley_neumann and state.config.neumann_series == "halved" else ""
        )
        ways.insert(
            0, f'from peft import PeftModel{version}\n{start}\nmodel = PeftModel.from_pretrained(base, "{place}")'
        )
    return "\n\n".join(f"```python\n{way}\n```" for way in ways)


def _table(head: str, rows: Mapping[str, str]) -> str:
    lines = (f"| {_code(key)} | {_code(value)} |" for key, value in rows.items())
    return "\n".join([f"| {head} | value |", "|---|---|", *lines])


def _code(text: str) -> str:
    """Text of a file or a user, which no reader of Markdown takes for anything else."""
    return f"`{printable(text).replace('`', chr(39)).replace('|', chr(92) + '|')}`"
