"""Fold an adapter into its base model and write the result, which transformers loads as it loads any other;
tokenizer and image processor are copied along. A quantized base is written dequantized.

example:
  lightning-oft merge --base google/vit-base-patch16-224 --adapter runs/adapter --output runs/merged
"""

import json
import sys
import warnings
from pathlib import Path
from typing import Any, cast

from torch import nn

from lightning_oft.cli.errors import OneLineParser, UserError, a_name, one_line
from lightning_oft.formats.adapters import check_name, read_adapter
from lightning_oft.formats.merged import as_dtype, write_merged
from lightning_oft.formats.pretrained import Companions, loader_of, write_pretrained
from lightning_oft.formats.streaming import StreamedMerge, stream_merge
from lightning_oft.model import AdapterError, AdapterState, merge, oft_layers, put, unload
from lightning_oft.model.packed import packed_names
from lightning_oft.model.traversal import counted, some


def run(arguments: list[str]) -> int:
    """Load both, merge, write, say how to load the result."""
    options = _parser().parse_args(arguments[1:])
    output = Path(options.output)
    for option, given in (("--base", options.base), ("--adapter", options.adapter)):
        place = Path(given).resolve()
        if place.exists() and output.resolve() in (place, *place.parents):
            raise UserError(f"merge: --output {output} would replace {option} {given}; give another directory")
    if output.exists() and any(output.iterdir()) and not options.overwrite:
        raise UserError(f"merge: {output} is there already and not empty; --overwrite replaces it")
    check_name(options.adapter, options.adapter_name)
    state = read_adapter(options.adapter, options.adapter_name)
    dtype, companions = as_dtype(options.dtype), [Companions(options.base)]
    streamed = _streamed(options.base, state)
    if streamed is not None:
        if streamed.other_bases and not options.any_base:
            what = f"the adapter was trained on another base, {some(streamed.other_bases)} differ"
            raise UserError(f"{options.adapter}: {what}; load the base it was trained on, or give --any-base")
        streamed.write(output, dtype, companions)
        name = json.loads((output / "config.json").read_text(encoding="utf-8"))["architectures"][0]
        _say_written(output, name, len(streamed.layers))
        return 0
    model = load_base(options.base)
    labels = getattr(getattr(model, "config", None), "num_labels", None)
    rows = {name: parameter.shape[:1] for name, parameter in model.named_parameters()}
    heads = [t.shape[0] for n, t in state.saved.items() if rows.get(n) == (labels,) and t.shape[0] != labels]
    if heads:  # the adapter's own head was trained for other classes than the base's
        model = load_base(options.base, num_labels=heads[0], ignore_mismatched_sizes=True)
    _put(model, state, options.adapter, options.any_base)
    layers = len(oft_layers(model))
    if dtype is not None or packed_names(model):
        write_merged(model, output, dtype, companions=companions)
    else:
        merge(model, keep_base="never")
        unload(model)
        write_pretrained(model, output, companions)
    _say_written(output, type(model).__name__, layers)
    return 0


def _streamed(base: str, state: AdapterState) -> StreamedMerge | None:
    """The merge tensor by tensor, where the base is plain files; whatever else is wrong with them, loading says it."""
    try:
        return stream_merge(base, state)
    except Exception:
        return None


def _say_written(output: Path, class_name: str, layers: int) -> None:
    print(f"{output}: {class_name} with the rotations of {counted(layers, 'layer')} in its weights")
    print(f'load it with  {loader_of(output)}.from_pretrained("{output}")')


def _parser() -> OneLineParser:
    parser = OneLineParser("merge", __doc__)
    parser.add_argument("--base", required=True, metavar="ID", help="the base model: a hub id or a folder")
    parser.add_argument(
        "--adapter", required=True, metavar="PATH", help="a PEFT adapter directory, a .ckpt file or a hub id"
    )
    parser.add_argument("--output", required=True, metavar="DIR", type=a_name, help="the directory to write")
    parser.add_argument("--adapter-name", metavar="NAME", help="which adapter, where the checkpoint has several")
    dtypes = ("float32", "bfloat16", "float16")
    parser.add_argument("--dtype", choices=dtypes, help="dtype of the weights written (default: that of the base)")
    parser.add_argument("--overwrite", action="store_true", help="replace the model in the output directory")
    parser.add_argument("--any-base", action="store_true", help="merge into another base than the adapter's own")
    return parser


def _put(model: nn.Module, state: AdapterState, path: str, any_base: bool) -> None:
    """Put the adapter in; what that warns of is said on a line each."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            put(model, state, ignore_mismatched_base=any_base)
        except AdapterError as error:
            said = str(error).replace("set ignore_mismatched_base=True", "give --any-base")
            raise UserError(f"{path}: {said}") from None
    for warning in caught:
        print(f"merge: {warning.message}", file=sys.stderr)


def load_base(base: str, **options: Any) -> nn.Module:
    """The model at `base` in the class and the dtype it was saved in; `options` go to its from_pretrained."""
    local = Path(base) / "config.json"
    try:
        config: dict[str, Any] = json.loads(local.read_text(encoding="utf-8")) if local.is_file() else {}
        if "_class_name" in config:  # how diffusers signs its models
            import diffusers

            return cast("nn.Module", getattr(diffusers, config["_class_name"]).from_pretrained(base))
        import transformers

        transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
        # False rather than its default, which asks at the terminal whether to run the Python files beside the weights.
        found = transformers.AutoConfig.from_pretrained(base, trust_remote_code=False)
        if not found.architectures:
            raise ValueError("its config.json names no architecture")
        model = getattr(transformers, found.architectures[0]).from_pretrained(base, dtype="auto", **options)
        return cast("nn.Module", model)
    except Exception as error:  # a damaged file raises whatever its reader does not expect
        remedy = "a module of your own is merged in Python, by load_adapter and merge"
        raise UserError(f"merge: the base {base!r} cannot be loaded: {one_line(error)}; {remedy}") from error
