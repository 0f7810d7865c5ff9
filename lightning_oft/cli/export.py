"""Write an adapter in another format: by default the one inside a Lightning checkpoint as a PEFT directory
(adapter_config.json and adapter_model.safetensors). Neither the model's code nor its base weights are needed,
but for a format that has no rotations: comfyui, a file of what the adapter changes of its base.

example:
  lightning-oft export --checkpoint runs/vision/checkpoints/last.ckpt --output runs/adapter
  lightning-oft export --checkpoint runs/adapter --format comfyui --base runs/pipeline --output patch.safetensors
"""

from dataclasses import replace
from pathlib import Path

from lightning_oft.cli.bases import load_parts, put_adapter
from lightning_oft.cli.errors import OneLineParser, UserError, a_name
from lightning_oft.formats.adapters import FORMATS, Format, check_name, read_adapter
from lightning_oft.formats.peft import CONFIG_FILE
from lightning_oft.model.traversal import counted


def run(arguments: list[str]) -> int:
    """Read the adapter, write it, say what was written."""
    options = _parser().parse_args(arguments[1:])
    written = FORMATS[options.format]
    if (written.write is None) != bool(options.base):
        needs = "has no rotations, and is written from the base too: give" if written.write is None else "needs no"
        raise UserError(f"export: --format {options.format} {needs} --base")
    _check_output(Path(options.output), options.overwrite, written)
    check_name(options.checkpoint, options.adapter_name)
    state = read_adapter(options.checkpoint, options.adapter_name)
    if options.root is not None:
        try:  # the class at the root is another one, which no file names
            state = replace(state.rooted(options.root), base=state.base and state.base._replace(class_name=""))
        except ValueError as error:
            raise UserError(f"export: --root {options.root}: {error}") from None
    if options.prefix is not None:
        state = replace(state, extra={**state.extra, "prefix": options.prefix})
    if written.write is not None:
        written.write(state, Path(options.output))
    else:
        model = load_parts(options.base)
        put_adapter(model, state, options.checkpoint, options.any_base)
        written.write_changes(model, Path(options.output), options.prefix)  # type: ignore[misc]
    print(f"{options.output}: adapter {state.name!r}, rotations of {counted(len(state.layers), 'layer')}")
    if options.format == "peft" and state.known_to_peft():
        print(f'load it with  PeftModel.from_pretrained(base_model, "{options.output}")')
    return 0


def _check_output(output: Path, overwrite: bool, written: Format) -> None:
    """Raise UserError where something is there already: an adapter is replaced when asked for, and nothing else ever."""
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    is_file_of_it = output.is_file() and written.matches(output)
    if not (output / CONFIG_FILE).is_file() and not is_file_of_it:
        what = "holds something else than an adapter" if output.is_dir() else "is a file"
        raise UserError(f"export: {output} {what}: give another directory")
    if not overwrite:
        raise UserError(f"export: {output} holds an adapter already; --overwrite replaces it")


def _parser() -> OneLineParser:
    written = [name for name, known in FORMATS.items() if known.write or known.write_changes]
    parser = OneLineParser("export", __doc__)
    parser.add_argument("--checkpoint", required=True, metavar="PATH", help="a .ckpt file, or an adapter directory")
    parser.add_argument("--output", required=True, metavar="PATH", type=a_name, help="where to write")
    parser.add_argument("--overwrite", action="store_true", help="replace the adapter in the output directory")
    parser.add_argument("--format", default="peft", choices=written, help="the format to write (default: peft)")
    parser.add_argument("--adapter-name", metavar="NAME", help="which adapter, where there are several")
    text = "the LightningModule's attribute that holds the model, such as `model`; the file says it where not given"
    parser.add_argument("--root", metavar="PATH", help=text)
    parser.add_argument("--base", metavar="ID", help="the base model or pipeline, of a format without rotations")
    parser.add_argument("--any-base", action="store_true", help="take another base than the adapter's own")
    text = "what the names in another tool's file begin with, such as `lora_te_text_model_`; known of many diffusers models"
    parser.add_argument("--prefix", metavar="NAME", help=text)
    return parser
