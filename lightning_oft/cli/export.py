"""`lightning-oft export`: an adapter from one file format into another; a reader, and a writer.

No model is built: what the files say of an adapter is all that a writer needs.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from lightning_oft.cli.errors import OneLineParser, UserError, a_name
from lightning_oft.formats.adapters import FORMATS, read_adapter
from lightning_oft.model.adapter_state import AdapterState
from lightning_oft.model.traversal import joined

DESCRIPTION = """\
Write an adapter in another format: by default the one inside a Lightning checkpoint as a PEFT directory
(adapter_config.json and adapter_model.safetensors). Neither the model's code nor its base weights are needed.

example:
  lightning-oft export --checkpoint runs/vision/best.ckpt --output runs/adapter
"""


def run(arguments: list[str]) -> int:
    """Read the adapter, write it, say what was written."""
    options = _parser().parse_args(arguments)
    state = read_adapter(options.checkpoint, options.adapter_name)
    if options.root is not None:
        state = rooted(state, options.root)
    FORMATS[options.format].write(state, Path(options.output))  # type: ignore[misc]
    print(f"{options.output}: adapter {state.name!r}, rotations of {len(state.layers)} layers")
    if options.format == "peft":
        print(f'load it with  PeftModel.from_pretrained(base_model, "{options.output}")')
    return 0


def _parser() -> OneLineParser:
    written = [name for name, known in FORMATS.items() if known.write is not None]
    parser = OneLineParser(prog="lightning-oft export", description=DESCRIPTION)
    parser.add_argument("--checkpoint", required=True, metavar="PATH", help="a .ckpt file, or an adapter directory")
    parser.add_argument("--output", required=True, metavar="DIR", type=a_name, help="where to write")
    parser.add_argument("--format", default="peft", choices=written, help="the format to write (default: peft)")
    parser.add_argument("--adapter-name", metavar="NAME", help="which adapter, where there are several")
    parser.add_argument(
        "--root",
        metavar="PATH",
        help="the LightningModule's attribute that holds the model, such as `model`; the file says it where not given",
    )
    return parser


def rooted(state: AdapterState, root: str) -> AdapterState:
    """The same adapter with names that start at another module. Raises UserError where a name is not below it."""
    above, cut = state.root or "", len(root) + 1 if root else 0
    names = [joined(above, name) for name in (*state.layers, *state.saved)]
    outside = [name for name in names if root and not name.startswith(f"{root}.")]
    if outside:
        raise UserError(f"export: --root {root}: {outside[0]} is not below it")

    def moved(found: dict[str, object]) -> dict[str, object]:
        return {joined(above, name)[cut:]: value for name, value in found.items()}

    fields = {name: moved(getattr(state, name)) for name in ("layers", "saved", "carried", "fingerprints")}
    heads = [joined(above, name)[cut:] for name in state.modules_to_save]
    return replace(state, root=root, modules_to_save=heads, **fields)  # type: ignore[arg-type]
