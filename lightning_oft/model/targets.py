"""Which modules of a model an adapter's configuration means."""

import contextlib
import difflib
import logging
import re
from collections import Counter
from collections.abc import Iterable
from itertools import accumulate
from typing import Any, NamedTuple

from torch import nn

from lightning_oft.codecs import parameter_of
from lightning_oft.config import OFTConfig
from lightning_oft.layers.base import layer_type_of, layer_types, refusal, refusal_of_type, rotated_weights_of
from lightning_oft.layers.experts import Experts
from lightning_oft.model.traversal import TIED_AGAIN, Modules, class_names, counted, joined, require_built, some

log = logging.getLogger(__name__)

_PROJECTIONS = ("q_proj", "v_proj")
_ARCHITECTURES: dict[tuple[str, ...], str | tuple[str, ...]] = {
    ("bart", "opt", "gptj", "gpt_neo", "llama", "llama4", "mistral", "mixtral", "stablelm"): _PROJECTIONS,
    ("gemma", "gemma2", "gemma3_text", "qwen2", "qwen3"): _PROJECTIONS,
    ("gemma4",): r".*language_model\..*\.(q_proj|v_proj)",
    ("phi",): ("q_proj", "v_proj", "fc1", "fc2"),
    ("nemotron_h",): ("q_proj", "k_proj", "v_proj", "o_proj"),
    ("bert", "roberta", "xlm-roberta", "electra", "layoutlm"): ("query", "value"),
    ("deberta-v2",): ("query_proj", "value_proj"),
    ("deberta",): ("in_proj",),
    ("t5", "mt5"): ("q", "v"),
    ("blip-2",): ("q", "v", "q_proj", "v_proj"),
    ("gpt2", "gpt_bigcode"): ("c_attn",),
    ("btlm",): ("c_attn", "c_proj"),
    ("bloom", "gpt_neox", "chatglm", "RefinedWebModel", "RefinedWeb", "falcon"): ("query_key_value",),
    ("mpt",): ("Wqkv",),
    ("codegen",): ("qkv_proj",),
    ("rwkv",): ("key", "value", "receptance", "output"),
    ("rwkv7",): ("r_proj", "k_proj", "v_proj", "o_proj", "key", "value"),
}
"""What `target_modules=None` means by `config.model_type`; the choices are PEFT's, so that its files mean the same."""


HEADS = {
    **dict.fromkeys(("SEQ_CLS", "TOKEN_CLS"), ("classifier", "score")),
    "QUESTION_ANS": ("qa_outputs",),
}
"""Names of the heads that a task type trains whole, as in PEFT."""


class Target(NamedTuple):
    """A module to adapt, and which of its parts (`in_proj`, `out_proj` ... of an attention)."""

    module: nn.Module
    parts: tuple[str, ...]


def find_targets(modules: Modules, config: OFTConfig, strict: bool = True) -> dict[str, Target]:
    """The modules that the configuration selects, by name, in the order of the model. Raises ValueError where something
    is selected that cannot be adapted, or where nothing is and `strict`."""
    require_built(modules)
    owners = owners_of(modules)
    found: dict[str, Target] = {}
    refused: dict[str, str] = {}
    for name in _selected(modules, owners, config):
        owner, part = owners.get(name, (name, ""))
        module = modules[owner]
        if layer_type_of(module) is None:
            known = ", ".join(layer_types())
            refused[name] = f"a {type(module).__name__} cannot be adapted (only layers of type {known} can)"
        elif id(module) in modules.compiled:
            refused[name] = "it is compiled by itself: compile the module above it, or after the adapter is in"
        elif reason := refusal(module, config.side):
            refused[name] = reason
        elif owner not in found or len(found[owner].parts) == 1:
            excluded = {own for child, (of, own) in owners.items() if of == owner and _excluded(config, child)}
            every = tuple(own for own in rotated_weights_of(module) if own not in excluded)
            found[owner] = Target(module, (part,) if part else every)
    if refused:
        reasons = "; ".join(f"{some([name])}: {reason}" for name, reason in list(refused.items())[:4])
        more = f"; and {len(refused) - 4} more" if len(refused) > 4 else ""
        raise ValueError(f"target_modules={config.target_modules!r} selects what cannot be adapted: {reasons}{more}")
    if strict and not found:
        adaptable = [name for name, module in modules.items() if layer_type_of(module) is not None]
        known = f"layers that could be adapted: {some(adaptable)}" if adaptable else "no layer here could be adapted"
        hint = ""
        if isinstance(config.target_modules, str) and any(matches(name, [config.target_modules]) for name in adaptable):
            hint = f"; a string is a regular expression for the whole name: write [{config.target_modules}] for a list"
        elif config.exclude_modules or config.layers_to_transform is not None:
            hint = "; look at exclude_modules and layers_to_transform too"
        elif _is_all_linear(config.target_modules) and adaptable:
            hint = ", which have to be named in target_modules"
        raise ValueError(f"target_modules={config.target_modules!r} matches nothing; {known}{hint}")
    return found


def report_names(modules: Modules, config: OFTConfig, layers: Iterable[str]) -> None:
    """Log the names that match nothing beside others that do, and what "all-linear" finds and leaves out. Not as
    warnings: a list may be meant for several architectures."""
    names = [name.split(".") for name in modules]
    endings = {".".join(parts[start:]) for parts in names for start in range(len(parts))}
    for field, wanted in (("target_modules", config.target_modules), ("exclude_modules", config.exclude_modules)):
        lost = [one for one in wanted if one not in endings] if isinstance(wanted, list) else []
        if field == "exclude_modules" and isinstance(wanted, str):
            lost = [] if any(_compiled(wanted, field).fullmatch(name) for name in modules) else [wanted]
        if lost:
            near = difflib.get_close_matches(lost[0], endings, 1)
            hint = f" (did you mean {near[0]!r}?)" if near else ""
            log.warning("%s: %s matches no module%s: correct or remove it", field, some(lost), hint)
    if tied := _tied_layers(modules, layers):
        log.warning("%s: the weight is also that of another module (they are tied), and %s", some(tied), TIED_AGAIN)
    if _is_all_linear(config.target_modules) and log.isEnabledFor(logging.INFO):
        kinds = Counter(kind.name for name in layers if (kind := layer_type_of(modules[name])) is not None)
        found = ", ".join(f"{kind} ({counted(number, 'layer')})" for kind, number in kinds.items())
        log.info("target_modules='all-linear' finds %s", found)
        _report_left(modules, config)


def _tied_layers(modules: Modules, layers: Iterable[str]) -> list[str]:
    """Names of the layers whose rotated weight is another module's too. Not in transformers models, whose configuration
    says after a merge that nothing is tied."""
    if any(
        "PreTrainedModel" in class_names(module)
        and getattr(getattr(module, "config", None), "tie_word_embeddings", False)
        for module in modules.values()
    ):
        return []
    holders = Counter(id(one) for module in modules.values() for one in module._parameters.values() if one is not None)
    weights = {
        name: [parameter_of(modules[name], part.parameter) for part in rotated_weights_of(modules[name]).values()]
        for name in layers
    }
    return [name for name, own in weights.items() if any(one is not None and holders[id(one)] > 1 for one in own)]


def _report_left(modules: Modules, config: OFTConfig) -> None:
    """Log what "all-linear" leaves out that could be adapted, and why it cannot be where it cannot."""
    left: dict[str, list[str]] = {}
    refused: dict[str, list[str]] = {}
    routers = routers_of(modules)
    for name, module in modules.items():
        layer_type, reason = layer_type_of(module), refusal_of_type(module, config.side)
        if _excluded(config, name) or name in routers:
            continue
        if reason is not None:
            refused.setdefault(reason, []).append(name)
        elif layer_type is not None and not layer_type.in_all_linear:
            left.setdefault(layer_type.name, []).append(name)
    if frozen := [name for name in routers if modules[name]._parameters and not _excluded(config, name)]:
        refused["they choose the experts of each token; modules_to_save trains them whole"] = frozen
    for reason, names in refused.items():
        log.info("target_modules='all-linear' leaves out %s: %s", some(names), reason)
    if left:
        what = "; ".join(f"{kind} ({some(names)})" for kind, names in left.items())
        log.info(
            "target_modules='all-linear' leaves out %s: name them, or the ends of their names, to adapt them", what
        )


_ROUTERS = ("gate", "router")


def routers_of(modules: Modules) -> list[str]:
    """Names of what stands beside experts and chooses those of each token, by the names that transformers gives it, and
    of what is below. "all-linear" leaves it alone: a choice is no smooth function of a rotation."""
    above = {name.rpartition(".")[0] for name, module in modules.items() if isinstance(layer_type_of(module), Experts)}
    tops = {joined(name, router) for name in above for router in _ROUTERS}
    return [name for name in modules if tops and any(one in tops for one in accumulate(name.split("."), joined))]


def _is_all_linear(wanted: Any) -> bool:
    return isinstance(wanted, str) and wanted.lower() == "all-linear"


def saved_names(config: OFTConfig) -> dict[str, bool]:
    """Names of the modules to save, and whether they must exist: those that the task type adds need not."""
    implied = HEADS.get(config.task_type or "", ())
    return dict.fromkeys(implied, False) | dict.fromkeys(config.modules_to_save or (), True)


def matches(name: str, items: Iterable[str]) -> bool:
    """Whether a module name is one of the items or ends with one: `proj` matches `a.proj`, not `q_proj`."""
    return any(name == item or name.endswith(f".{item}") for item in items)


def _selected(modules: Modules, owners: dict[str, tuple[str, str]], config: OFTConfig) -> list[str]:
    wanted = _architecture_choice(modules) if config.target_modules is None else config.target_modules
    if _is_all_linear(wanted):
        heads = set()
        for module in modules.values():
            if "PreTrainedModel" in class_names(module):
                with contextlib.suppress(AttributeError, NotImplementedError):
                    heads.add(id(module.get_output_embeddings()))  # type: ignore[operator]
        found = {name: layer_type_of(m) for name, m in modules.items() if id(m) not in heads and name not in owners}
        left = {
            *routers_of(modules),
            *(name for name, m in modules.items() if refusal_of_type(m, config.side) is not None),
        }
        names = [name for name, kind in found.items() if kind is not None and kind.in_all_linear and name not in left]
    elif isinstance(wanted, str):
        if config.layers_to_transform is not None:
            what = f"layers_to_transform={config.layers_to_transform!r}: the architecture's own choice is a pattern"
            raise ValueError(f"{what}, {wanted!r}: give it as target_modules, with the layers' numbers in it")
        pattern = _compiled(wanted, "target_modules")
        names = [name for name in modules if name and pattern.fullmatch(name)]
    else:
        names = [name for name in modules if name and matches(name, wanted) and _in_layers(name, wanted, config)]
    return [name for name in names if not _excluded(config, name)]


def _compiled(pattern: str, field: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        what = f"{field}={pattern!r} is not a regular expression: {error}"
        raise ValueError(f"{what}; mend it, or give a list of names") from None


def _excluded(config: OFTConfig, name: str) -> bool:
    exclude, saved = config.exclude_modules or [], saved_names(config)
    if any(matches(above, saved) for above in accumulate(name.split("."), joined)):
        return True
    if isinstance(exclude, str):
        return _compiled(exclude, "exclude_modules").fullmatch(name) is not None
    return matches(name, exclude)


def _in_layers(name: str, wanted: list[str], config: OFTConfig) -> bool:
    """Whether a name lies in layers_to_transform: the first number after a name counts, not that of an expert."""
    chosen = config.layers_to_transform
    if chosen is None or chosen == [] or name in wanted:
        return True
    patterns = config.layers_pattern or ["[^.]*"]
    match = None
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        _compiled(pattern, "layers_pattern")
        match = match or re.match(rf"(?:^|.*?\.)(?:{pattern})\.(?P<index>\d+)\.", name)
    return match is not None and int(match["index"]) in ([chosen] if isinstance(chosen, int) else chosen)


def owners_of(modules: Modules) -> dict[str, tuple[str, str]]:
    """By the name of a module that another one reads and never calls, such as an attention's out_proj: that one's name,
    and the part of it."""
    return {
        joined(name, child): (name, part)
        for name, module in modules.items()
        if module._modules  # only a module with children reads theirs
        for part, weight in rotated_weights_of(module).items()
        if (child := weight.parameter.rpartition(".")[0])
    }


def _architecture_choice(modules: Modules) -> str | list[str]:
    types = (getattr(getattr(module, "config", None), "model_type", None) for module in modules.values())
    model_type = next((found for found in types if isinstance(found, str) and found), "")
    choice = next((choice for known, choice in _ARCHITECTURES.items() if model_type in known), None)
    if choice is None:
        unknown = "the model is of no known architecture"
        what = f"the architecture {model_type!r} has no choice of its own" if model_type else unknown
        raise ValueError(f"target_modules is null and {what}: name the modules, or use 'all-linear'")
    return choice if isinstance(choice, str) else list(choice)
