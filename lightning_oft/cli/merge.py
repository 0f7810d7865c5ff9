"""Fold an adapter into its base model and write the result, which transformers loads as it loads any other;
tokenizer and image processor are copied along. A quantized base is written dequantized. Of a diffusers pipeline
the parts that were adapted are merged, and the pipeline is written whole.

example:
  lightning-oft merge --base google/vit-base-patch16-224 --adapter runs/adapter --output runs/merged
"""

import json
from argparse import Namespace
from pathlib import Path

import torch

from lightning_oft.cli.bases import load_base, pipeline_folder, put_adapter
from lightning_oft.cli.errors import OneLineParser, UserError, a_name
from lightning_oft.cli.merge_pipeline import merge_pipeline
from lightning_oft.formats.adapters import check_name, read_adapter
from lightning_oft.formats.merged import as_dtype, write_merged
from lightning_oft.formats.pretrained import Companions, loader_of, write_pretrained
from lightning_oft.formats.streaming import StreamedMerge, stream_merge
from lightning_oft.model import AdapterState, merge, oft_layers, unload
from lightning_oft.model.packed import packed_names
from lightning_oft.model.traversal import counted, some


def run(arguments: list[str]) -> int:
    """Load both, merge, write, say how to load the result."""
    options = _parser().parse_args(arguments[1:])
    output = Path(options.output)
    for option, given in (("--base", options.base), *(("--adapter", adapter) for adapter in options.adapter)):
        place = Path(given).resolve()
        if place.exists() and output.resolve() in (place, *place.parents):
            raise UserError(f"merge: --output {output} would replace {option} {given}; give another directory")
    if output.exists() and any(output.iterdir()) and not options.overwrite:
        raise UserError(f"merge: {output} is there already and not empty; --overwrite replaces it")
    states = {}
    for adapter in options.adapter:
        check_name(adapter, options.adapter_name)
        states[adapter] = read_adapter(adapter, options.adapter_name)
    dtype = as_dtype(options.dtype)
    if (folder := pipeline_folder(options.base)) is not None:
        _say_written(output, *merge_pipeline(folder, states, output, dtype, options.any_base))
        return 0
    if len(options.adapter) > 1:
        raise UserError(
            f"merge: {options.base} is one model, of which one adapter is merged at a time; give a pipeline"
        )
    return _merge_model(options, *states.popitem(), output, dtype)


def _merge_model(options: Namespace, adapter: str, state: AdapterState, output: Path, dtype: torch.dtype | None) -> int:
    companions = [Companions(options.base)]
    streamed = _streamed(options.base, state)
    if streamed is not None:
        if streamed.other_bases and not options.any_base:
            what = f"the adapter was trained on another base, {some(streamed.other_bases)} differ"
            raise UserError(f"{adapter}: {what}; load the base it was trained on, or give --any-base")
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
    put_adapter(model, state, adapter, options.any_base)
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
    parser.add_argument("--base", required=True, metavar="ID", help="the base model or pipeline: a hub id or a folder")
    parser.add_argument(
        "--adapter",
        required=True,
        nargs="+",
        metavar="PATH",
        help="a PEFT adapter directory, a .ckpt file or a hub id; of a pipeline one for each part that has its own",
    )
    parser.add_argument("--output", required=True, metavar="DIR", type=a_name, help="the directory to write")
    parser.add_argument("--adapter-name", metavar="NAME", help="which adapter, where the checkpoint has several")
    dtypes = ("float32", "bfloat16", "float16")
    parser.add_argument("--dtype", choices=dtypes, help="dtype of the weights written (default: that of the base)")
    parser.add_argument("--overwrite", action="store_true", help="replace the model in the output directory")
    parser.add_argument("--any-base", action="store_true", help="merge into another base than the adapter's own")
    return parser
