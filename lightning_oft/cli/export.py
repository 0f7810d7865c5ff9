"""`lightning-oft export`: the adapter inside a Lightning checkpoint, written as a directory that PEFT reads.

No model is built: a checkpoint says which layers its adapter turns, and of which kind they are.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from lightning_oft import __version__, checkpoints
from lightning_oft.adapters import Contents, write_contents
from lightning_oft.adapters import format as peft
from lightning_oft.cli.errors import OneLineParser, UserError, a_name, suggestion
from lightning_oft.cli.info import Adapter, adapters_of

DESCRIPTION = """\
Write the adapter inside a Lightning checkpoint as a PEFT directory (adapter_config.json and
adapter_model.safetensors). Neither the model's code nor its base weights are needed.

example:
  lightning-oft export --checkpoint runs/vision/best.ckpt --output runs/adapter
"""


def run(arguments: list[str]) -> int:
    """Read the checkpoint, write the directory, say what was written."""
    options = _parser().parse_args(arguments)
    adapter, layers = write_adapter(Path(options.checkpoint), Path(options.output), options.adapter_name, options.root)
    print(f"{options.output}: adapter {adapter!r}, rotations of {layers} layers")
    print(f'load it with  PeftModel.from_pretrained(base_model, "{options.output}")')
    return 0


def write_adapter(path: Path, output: Path, name: str | None, root: str | None = None) -> tuple[str, int]:
    """Write the adapter in the checkpoint at `path`. Returns its name and the number of its layers."""
    checkpoint = checkpoints.read(path)
    adapter = choose(checkpoint, str(path), name)
    content = checkpoint[checkpoints.ENTRY]["adapters"][adapter.name]
    root = root_of(adapter, content) if root is None else root
    write_contents(contents(adapter, content, root, _base_of(checkpoint)), output)
    return adapter.name, len(content["layers"])


def _parser() -> OneLineParser:
    parser = OneLineParser(prog="lightning-oft export", description=DESCRIPTION)
    parser.add_argument("--checkpoint", required=True, metavar="FILE", help="a .ckpt file, adapter-only or full")
    parser.add_argument("--output", required=True, metavar="DIR", type=a_name, help="the directory to write")
    parser.add_argument("--adapter-name", metavar="NAME", help="which adapter, where the checkpoint has several")
    parser.add_argument(
        "--root",
        metavar="PATH",
        help="the LightningModule's attribute that holds the model, such as `model`; found out where not given",
    )
    return parser


def choose(checkpoint: dict[str, Any], path: str, name: str | None) -> Adapter:
    """The adapter called `name`, or the only one. Raises UserError where there is none, or no rotations are left."""
    if checkpoints.content_of(checkpoint) == "merged":
        raise UserError(f"{path}: a merged model; its rotations are in the weights, and cannot be told apart any more")
    adapters = {adapter.name: adapter for adapter in adapters_of(checkpoint)}
    if not adapters:
        raise UserError(f"{path}: no adapter in this checkpoint; was it trained with OFTFinetuning?")
    if name is None and len(adapters) > 1:
        raise UserError(f"{path}: holds {', '.join(adapters)}: say which with --adapter-name")
    if name is not None and name not in adapters:
        raise UserError(f"{path}: no adapter {name!r}{suggestion(name, adapters)}; there is {', '.join(adapters)}")
    return adapters[name or next(iter(adapters))]


def root_of(adapter: Adapter, content: dict[str, Any]) -> str:
    """Where the names of the file start: the checkpoint says; else the attribute that all adapted layers share.

    PEFT looks for layers below the transformers model, which a LightningModule keeps in an attribute such as `model`.
    """
    if "root" in content:
        return str(content["root"])
    heads = {name.partition(".")[0] for name in (*content["layers"], *adapter.others)}
    return heads.pop() if len(heads) == 1 and all("." in name for name in content["layers"]) else ""


def contents(adapter: Adapter, content: dict[str, Any], root: str, base: str | None) -> Contents:
    """The adapter as its files will hold it."""
    prefix = f"{root}." if root else ""
    outside = [name for name in (*adapter.generators, *adapter.others) if not name.startswith(prefix)]
    if outside:
        raise UserError(f"export: --root {root}: {outside[0]} is not below it")
    kinds: dict[str, str] = content.get("kinds", {})
    sign = 1 if adapter.config.use_cayley_neumann else -1  # PEFT's exact map is the transpose of ours
    tensors = {}
    for layer, parts in content["layers"].items():
        file_key = "oft_embedding_R" if kinds.get(layer) == "embedding" else "oft_R"
        for part in parts:
            generator = adapter.generators[f"{layer}.{part}" if part else layer]
            tensors[peft.rotation_key(layer[len(prefix) :], file_key, part)] = (sign * generator.float()).contiguous()
    for name, tensor in adapter.others.items():
        owner, _, key = name.rpartition(".")
        place = f"{owner}.base_layer.{key}" if owner in content["layers"] else name
        tensors[peft.PREFIX + place[len(prefix) :]] = tensor.contiguous()
    return Contents(tensors, _config(adapter, content, root, base), [])


def _config(adapter: Adapter, content: dict[str, Any], root: str, base: str | None) -> dict[str, Any]:
    fields, cut = dataclasses.asdict(adapter.config), len(root) + 1 if root else 0
    heads = {name.rpartition(".")[0] for name in adapter.others} - set(content["layers"])
    saved = adapter.config.modules_to_save or sorted(h[cut:] for h in heads) if adapter.config.bias == "none" else None
    return {
        "peft_type": "OFT",
        "auto_mapping": None,
        "base_model_name_or_path": base,
        "revision": None,
        "inference_mode": True,
        "peft_version": peft.PEFT_VERSION if adapter.config.neumann_series == "halved" else peft.UNHALVED_VERSION,
        **{field: fields[field] for field in peft.PEFT_DEFAULTS},
        "target_modules": [name[cut:] for name in content["layers"]],
        "exclude_modules": None,
        "layers_to_transform": None,
        "layers_pattern": None,
        "modules_to_save": (saved or adapter.config.modules_to_save) or None,
        "fan_in_fan_out": False,
        "coft": False,  # the projection is in the tensors; PEFT would project again, into a smaller ball
        peft.OWN_KEY: {
            "version": peft.OWN_VERSION,
            "written_by": __version__,
            "root": root,
            "config": {field: fields[field] for field in peft.OWN_FIELDS},
            "fingerprint": {name[cut:]: value for name, value in content.get("fingerprints", {}).items() if value},
        },
    }


def _base_of(checkpoint: dict[str, Any]) -> str | None:
    """The hub id or folder that the task was given, which it keeps among its hyperparameters."""
    base = checkpoint.get("hyper_parameters", {}).get("pretrained")
    return base if isinstance(base, str) else None
