"""Which modules of a model an adapter's configuration means."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

from torch import nn
from torch.nn.utils import parametrize

from lightning_oft.config import OFTConfig
from lightning_oft.layers import Kind, kind_of, refusal, state_of

from .walk import class_names, some, walk

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

SUPPORTED = "linear, Conv1D, convolution, transposed convolution, embedding and nn.MultiheadAttention layers"


class Target(NamedTuple):
    """A module to adapt: how, and which of its parts (`in_proj`, `out_proj` ... of an attention)."""

    module: nn.Module
    kind: Kind
    parts: tuple[str, ...]


def find_targets(model: nn.Module, config: OFTConfig, strict: bool = True) -> dict[str, Target]:
    """The modules that the configuration selects, by name, in the order of the model.

    Args:
        model: any module; names are relative to it.
        config: what to select.
        strict: nothing selected is an error.

    Raises:
        ValueError: nothing is selected, or something is that cannot be adapted; names the modules and the remedy.
    """
    modules = dict(walk(model))
    names = _selected(model, modules, config)
    owners = _projection_owners(modules)
    found: dict[str, Target] = {}
    refused: dict[str, str] = {}
    compiled = {id(m._orig_mod) for m in model.modules() if "OptimizedModule" in class_names(m)}
    for name in names:
        owner, parts = owners.get(name, name), ("out_proj",) if name in owners else ()
        module = modules[owner]
        kind = kind_of(module)
        reason = None if kind is None else refusal(module)
        if kind is None or (kind.name == "linear" and _is_container(module)):
            refused[name] = f"a {type(module).__name__} cannot be adapted (only {SUPPORTED} can)"
        elif id(module) in compiled:
            refused[name] = "it is compiled by itself: compile the module above it, or after the adapter is in"
        elif reason is not None:
            refused[name] = reason
        elif owner not in found or len(found[owner].parts) == 1:
            excluded = {
                child.rsplit(".", 1)[-1] for child in owners if owners[child] == owner and _excluded(config, child)
            }
            every = tuple(part for part in kind.parts(module) if part not in excluded)
            found[owner] = Target(module, kind, parts or every)
    if refused:
        reasons = "; ".join(f"{name or 'the model itself'}: {reason}" for name, reason in list(refused.items())[:4])
        more = f"; and {len(refused) - 4} more" if len(refused) > 4 else ""
        raise ValueError(f"target_modules={config.target_modules!r} selects what cannot be adapted: {reasons}{more}")
    if strict and not found:
        raise ValueError(_nothing_found(modules, config))
    return found


def saved_names(config: OFTConfig) -> tuple[list[str], list[str]]:
    """Names in modules_to_save that must exist, and those that the task type adds where they do."""
    required = list(config.modules_to_save or [])
    implied = ["classifier", "score"] if config.task_type in ("SEQ_CLS", "TOKEN_CLS") else []
    return required, [name for name in implied if name not in required]


def matches(name: str, items: list[str]) -> bool:
    """Whether a module name is one of the items or ends with one: `proj` matches `a.proj`, not `q_proj`."""
    return any(name == item or name.endswith(f".{item}") for item in items)


def _selected(model: nn.Module, modules: dict[str, nn.Module], config: OFTConfig) -> list[str]:
    wanted = config.target_modules
    if wanted is None:
        choice = _architecture_choice(modules)
        wanted = choice if isinstance(choice, str) else list(choice)
    if isinstance(wanted, str) and wanted.lower() == "all-linear":
        return [name for name in _all_linear(modules) if not _excluded(config, name)]
    if isinstance(wanted, str):
        pattern = _compiled(wanted, "target_modules")
        names = [name for name in modules if name and pattern.fullmatch(name)]
    else:
        names = [name for name in modules if name and matches(name, wanted) and _in_layers(name, wanted, config)]
    return [name for name in names if not _excluded(config, name)]


def _compiled(pattern: str, field: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ValueError(
            f"{field}={pattern!r} is not a regular expression: {error}; mend it, or give a list of names"
        ) from None


def _excluded(config: OFTConfig, name: str) -> bool:
    exclude = config.exclude_modules
    if isinstance(exclude, str):
        if _compiled(exclude, "exclude_modules").fullmatch(name):
            return True
    elif exclude and matches(name, exclude):
        return True
    required, implied = saved_names(config)
    return any(re.match(rf"(^|.*\.){re.escape(saved)}($|\..*)", name) for saved in (*required, *implied))


def _in_layers(name: str, wanted: list[str], config: OFTConfig) -> bool:
    """Whether a name lies in layers_to_transform: the first number after a name counts, not that of an expert."""
    chosen = config.layers_to_transform
    if chosen is None or chosen == [] or name in wanted:
        return True
    patterns = config.layers_pattern or []
    match = None
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        _compiled(pattern, "layers_pattern")
        match = match or re.match(rf"(?:^|.*?\.)(?:{pattern})\.(?P<index>\d+)\.", name)
    if not patterns:
        match = re.match(r".*?\.?[^.]*\.(?P<index>\d+)\.", name)
    return match is not None and int(match["index"]) in ([chosen] if isinstance(chosen, int) else chosen)


def _is_container(module: nn.Module) -> bool:
    """A block may carry in_features and out_features without being one linear layer."""
    own = {"oft_R"} if state_of(module) else {"parametrizations"} if parametrize.is_parametrized(module) else set()
    children = [child for name, child in module._modules.items() if name not in own]
    return any(child is not None and next(child.parameters(), None) is not None for child in children)


def _all_linear(modules: dict[str, nn.Module]) -> list[str]:
    heads = set()
    for module in modules.values():
        if "PreTrainedModel" in class_names(module):
            heads.add(id(_output_embedding(module)))
    owners = _projection_owners(modules)
    names = []
    for name, module in modules.items():
        kind = kind_of(module)
        if kind is None or kind.name not in ("linear", "Conv1D", "attention") or name in owners:
            continue
        if id(module) not in heads and not (kind.name == "linear" and _is_container(module)):
            names.append(name)
    return names


def _output_embedding(model: Any) -> Any:
    try:
        return model.get_output_embeddings()
    except (AttributeError, NotImplementedError):
        return None


def _projection_owners(modules: dict[str, nn.Module]) -> dict[str, str]:
    """Names of attentions' out_proj by which a list may mean them: they are never called, their owner reads them."""
    return {
        f"{name}.out_proj" if name else "out_proj": name
        for name, module in modules.items()
        if (kind := kind_of(module)) is not None and kind.name == "attention"
    }


def _architecture_choice(modules: dict[str, nn.Module]) -> str | tuple[str, ...]:
    types = [getattr(getattr(module, "config", None), "model_type", None) for module in modules.values()]
    for model_type in (t for t in types if isinstance(t, str) and t):
        for known, choice in _ARCHITECTURES.items():
            if model_type in known:
                return choice
        raise ValueError(
            f"target_modules is null and the architecture {model_type!r} has no choice of its own: "
            "name the modules, or use 'all-linear'"
        )
    raise ValueError(
        "target_modules is null and the model is of no known architecture: name the modules, or use 'all-linear'"
    )


def _nothing_found(modules: dict[str, nn.Module], config: OFTConfig) -> str:
    adaptable = [name for name, module in modules.items() if kind_of(module) is not None]
    known = f"; layers that could be adapted: {some(adaptable)}" if adaptable else "; no layer here could be adapted"
    hint = ""
    if isinstance(config.target_modules, str) and any(matches(name, [config.target_modules]) for name in adaptable):
        hint = f"; a string is a regular expression for the whole name: write [{config.target_modules}] for a list"
    elif config.exclude_modules or config.layers_to_transform is not None:
        hint = "; look at exclude_modules and layers_to_transform too"
    return f"target_modules={config.target_modules!r} matches nothing{known}{hint}"
