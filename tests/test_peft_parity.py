"""PEFT is the oracle: adapters trained there compute the same here and the other way round, through files only."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import lightning.pytorch as pl
import peft
import pytest
import torch
import transformers.integrations.peft
from layer_cases import randomize, relative
from packaging import version
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DistilBertConfig,
    DistilBertForQuestionAnswering,
    DistilBertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

from lightning_oft import OFTConfig, inject, load_adapter, merge, oft_layers, save_adapter, unload
from lightning_oft.formats import read_adapter
from lightning_oft.layers import state_of

pytestmark = [
    # PEFT asks transformers 5 by an old name.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    # PEFT, of every field that it does not know: ours stand under one key.
    pytest.mark.filterwarnings(r"ignore:Unexpected keyword arguments \['lightning_oft'\]:UserWarning"),
    # PEFT, where it adjusts a block size, as we do too (and say so in a line of our own).
    pytest.mark.filterwarnings("ignore:Invalid `(oft_block_size|r)`:UserWarning"),
    pytest.mark.filterwarnings("ignore:block sizes adjusted:UserWarning"),
    # PEFT, of the same after it merged.
    pytest.mark.filterwarnings("ignore:Input and output embeddings are no longer tied:UserWarning"),
    # PEFT, where a head to save shares its weight with the embedding (T5).
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning"),
    # PEFT, where embeddings are adapted: it writes their base weight too.
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning"),
    pytest.mark.filterwarnings("ignore:Could not identify embedding layer:UserWarning"),
]

TEXT = torch.arange(24).view(2, 12) % 30 + 1
_SMALL: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}


class Model(NamedTuple):
    """A tiny model of one architecture: how to build it, what to ask it, and layers and heads to adapt."""

    build: Callable[[], nn.Module]
    inputs: dict[str, Tensor]
    targets: list[str]
    head: str


MODELS = {
    "llama": Model(
        lambda: LlamaForCausalLM(LlamaConfig(**_SMALL, num_key_value_heads=2, vocab_size=40, pad_token_id=0)),
        {"input_ids": TEXT},
        ["q_proj", "v_proj", "down_proj"],
        "lm_head",
    ),
    "bert": Model(
        lambda: BertForSequenceClassification(BertConfig(**_SMALL, vocab_size=40, num_labels=3)),
        {"input_ids": TEXT},
        ["query", "value", "dense"],
        "classifier",
    ),
    "vit": Model(
        lambda: ViTForImageClassification(ViTConfig(**_SMALL, image_size=8, patch_size=4, num_labels=3)),
        {"pixel_values": torch.linspace(-1, 1, 2 * 3 * 8 * 8).view(2, 3, 8, 8)},
        ["q_proj", "v_proj", "fc1"],
        "classifier",
    ),
    "t5": Model(
        lambda: T5ForConditionalGeneration(
            T5Config(d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, vocab_size=40)
        ),
        {"input_ids": TEXT, "decoder_input_ids": TEXT[:, :5]},
        ["q", "v", "wo"],
        "lm_head",
    ),
}
WAYS: dict[str, tuple[str, dict[str, Any]]] = {
    "k3": ("llama", {"num_cayley_neumann_terms": 3}),
    "k5": ("bert", {"num_cayley_neumann_terms": 5}),
    "k6": ("vit", {"num_cayley_neumann_terms": 6}),
    "k8": ("t5", {"num_cayley_neumann_terms": 8}),
    "exact": ("llama", {"use_cayley_neumann": False}),
    "shared": ("bert", {"block_share": True}),
    "shared exact": ("vit", {"block_share": True, "use_cayley_neumann": False}),
    "r": ("vit", {"r": 4, "oft_block_size": 0}),
    "adjusted": ("llama", {"oft_block_size": 5}),
    "head": ("llama", {"modules_to_save": True}),
    "tied head": ("t5", {"modules_to_save": True}),
    "biases": ("vit", {"bias": "oft_only"}),
    "all biases and a head": ("bert", {"bias": "all", "modules_to_save": True}),
}
"""A model, and how it is adapted: each property of the format once."""
ways = pytest.mark.parametrize(("name", "options"), WAYS.values(), ids=WAYS)


class Lit(pl.LightningModule):
    """A LightningModule as anybody writes it: the network is an attribute."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, **inputs: Tensor) -> Any:
        return self.model(**inputs)


def _build(model: Model) -> nn.Module:
    torch.manual_seed(0)
    return model.build().eval()


def _logits(module: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        output = module.eval()(**inputs)
    logits: Tensor = output.logits if "logits" in output else output.start_logits
    return logits


def _agree(logits: Tensor, expected: Tensor) -> None:
    assert float((logits - expected).abs().max()) < 1e-4


def _fields(model: Model, options: dict[str, Any]) -> dict[str, Any]:
    fields = {"oft_block_size": 8, "target_modules": model.targets, "num_cayley_neumann_terms": 5, **options}
    return {**fields, "modules_to_save": [model.head]} if options.get("modules_to_save") else fields


def _train(module: nn.Module, seed: int = 1) -> None:
    """Stands for training: noise on everything that trains."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            std = 0.08 if "oft_" in name else 0.2
            parameter.data.add_(torch.randn(parameter.shape, generator=generator) * std)


def _peft_adapter(module: nn.Module, directory: Path, **fields: Any) -> nn.Module:
    adapted = peft.get_peft_model(module, peft.OFTConfig(**fields))
    _train(adapted)
    adapted.save_pretrained(directory)
    return adapted


@ways
def test_an_adapter_of_pefts_computes_the_same_here(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    model = MODELS[name]
    base = _logits(_build(model), model.inputs)
    expected = _logits(_peft_adapter(_build(model), tmp_path, **_fields(model, options)), model.inputs)
    assert relative(expected, base) > 1e-3
    ours = _build(model)
    assert load_adapter(ours, tmp_path) == list(oft_layers(ours))
    _agree(_logits(ours, model.inputs), expected)
    merge(ours)
    unload(ours)
    _agree(_logits(ours, model.inputs), expected)


@ways
def test_an_adapter_of_ours_computes_the_same_in_peft(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    model = MODELS[name]
    ours = _build(model)
    base = _logits(ours, model.inputs)
    inject(ours, OFTConfig(**_fields(model, options)))
    _train(ours)
    expected = _logits(ours, model.inputs)
    assert relative(expected, base) > 1e-3
    save_adapter(ours, tmp_path)
    theirs = peft.PeftModel.from_pretrained(_build(model), tmp_path)
    _agree(_logits(theirs, model.inputs), expected)
    merged = theirs.merge_and_unload()
    _agree(_logits(merged, model.inputs), expected)


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_the_default_configuration_travels_through_a_lightning_module(name: str, tmp_path: Path) -> None:
    model = MODELS[name]
    lit = Lit(_build(model))
    config = OFTConfig(
        oft_block_size=8, exclude_modules=["lm_head", "classifier"], modules_to_save=[f"model.{model.head}"]
    )
    inject(lit, config)
    _train(lit)
    expected = _logits(lit, model.inputs)
    save_adapter(lit, tmp_path)
    theirs = peft.PeftModel.from_pretrained(_build(model), tmp_path)
    _agree(_logits(theirs, model.inputs), expected)
    assert read_adapter(tmp_path).root == "model"
    again = Lit(_build(model))
    names = load_adapter(again, tmp_path)
    assert all(name.startswith("model.") for name in names)
    assert torch.equal(_logits(again, model.inputs), expected)
    assert state_of(oft_layers(again)[names[0]]).configs["default"] == config


def test_pefts_file_finds_its_model_inside_a_lightning_module(tmp_path: Path) -> None:
    model = MODELS["bert"]
    fields = _fields(model, {"modules_to_save": True})
    expected = _logits(_peft_adapter(_build(model), tmp_path, **fields), model.inputs)
    lit = Lit(_build(model))
    load_adapter(lit, tmp_path)
    _agree(_logits(lit, model.inputs), expected)


def test_pefts_other_adapter_names_have_a_directory_of_their_own(tmp_path: Path) -> None:
    model = MODELS["llama"]
    theirs = peft.get_peft_model(_build(model), peft.OFTConfig(**_fields(model, {})), adapter_name="style")
    _train(theirs)
    theirs.save_pretrained(tmp_path)
    ours = _build(model)
    load_adapter(ours, tmp_path, "style")
    _agree(_logits(ours, model.inputs), _logits(theirs, model.inputs))


@pytest.mark.parametrize("named", [False, True], ids=["plain", "adapter_in_key"])
def test_keys_without_pefts_prefix_are_read(named: bool, tmp_path: Path) -> None:
    model = MODELS["llama"]
    theirs = peft.inject_adapter_in_model(peft.OFTConfig(**_fields(model, {})), _build(model))
    _train(theirs)
    state = peft.get_peft_model_state_dict(theirs)
    assert not any(key.startswith("base_model") for key in state)
    if named:
        state = {key.replace(".oft_R.weight", ".oft_R.default.weight"): value for key, value in state.items()}
    save_file({key: value.contiguous() for key, value in state.items()}, tmp_path / "adapter_model.safetensors")
    peft.OFTConfig(**_fields(model, {})).save_pretrained(tmp_path)
    ours = _build(model)
    load_adapter(ours, tmp_path)
    _agree(_logits(ours, model.inputs), _logits(theirs, model.inputs))


def _wants_newer_peft() -> str:
    """The PEFT that transformers' own loader demands, where that is newer than the installed one; else empty."""
    wanted = getattr(transformers.integrations.peft, "MIN_PEFT_VERSION", "0")
    return wanted if version.parse(peft.__version__) < version.parse(wanted) else ""


@pytest.mark.skipif(bool(_wants_newer_peft()), reason=f"transformers' loader wants peft >= {_wants_newer_peft()}")
def test_transformers_own_loader_reads_our_files(tmp_path: Path) -> None:
    model = MODELS["llama"]
    ours = _build(model)
    inject(ours, OFTConfig(**_fields(model, {})))
    _train(ours)
    save_adapter(ours, tmp_path)
    theirs: Any = _build(model)
    theirs.load_adapter(str(tmp_path))
    _agree(_logits(ours, model.inputs), _logits(theirs, model.inputs))
    theirs.save_pretrained(tmp_path / "again")
    again = _build(model)
    load_adapter(again, tmp_path / "again")
    _agree(_logits(again, model.inputs), _logits(ours, model.inputs))


@pytest.mark.parametrize("direction", ["from_peft", "to_peft"])
@pytest.mark.parametrize("task", ["llama", "distilbert", "questions"])
def test_a_task_type_saves_its_head(direction: str, task: str, tmp_path: Path) -> None:
    def build() -> nn.Module:
        torch.manual_seed(0)
        if task == "llama":
            options = {**_SMALL, "num_key_value_heads": 2, "vocab_size": 40, "num_labels": 3, "pad_token_id": 0}
            return LlamaForSequenceClassification(LlamaConfig(**options)).eval()
        config = DistilBertConfig(dim=32, hidden_dim=48, n_layers=2, n_heads=4, vocab_size=40)
        if task == "questions":
            return DistilBertForQuestionAnswering(config).eval()
        return DistilBertForSequenceClassification(config).eval()

    fields: dict[str, Any] = {
        "oft_block_size": 8,
        "target_modules": ["q_proj", "q_lin", "k_lin"],
        "task_type": "QUESTION_ANS" if task == "questions" else "SEQ_CLS",
    }
    inputs = {"input_ids": TEXT}
    if direction == "from_peft":
        expected = _logits(_peft_adapter(build(), tmp_path, **fields), inputs)
        ours = build()
        load_adapter(ours, tmp_path)
        _agree(_logits(ours, inputs), expected)
    else:
        ours = build()
        inject(ours, OFTConfig(**fields))
        _train(ours)
        save_adapter(ours, tmp_path)
        theirs = peft.PeftModel.from_pretrained(build(), tmp_path)
        _agree(_logits(theirs, inputs), _logits(ours, inputs))


def test_an_adapted_vocabulary_comes_with_its_base_and_stays_frozen(tmp_path: Path) -> None:
    model = MODELS["llama"]
    fields = {**_fields(model, {}), "target_modules": ["embed_tokens", "q_proj"]}
    theirs = _peft_adapter(_build(model), tmp_path / "peft", **fields)
    assert "base_model.model.model.embed_tokens.base_layer.weight" in load_file(
        tmp_path / "peft/adapter_model.safetensors"
    )
    ours = _build(model)
    load_adapter(ours, tmp_path / "peft")
    _agree(_logits(ours, model.inputs), _logits(theirs, model.inputs))
    assert not ours.get_submodule("model.embed_tokens").weight.requires_grad  # type: ignore[union-attr]
    save_adapter(ours, tmp_path / "ours")
    back = peft.PeftModel.from_pretrained(_build(model), tmp_path / "ours")
    _agree(_logits(back, model.inputs), _logits(theirs, model.inputs))


def test_a_tied_head_that_peft_trained_alone_gets_a_copy_of_its_own(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = MODELS["t5"]
    _peft_adapter(_build(model), tmp_path, **_fields(model, {"modules_to_save": True}))
    ours: Any = _build(model)
    load_adapter(ours, tmp_path)
    assert "lm_head.weight shared a weight with another module" in caplog.text
    assert torch.equal(ours.shared.weight, _build(model).get_submodule("shared").weight)  # type: ignore[arg-type]
    assert not torch.equal(ours.shared.weight, ours.lm_head.weight)


class Convolutions(nn.Module):
    """1x1 convolutions, an embedding, and what PEFT computes otherwise or not at all."""

    def __init__(self, beyond: bool = False) -> None:
        super().__init__()
        self.words = nn.Embedding(12, 16)
        self.pointwise = nn.Conv2d(16, 8, 1, stride=2, padding=1)
        self.wide = nn.Conv2d(8, 8, 3, padding=1)
        self.line = nn.Conv1d(8, 8, 1)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 4)

    def forward(self, words: Tensor) -> Tensor:
        x = self.pointwise(self.words(words).unflatten(1, (4, 4)).permute(0, 3, 1, 2))
        x = self.line(self.wide(x).flatten(2)).mT
        logits: Tensor = self.head(self.attention(x, x, x)[0])
        return logits


WORDS = torch.arange(2 * 16).view(2, 16) % 12
PEFTS = ["words", "pointwise", "head"]
BEYOND = ["wide", "line", "attention"]


def _convolutions() -> Convolutions:
    torch.manual_seed(0)
    return Convolutions().eval()


@pytest.mark.parametrize("exact", [False, True], ids=["series", "exact"])
def test_embeddings_and_pointwise_convolutions_agree_both_ways(exact: bool, tmp_path: Path) -> None:
    fields: dict[str, Any] = {"oft_block_size": 4, "target_modules": PEFTS, "use_cayley_neumann": not exact}
    theirs = _peft_adapter(_convolutions(), tmp_path / "peft", **fields)
    ours = _convolutions()
    base = ours(WORDS).detach()
    assert load_adapter(ours, tmp_path / "peft") == PEFTS
    expected = theirs.eval()(WORDS)
    assert relative(expected, base) > 1e-2
    assert relative(ours(WORDS), expected) < 1e-5
    save_adapter(ours, tmp_path / "ours")
    back = peft.PeftModel.from_pretrained(_convolutions(), tmp_path / "ours").eval()
    assert relative(back(WORDS), expected) < 1e-5
    stored = load_file(tmp_path / "peft/adapter_model.safetensors")
    written = load_file(tmp_path / "ours/adapter_model.safetensors")
    assert all(torch.equal(written[key], stored[key]) for key in written)


def test_what_peft_cannot_represent_is_written_with_a_warning_and_does_not_disturb_it(tmp_path: Path) -> None:
    ours = _convolutions()
    inject(ours, OFTConfig(oft_block_size=4, target_modules=[*PEFTS, *BEYOND], bias="oft_only"))
    randomize(ours)
    with pytest.warns(UserWarning, match="PEFT cannot represent the rotations of wide, line, attention:") as caught:
        save_adapter(ours, tmp_path)
    assert len(caught) == 1
    again = _convolutions()
    assert load_adapter(again, tmp_path) == list(oft_layers(ours))
    assert torch.equal(again(WORDS), ours(WORDS))
    theirs = peft.PeftModel.from_pretrained(_convolutions(), tmp_path).eval()
    for name in BEYOND:
        for part in ours.get_submodule(name).oft_R["default"].modules():  # type: ignore[operator, union-attr, index]
            if hasattr(part, "weight"):
                part.weight.data.zero_()
    assert relative(theirs(WORDS), ours(WORDS)) < 1e-5


def test_names_that_peft_would_find_too_often_become_a_pattern(tmp_path: Path) -> None:
    def build() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))).eval()

    ours = build()
    inject(ours, OFTConfig(oft_block_size=4, target_modules=r"0|1\.1"))
    randomize(ours)
    save_adapter(ours, tmp_path)
    theirs = peft.PeftModel.from_pretrained(build(), tmp_path).eval()
    adapted = {name for name, _ in theirs.named_modules() if name.endswith("oft_R")}
    assert adapted == {"base_model.model.0.oft_R", "base_model.model.1.1.oft_R"}
    x = torch.randn(3, 8)
    assert relative(theirs(x), ours(x)) < 1e-6


@pytest.mark.parametrize("forward_after_training", [False, True])
def test_pefts_coft_keeps_pefts_radius(forward_after_training: bool, tmp_path: Path) -> None:
    model = MODELS["llama"]
    fields = {**_fields(model, {}), "coft": True, "eps": 0.3}
    theirs = peft.get_peft_model(_build(model), peft.OFTConfig(**fields))
    _train(theirs)
    if forward_after_training:
        _logits(theirs, model.inputs)
    theirs.save_pretrained(tmp_path)
    ours = _build(model)
    base = _logits(ours, model.inputs)
    load_adapter(ours, tmp_path)
    expected = _logits(theirs, model.inputs)
    assert relative(expected, base) > 1e-3
    assert relative(_logits(ours, model.inputs), expected) < 1e-5
    rotation: Any = next(iter(oft_layers(ours).values())).oft_R["default"]  # type: ignore[index, operator]
    assert rotation.radius == pytest.approx(0.3 / math.sqrt(4))


@pytest.mark.parametrize("constraint", [{"coft": True, "eps": 2e-3}, {"max_angle": 8.0}], ids=["eps", "max_angle"])
def test_our_coft_is_in_the_tensors_that_peft_reads(constraint: dict[str, Any], tmp_path: Path) -> None:
    model = MODELS["llama"]
    ours = _build(model)
    config = OFTConfig(**_fields(model, {}), **constraint)
    inject(ours, config)
    _train(ours)
    for layer in oft_layers(ours).values():
        layer.oft_R["default"].project()  # type: ignore[index, operator, union-attr]
    expected = _logits(ours, model.inputs)
    save_adapter(ours, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["coft"] is False
    theirs = peft.PeftModel.from_pretrained(_build(model), tmp_path)
    _agree(_logits(theirs, model.inputs), expected)
    assert read_adapter(tmp_path).config == config


def _series_before_018(generator: Tensor, block_size: int, terms: int) -> Tensor:
    """R as PEFT 0.17 computed it, term by term: I + 2 (Q + Q^2 + ... + Q^(terms-1))."""
    rows, columns = torch.triu_indices(block_size, block_size, 1)
    q = torch.zeros(len(generator), block_size, block_size)
    q[:, rows, columns] = generator
    q = q - q.transpose(1, 2)
    rotation = torch.eye(block_size).repeat(len(generator), 1, 1)
    power = torch.eye(block_size).repeat(len(generator), 1, 1)
    for _ in range(1, terms):
        power = power @ q
        rotation = rotation + 2 * power
    return rotation


@pytest.mark.parametrize(("version", "terms"), [(None, 2), ("0.17.1", 5), ("0.16.0", 6)])
def test_the_series_of_peft_before_018_is_computed_as_it_was(version: str | None, terms: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    base, x = nn.Sequential(nn.Linear(16, 6)), torch.randn(5, 16)
    _peft_adapter(
        nn.Sequential(nn.Linear(16, 6)),
        tmp_path,
        oft_block_size=4,
        target_modules=["0"],
        num_cayley_neumann_terms=terms,
    )
    raw = json.loads((tmp_path / "adapter_config.json").read_text())
    raw = {key: value for key, value in raw.items() if key != "peft_version"} | (
        {"peft_version": version} if version else {}
    )
    (tmp_path / "adapter_config.json").write_text(json.dumps(raw))
    generator = load_file(tmp_path / "adapter_model.safetensors")["base_model.model.0.oft_R.weight"]
    rotation = _series_before_018(generator, 4, terms)
    expected = base((x.view(5, 4, 1, 4) @ rotation).view(5, 16))
    load_adapter(base, tmp_path)
    assert relative(base(x), expected) < 1e-6
    with pytest.warns(UserWarning, match="series of PEFT before 0.18"):
        save_adapter(base, tmp_path / "again")
    assert read_adapter(tmp_path / "again").config.neumann_series == "unhalved"
    with pytest.warns(UserWarning, match="cayley-neumann parameterization has been slightly changed"):
        peft.OFTConfig.from_pretrained(tmp_path / "again")
