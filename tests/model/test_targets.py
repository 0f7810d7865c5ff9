"""What a configuration selects, held against peft's own matching on the models people use."""

from __future__ import annotations

import functools
import logging
import re
import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
import transformers
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from peft.tuners.oft.layer import OFTLayer as PeftLayer
from peft.tuners.tuners_utils import check_target_module_exists
from torch import nn

from lightning_oft import OFTConfig, inject, merge, unload
from lightning_oft.model import targets
from lightning_oft.model.targets import find_targets
from lightning_oft.model.traversal import walk

TINY: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "vocab_size": 32,
}


def _llama() -> nn.Module:
    config = transformers.LlamaConfig(**TINY, num_key_value_heads=1)
    return transformers.LlamaForCausalLM(config)


def _bert() -> nn.Module:
    return transformers.BertForSequenceClassification(transformers.BertConfig(**TINY, max_position_embeddings=16))


def _vit() -> nn.Module:
    config = transformers.ViTConfig(**{**TINY, "image_size": 8, "patch_size": 4})
    return transformers.ViTForImageClassification(config)


def _t5() -> nn.Module:
    config = transformers.T5Config(d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, vocab_size=32)
    return transformers.T5ForConditionalGeneration(config)


def _gpt2() -> nn.Module:
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=32, n_positions=16)
    )


BUILD: dict[str, Callable[[], nn.Module]] = {"llama": _llama, "bert": _bert, "vit": _vit, "t5": _t5, "gpt2": _gpt2}


@functools.cache
def _model(name: str) -> nn.Module:
    """Built once: finding targets changes nothing, and a test says so."""
    return BUILD[name]().eval()


def _found(model: nn.Module, **options: Any) -> list[str]:
    return list(find_targets(walk(model), OFTConfig(oft_block_size=4, **options)))


def _peft_found(name: str, **options: Any) -> list[str]:
    model = BUILD[name]()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft.get_peft_model(model, peft.OFTConfig(oft_block_size=4, **options))
    return [key for key, module in model.named_modules() if isinstance(module, PeftLayer)]


# ---- against peft, on whole models -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("llama", {"target_modules": None}),
        ("llama", {"target_modules": "all-linear"}),
        ("llama", {"target_modules": "ALL-Linear", "exclude_modules": ["down_proj", "0.self_attn.q_proj"]}),
        ("llama", {"target_modules": ["q_proj", "lm_head"], "layers_to_transform": [0], "layers_pattern": "layers"}),
        ("llama", {"target_modules": r".*\.(0|1)\.self_attn\.[qv]_proj"}),
        ("llama", {"target_modules": "all-linear", "modules_to_save": ["mlp"]}),
        ("llama", {"target_modules": None, "layers_to_transform": [1]}),
        ("bert", {"target_modules": None}),
        ("bert", {"target_modules": None, "layers_to_transform": 0, "layers_pattern": "layer"}),
        ("bert", {"target_modules": "all-linear", "task_type": "SEQ_CLS"}),
        ("bert", {"target_modules": ["dense"], "layers_to_transform": [1], "layers_pattern": ["h", "layer"]}),
        ("vit", {"target_modules": "all-linear", "modules_to_save": ["classifier"]}),
        ("t5", {"target_modules": None}),
        ("t5", {"target_modules": None, "layers_to_transform": [1], "layers_pattern": ["block", "layers"]}),
        ("t5", {"target_modules": ["q", "wo"], "layers_to_transform": 0, "layers_pattern": "block"}),
    ],
)
def test_selects_what_peft_selects(name: str, options: dict[str, Any]) -> None:
    theirs = _peft_found(name, **options)
    assert theirs
    if options.get("task_type") == "SEQ_CLS":  # peft adapts `classifier` and then swaps it: we leave it out
        theirs = [key for key in theirs if not key.startswith("classifier")]
    assert _found(_model(name), **options) == theirs


def test_layer_numbers_beside_a_choice_that_is_a_pattern_are_refused_and_the_remedy_selects() -> None:
    model = nn.Module()
    model.config, model.language_model = SimpleNamespace(model_type="gemma4"), nn.ModuleDict()
    model.language_model["layers"] = nn.ModuleList([nn.ModuleDict({"q_proj": nn.Linear(4, 4)}) for _ in range(2)])
    outer = nn.ModuleDict({"model": model})
    with pytest.raises(
        ValueError, match=r"layers_to_transform=\[1\]: the architecture's own choice is a pattern, '.*lang"
    ):
        _found(outer, target_modules=None, layers_to_transform=[1])
    pattern = r".*language_model\..*\.1\.(q_proj|v_proj)"
    assert _found(outer, target_modules=pattern) == ["model.language_model.layers.1.q_proj"]


def test_gpt2_has_conv1d_layers_which_peft_refuses() -> None:
    layers = [
        f"transformer.h.{i}.{part}" for i in (0, 1) for part in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    ]
    assert _found(_model("gpt2")) == layers
    assert _found(_model("gpt2"), target_modules=None) == [key for key in layers if key.endswith("c_attn")]


def test_all_linear_leaves_the_output_embedding_out_and_finding_changes_nothing() -> None:
    for name in BUILD:
        model = _model(name)
        before = {key: (type(m), len(m._forward_pre_hooks), len(m._modules)) for key, m in model.named_modules()}
        names = _found(model)
        now = {key: (type(m), len(m._forward_pre_hooks), len(m._modules)) for key, m in model.named_modules()}
        assert now == before
        linear = {key for key, m in model.named_modules() if isinstance(m, nn.Linear)} - {"lm_head"}
        assert linear <= set(names)
        assert not {"lm_head", "cls.predictions.decoder"} & set(names)


def test_the_choice_by_architecture_is_pefts() -> None:
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_OFT_TARGET_MODULES_MAPPING as THEIRS

    from lightning_oft.model.targets import _ARCHITECTURES

    ours = {model_type: choice for types, choice in _ARCHITECTURES.items() for model_type in types}
    ours_listed = {k: v if isinstance(v, str) else sorted(v) for k, v in ours.items()}
    assert ours_listed.items() >= {k: v if isinstance(v, str) else sorted(v) for k, v in THEIRS.items()}.items()


# ---- against peft, name by name --------------------------------------------------------------------------------------

_WORDS = st.sampled_from(["model", "layers", "h", "0", "1", "12", "attn", "q_proj", "proj", "experts", "head"])
_NAMES = st.lists(_WORDS, min_size=1, max_size=6).map(lambda parts: ["net", *parts])


class _Tree(nn.Module):
    """A linear layer at the end of a path of module names."""

    def __init__(self, path: list[str]) -> None:
        super().__init__()
        self.add_module(path[0], _Tree(path[1:]) if len(path) > 1 else nn.Linear(4, 4))


@settings(max_examples=150, deadline=None)
@given(
    path=_NAMES,
    items=st.lists(st.sampled_from(["q_proj", "proj", "attn.q_proj", "0.proj", "head", "0"]), min_size=1, max_size=3),
    exclude=st.none() | st.lists(_WORDS, min_size=1, max_size=2) | st.sampled_from([r".*\.h\..*", "head"]),
    saved=st.none() | st.lists(st.sampled_from(["head", "experts", "attn"]), min_size=1, max_size=2),
    layers=st.none() | st.integers(0, 1) | st.lists(st.sampled_from([0, 1, 12]), max_size=2),
    pattern=st.none() | st.sampled_from(["layers", "h"]) | st.just(["h", "layers"]),
)
def test_lists_match_as_in_peft(
    path: list[str],
    items: list[str],
    exclude: list[str] | str | None,
    saved: list[str] | None,
    layers: int | list[int] | None,
    pattern: list[str] | str | None,
) -> None:
    assume(layers is None or pattern is not None or not path[1:2] or not path[1].isdigit())  # a list at the root, below
    options: dict[str, Any] = {
        "target_modules": items,
        "exclude_modules": exclude,
        "modules_to_save": saved,
        "layers_to_transform": layers,
        "layers_pattern": pattern if layers is not None else None,
    }
    name = ".".join(path)
    theirs = peft.OFTConfig(**options)
    theirs.target_modules = items  # in order: peft makes a set of it
    wanted = check_target_module_exists(theirs, name)
    wanted = bool(wanted) and type(wanted).__name__ != "_ExcludedModule"
    if isinstance(layers, list) and not layers:
        options["layers_pattern"] = None
    model = _Tree(path)
    selected = name in _selected(model, OFTConfig(**options))
    assert selected == wanted


def _selected(model: nn.Module, config: OFTConfig) -> list[str]:
    modules = walk(model)
    return targets._selected(modules, targets.owners_of(modules), config)


@settings(max_examples=50, deadline=None)
@given(_NAMES, st.sampled_from(["q_proj", r".*q_proj", r"net\..*\.proj", r".*\.(0|12)\..*", r"net.*"]))
def test_a_string_is_a_pattern_for_the_whole_name(path: list[str], pattern: str) -> None:
    name = ".".join(path)
    assert (name in _selected(_Tree(path), OFTConfig(target_modules=pattern))) == bool(re.fullmatch(pattern, name))


def test_layers_of_a_root_level_list_are_counted_too() -> None:
    model = nn.ModuleDict({"layers": nn.ModuleList([nn.ModuleDict({"q": nn.Linear(4, 4)}) for _ in range(3)])})
    assert _found(model, target_modules=["q"], layers_to_transform=[0, 2]) == ["layers.0.q", "layers.2.q"]


# ---- attention, and what is below it ---------------------------------------------------------------------------------


class _Block(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(8, 2, **options)
        self.fc = nn.Linear(8, 8)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, {"attn": ("in_proj", "out_proj"), "fc": ("",)}),
        ({"target_modules": ["out_proj"]}, {"attn": ("out_proj",)}),
        ({"target_modules": r"attn\.out_proj"}, {"attn": ("out_proj",)}),
        ({"target_modules": ["attn", "out_proj"]}, {"attn": ("in_proj", "out_proj")}),
        ({"exclude_modules": ["out_proj"]}, {"attn": ("in_proj",), "fc": ("",)}),
        ({"modules_to_save": ["attn"]}, {"fc": ("",)}),
    ],
)
def test_attention_is_selected_by_its_name_or_by_its_projection(
    options: dict[str, Any], expected: dict[str, tuple[str, ...]]
) -> None:
    found = find_targets(walk(_Block()), OFTConfig(oft_block_size=4, **options))
    assert {name: target.parts for name, target in found.items()} == expected


def test_attention_with_its_own_key_and_value_sizes_has_three_projections() -> None:
    found = find_targets(walk(_Block(kdim=4, vdim=6)), OFTConfig(oft_block_size=2))
    assert found["attn"].parts == ("q_proj", "k_proj", "v_proj", "out_proj")


class _Mixer(nn.Module):
    """A block that carries the sizes of a linear layer without being one."""

    def __init__(self) -> None:
        super().__init__()
        self.in_features, self.out_features = 8, 8
        self.inner = nn.Linear(8, 8)


def test_a_block_with_the_sizes_of_a_linear_layer_is_none() -> None:
    model = nn.ModuleDict({"mixer": _Mixer()})
    assert _found(model) == ["mixer.inner"]
    with pytest.raises(ValueError, match="mixer: a _Mixer cannot be adapted"):
        _found(model, target_modules=["mixer"])


# ---- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"target_modules": ["query"]},
            r"target_modules=\['query'\] matches nothing; layers that could be adapted: model.embed_tokens, "
            r"model.layers.0.self_attn.q_proj, .* and 12 more",
        ),
        (
            {"target_modules": "q_proj"},
            r"matches nothing.*a string is a regular expression .*write \[q_proj\] for a list",
        ),
        ({"target_modules": ["q_proj"], "exclude_modules": ["q_proj"]}, "matches nothing.*look at exclude_modules"),
        ({"target_modules": ["mlp"]}, "model.layers.0.mlp: a LlamaMLP cannot be adapted .only layers of type .*Conv1D"),
        ({"exclude_modules": "["}, r"exclude_modules='\[' is not a regular expression"),
    ],
)
def test_what_llama_cannot_give_is_refused_with_the_remedy(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _found(_model("llama"), **options)


def test_an_unknown_architecture_has_no_choice_of_its_own() -> None:
    with pytest.raises(ValueError, match="no known architecture: name the modules, or use 'all-linear'"):
        _found(nn.Sequential(nn.Linear(4, 4)), target_modules=None)
    with pytest.raises(ValueError, match="architecture 'vit' has no choice of its own"):
        _found(_model("vit"), target_modules=None)


def test_a_model_without_adaptable_layers_says_so() -> None:
    with pytest.raises(ValueError, match="matches nothing; no layer here could be adapted"):
        _found(nn.Sequential(nn.ReLU()))
    assert find_targets(walk(nn.Sequential(nn.ReLU())), OFTConfig(), strict=False) == {}


# ---- what is said ------------------------------------------------------------------------------------------------------

LOST: dict[str, tuple[dict[str, Any], str]] = {
    "target": (
        {"target_modules": ["q_proj", "v_pro"]},
        "target_modules: v_pro matches no module .did you mean 'v_proj'",
    ),
    "dotted_target": ({"target_modules": ["q_proj", "9.v_proj"]}, r"target_modules: 9.v_proj matches no module"),
    "excluded": ({"exclude_modules": ["q_proj", "o_pro"]}, "exclude_modules: o_pro matches no module .* 'o_proj'"),
    "excluded_pattern": ({"exclude_modules": r".*\.q"}, r"exclude_modules: \.\*\\.q matches no module"),
}


@pytest.mark.parametrize(("options", "message"), LOST.values(), ids=LOST)
def test_a_name_that_matches_nothing_beside_others_is_logged(
    options: dict[str, Any], message: str, caplog: pytest.LogCaptureFixture
) -> None:
    """And is no warning: a list may be meant for several architectures. PEFT says nothing."""
    model = BUILD["llama"]()
    inject(model, OFTConfig(oft_block_size=4, **options))
    (said,) = [line for line in caplog.messages if "matches no module" in line]
    assert re.search(message, said)
    caplog.clear()
    inject(model, OFTConfig(oft_block_size=4, **options))  # it is there already: nothing is decided, nothing said
    inject(BUILD["llama"](), OFTConfig(oft_block_size=4, target_modules=["q_proj"], exclude_modules=[r"0.self_attn"]))
    assert not [line for line in caplog.messages if "matches no module" in line]


def test_all_linear_says_what_it_leaves_out(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Sequential(*(nn.Conv2d(4, 4, 3) for _ in range(5)), nn.Flatten(), nn.Linear(4, 4), nn.Embedding(4, 4))
    with caplog.at_level(logging.INFO):
        inject(model, OFTConfig(oft_block_size=4, exclude_modules=["4"]))
        (message,) = [message for message in caplog.messages if "leaves out" in message]
        assert "convolution (0, 1, 2, 3); embedding (7): name them" in message
        caplog.clear()
        named = nn.Sequential(*model[:4])
        unload(model)
        assert inject(named, OFTConfig(oft_block_size=4, target_modules=["0", "1", "2", "3"])) == ["0", "1", "2", "3"]
    assert not [message for message in caplog.messages if "leaves out" in message]


def test_a_tied_weight_is_said_before_it_is_trained_and_when_it_is_merged(caplog: pytest.LogCaptureFixture) -> None:
    """A fresh module ties it again, and nothing in a state dict can say so."""
    model = nn.ModuleDict({"words": nn.Embedding(8, 8), "out": nn.Linear(8, 8), "body": nn.Linear(8, 8)})
    model["out"].weight = model["words"].weight
    inject(model, OFTConfig(oft_block_size=4, exclude_modules=["out"]))
    unload(model)
    assert not caplog.messages
    inject(model, OFTConfig(oft_block_size=4))
    with torch.no_grad():
        model["out"].oft_R["default"].weight += 0.1
    merge(model)
    said = [line for line in caplog.messages if "loads one of the merged weights for both" in line]
    assert [line.startswith(start) for line, start in zip(said, ("out: ", "merge: out "), strict=True)] == [True, True]
