"""Loading a pretrained model from a folder or a hub, for every task: errors of one line, and a report of new weights."""

import logging
from os.path import expanduser, isdir
from typing import Any

from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn


def local_path(pretrained: str) -> str:
    """A folder or a hub id as the libraries take it. Raises FileNotFoundError for a path where there is no folder."""
    path = expanduser(pretrained)
    if not isdir(path) and (pretrained.startswith(("/", ".", "~")) or pretrained.count("/") > 1):
        raise FileNotFoundError(
            f"{pretrained}: no such folder; pretrained is one written by save_pretrained, or a hub id"
        )
    return path


def load_pretrained(
    auto_class: Any, pretrained: str, dtype: str = "float32", quantization_config: Any = None, **config_overrides: Any
) -> tuple[Any, list[str]]:
    """Load a model of one of transformers' Auto classes, in train mode, and the names of the modules of a new head.

    `config_overrides` are fields of the model's config, such as num_labels; None leaves a field alone. A head is new
    where the checkpoint has none or has another shape. What is new is reported in one line, and
    so are other weights that the checkpoint lacks. Raises OSError, one line, when there is no such model at `pretrained`.
    """
    model, info = _load(auto_class, pretrained, dtype, quantization_config, **config_overrides)
    # train(): Lightning keeps the modes it finds, and from_pretrained returns eval mode, without dropout.
    return model.train(), _report_missing(pretrained, model, info)


def load_frozen(auto_class: Any, pretrained: str) -> Any:
    """A model that scores others: in eval mode, without gradients, in float32.

    Raises OSError, one line, when there is no such model at `pretrained`, or its weights are not all there.
    """
    model, info = _load(auto_class, pretrained, "float32", None)
    # A vision transformer of AutoModel has a pooler, which DINO's checkpoints lack, and what embeds pictures does not read.
    missing = sorted(str(key) for key in info["missing_keys"] if "pooler" not in str(key))
    if missing := missing + [str(key[0]) for key in info["mismatched_keys"]]:
        raise OSError(
            f"{pretrained}: has no {type(model).__name__}; of its weights {missing[0]} is not there; give another model"
        )
    return model.eval().requires_grad_(False)


def load_companion(auto_class: Any, pretrained: str, what: str) -> Any:
    """The tokenizer or image processor, as `what` says, of a folder or a hub id. Raises OSError, one line, when there is
    none."""
    try:
        # trust_remote_code=False: the default asks at the terminal whether to run a hub's Python files.
        made = auto_class.from_pretrained(expanduser(pretrained), trust_remote_code=False)
    except Exception as error:  # transformers raises OSError, ValueError, KeyError and others for the same mistakes
        reason = str(error).strip().split("\n")[0][:300]
        raise OSError(f"{pretrained}: no {what} ({reason}); save one there with its save_pretrained") from error
    # transformers makes an empty tokenizer of a model's folder that has none.
    if hasattr(made, "all_special_ids") and len(made) <= len(made.all_special_ids):
        raise OSError(f"{pretrained}: no {what} (it would be empty); save one there with its save_pretrained")
    return made


def _load(
    auto_class: Any, pretrained: str, dtype: str, quantization_config: Any, **config_overrides: Any
) -> tuple[Any, dict[str, Any]]:
    """-> a model in eval mode, and what transformers says of weights that it did not find."""
    from transformers import AutoConfig
    from transformers.utils import logging as reports

    path = local_path(pretrained)
    overrides = {name: value for name, value in config_overrides.items() if value is not None}
    options = {"quantization_config": quantization_config} if quantization_config is not None else {}
    verbosity = reports.get_verbosity()
    reports.set_verbosity(logging.ERROR)  # without transformers' table of missing weights, which are reported below
    try:
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
    finally:
        reports.set_verbosity(verbosity)
    return model, info


def _report_missing(pretrained: str, model: Any, info: dict[str, Any]) -> list[str]:
    """Report the weights that the checkpoint lacks. Returns the modules of the new head: of another shape, or outside
    of the base model."""
    missing = sorted(map(str, info["missing_keys"]))
    of_base = [key for key in missing if key.startswith(f"{model.base_model_prefix}.")]
    of_head = [str(key[0]) for key in info["mismatched_keys"]] + [key for key in missing if key not in of_base]
    if of_base:
        rank_zero_warn(
            f"{pretrained}: {len(of_base)} weights are not in the checkpoint and start random: {', '.join(of_base[:3])}"
        )
    if heads := sorted({key.rpartition(".")[0] for key in of_head}):
        rank_zero_info(
            f"{pretrained}: a new head {', '.join(heads)} for {model.config.num_labels} classes; OFT trains it whole unless "
            f"oft.modules_to_save says otherwise"
        )
    return heads
