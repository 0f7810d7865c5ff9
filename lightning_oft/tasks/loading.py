"""Loading a pretrained model from a folder or a hub, for every task: errors of one line, and a report of new weights."""

import copy
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from os.path import expanduser, isdir
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn


def load_pretrained(
    auto_class: Any, pretrained: str, dtype: str = "float32", quantization_config: Any = None, **config_overrides: Any
) -> tuple[Any, list[str]]:
    """Load a model, with a new head where its shape differs from the checkpoint's or the checkpoint has none.

    A new head is reported in one line; other weights that the checkpoint lacks are a warning that names them.

    Args:
        auto_class: One of transformers' Auto classes, such as AutoModelForCausalLM.
        pretrained: A folder written by save_pretrained, or a hub id.
        dtype: Data type of the weights by torch's name, or "auto" for the checkpoint's.
        quantization_config: transformers' description of a quantized base, or None.
        config_overrides: Fields of the model's config, such as num_labels; None leaves a field alone.

    Returns the model, in train mode, and the names of the modules of its new, untrained head. Raises OSError when there
    is no model of this kind at `pretrained`, a FileNotFoundError when it can only be a folder.
    """
    from transformers import AutoConfig

    path = expanduser(pretrained)
    if not isdir(path) and (pretrained.startswith(("/", ".", "~")) or pretrained.count("/") > 1):
        raise FileNotFoundError(
            f"{pretrained}: no such folder; pretrained is one written by save_pretrained, or a hub id"
        )
    overrides = {name: value for name, value in config_overrides.items() if value is not None}
    options = {"quantization_config": quantization_config} if quantization_config else {}
    try:
        with _no_loading_report():
            # trust_remote_code=False: the default asks at the terminal whether to run a hub's Python files.
            config = AutoConfig.from_pretrained(path, trust_remote_code=False, **overrides)
            model, info = auto_class.from_pretrained(
                path, config=config, dtype=dtype, ignore_mismatched_sizes=True, output_loading_info=True, **options
            )
    except Exception as error:  # transformers raises OSError, ValueError, KeyError and others for the same mistakes
        reason = str(error).strip().split("\n")[0][:300]
        raise OSError(
            f"{pretrained}: {auto_class.__name__} could not load a model ({reason}); give a folder or a hub id"
        ) from error
    missing = {str(key) for key in info["missing_keys"]} | {str(key[0]) for key in info["mismatched_keys"]}
    # train(): Lightning keeps the modes it finds, and from_pretrained returns eval mode, without dropout.
    return model.train(), _report_missing(pretrained, model, missing) if missing else []


def _report_missing(pretrained: str, model: Any, missing: set[str]) -> list[str]:
    """Report the weights that the checkpoint lacks. Returns the modules of the new head."""
    heads = head_modules(model)
    of_head = {key for key in missing if key.startswith(tuple(f"{head}." for head in heads))}
    if other := sorted(missing - of_head):
        rank_zero_warn(
            f"{pretrained}: {len(other)} weights are not in the checkpoint and start random: {', '.join(other[:3])}"
        )
    if of_head:
        rank_zero_info(
            f"{pretrained}: a new head {', '.join(heads)} for {model.config.num_labels} classes; with OFT, train it too:"
            f" oft.modules_to_save: [{', '.join(heads)}]"
        )
    return heads if of_head else []


def head_modules(model: Any) -> list[str]:
    """Names of the modules whose parameters change shape with the number of labels; found on the meta device."""
    config = copy.deepcopy(model.config)
    config.num_labels = int(model.config.num_labels or 0) + 1
    with torch.device("meta"):
        other = type(model)(config)
    shapes = {name: p.shape for name, p in other.named_parameters()}
    changed = (name for name, p in model.named_parameters() if shapes.get(name) != p.shape)
    return list(dict.fromkeys(name.rpartition(".")[0] for name in changed))


@contextmanager
def _no_loading_report() -> Iterator[None]:
    """Silence transformers' table of missing weights, which `load_pretrained` reports in one line."""
    from transformers.utils import logging as transformers_logging

    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity(logging.ERROR)
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
