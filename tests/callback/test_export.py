"""What a fit leaves on disk."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint
from safetensors.torch import load_file
from small import Small, difference, loader, merged_layers, oft, state, trainer
from torch import Tensor, nn
from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel

from lightning_oft import load_adapter, load_from_checkpoint, merge, oft_layers
from lightning_oft.formats import read_adapter

pytestmark = pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`")


def fit(root: Path, *callbacks: Any, model: Small | None = None) -> tuple[Any, Small]:
    torch.manual_seed(0)
    model = model or Small()
    run = trainer(root, *callbacks, ModelCheckpoint(root, monitor="val", save_top_k=2), max_epochs=4)
    run.fit(model, loader(), loader(False))
    return run, model


def written(export: Path) -> dict[str, torch.Tensor]:
    return load_file(export / "merged" / "model.safetensors")


def metrics(export: Path) -> dict[str, str]:
    """What the model card says of them."""
    text = (export / "adapter" / "README.md").read_text().partition("## Metrics")[2].partition("##")[0]
    return dict(re.findall(r"\| `(.*)` \| `(.*)` \|", text))


@pytest.mark.parametrize("merges", [True, False])
def test_the_last_state_is_written_merged_and_apart(tmp_path: Path, merges: bool) -> None:
    run, model = fit(tmp_path, oft(export_dir=str(tmp_path / "export"), merge_on_fit_end=merges))
    if not merges:
        merge(model)
    assert difference(written(tmp_path / "export"), state(model)) == 0.0
    fresh = Small()
    load_adapter(fresh, tmp_path / "export" / "adapter")
    merge(fresh)
    assert difference(state(fresh), state(model)) == 0.0
    assert metrics(tmp_path / "export") == {
        name: f"{float(run.callback_metrics[name]):.6g}" for name in ("loss", "val")
    }


@pytest.mark.parametrize("merges", [True, False])
def test_from_best_is_the_best_and_the_model_keeps_the_last(tmp_path: Path, merges: bool) -> None:
    options: dict[str, Any] = {"export_dir": str(tmp_path / "export"), "merge_on_fit_end": merges}
    _, straight = fit(tmp_path / "straight", oft(merge_on_fit_end=merges))
    run, model = fit(tmp_path, oft(export_from="best", **options))
    assert difference(state(model), state(straight)) == 0.0
    best = load_from_checkpoint(Small, run.checkpoint_callback.best_model_path)
    merge(best)
    assert difference(written(tmp_path / "export"), state(best)) == 0.0
    assert metrics(tmp_path / "export") == {"val": f"{float(run.checkpoint_callback.best_model_score):.6g}"}


def test_two_callbacks_export_the_best_of_two_parts(tmp_path: Path) -> None:
    parts = {"0": "first", "3": "second"}
    callbacks = [
        oft(module=f"net.{layer}", adapter_name=name, target_modules="all-linear", modules_to_save=None,
            export_dir=str(tmp_path / name), export_from="best") for layer, name in parts.items()
    ]  # fmt: skip
    run, _ = fit(tmp_path, *callbacks)
    best = load_from_checkpoint(Small, run.checkpoint_callback.best_model_path)
    merge(best)
    for layer, name in parts.items():
        assert torch.equal(written(tmp_path / name)["weight"], state(best)[f"net.{layer}.weight"])


class Spoiled(ModelCheckpoint):
    """The best file is gone, cut short, or of another model by the time it is read."""

    def __init__(self, root: Path, how: str) -> None:
        super().__init__(root, monitor="val")
        self.how = how

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        place = Path(self.best_model_path)
        if self.how == "gone":
            place.unlink()
        elif self.how == "cut short":
            place.write_bytes(place.read_bytes()[:-500])
        else:
            torch.save({"state_dict": {}}, place)


@pytest.mark.parametrize("how", ["gone", "cut short", "another model"])
def test_where_the_best_cannot_be_read_the_last_is_exported(tmp_path: Path, how: str) -> None:
    model = Small()
    callback = oft(export_dir=str(tmp_path / "export"), export_from="best")
    with pytest.warns(UserWarning, match="export_from='best': .*: the last state is exported"):
        trainer(tmp_path, callback, Spoiled(tmp_path, how)).fit(model, loader(), loader(False))
    assert difference(written(tmp_path / "export"), state(model)) == 0.0
    assert read_adapter(tmp_path / "export" / "adapter").generators()


class Latest(Checkpoint):
    """Another callback that writes checkpoints, of which none is the best."""

    def __init__(self, root: str) -> None:
        self.dirpath = root


@pytest.mark.parametrize("keepers", [[], [ModelCheckpoint(save_top_k=0)], [Latest(".")]])
def test_a_best_that_nobody_keeps_is_refused_before_the_fit(tmp_path: Path, keepers: list[Any]) -> None:
    options: dict[str, Any] = {"export_dir": str(tmp_path / "export"), "export_from": "best"}
    model, before = Small(), state(Small())
    with pytest.raises(ValueError, match=r"no ModelCheckpoint keeps a best file: .* or set export_from='last'"):
        trainer(tmp_path, oft(**options), *keepers, enable_checkpointing=bool(keepers)).fit(model, loader())
    assert difference(state(model), before) == 0.0
    trainer(tmp_path, oft(**options), ModelCheckpoint(tmp_path, monitor="val")).fit(model, loader(), loader(False))


class Processor:
    """What stands beside a model."""

    def __init__(self, name: str) -> None:
        self.name = name

    def save_pretrained(self, directory: Path) -> None:
        (Path(directory) / self.name).touch()


def test_companions_are_those_declared_else_those_of_the_usual_names(tmp_path: Path) -> None:
    named, declared = Small(), Small()
    named.tokenizer, named.processor = Processor("tokenizer"), "no processor"  # type: ignore[assignment]
    declared.companions = lambda: [Processor("mine")]  # type: ignore[assignment]
    declared.tokenizer = Processor("tokenizer")  # type: ignore[assignment]
    for model, expected in ((named, "tokenizer"), (declared, "mine")):
        trainer(tmp_path, oft(export_dir=str(tmp_path / expected))).fit(model, loader())
        assert {path.name for path in (tmp_path / expected / "merged").iterdir()} == {"model.safetensors", expected}


@pytest.mark.filterwarnings("ignore:net.3.bias. trained or changed beside")
def test_what_another_callback_unfroze_is_exported_from_the_best_too(tmp_path: Path) -> None:
    class Unfreeze(pl.Callback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            pl_module.net[3].bias.requires_grad_(True)

    run, _ = fit(tmp_path, oft(export_dir=str(tmp_path / "export"), export_from="best"), Unfreeze())
    best = torch.load(run.checkpoint_callback.best_model_path, weights_only=True)["state_dict"]
    assert torch.equal(written(tmp_path / "export")["net.3.bias"], best["net.3.bias"])


class Packed(nn.Linear):
    """A linear layer whose weight is stored in eighths."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__(layer.in_features, layer.out_features)
        self.weight = nn.Parameter((layer.weight.detach() * 128).round().to(torch.int8), requires_grad=False)
        self.bias = layer.bias

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight / 128, self.bias)


class Weightless(Packed):
    """The same, with the weight under a name of its own, as packages for quantized models have it."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__(layer)
        self.register_buffer("qweight", self.weight.data)
        del self.weight

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.qweight / 128, self.bias)  # type: ignore[operator]


class Wrapped(Packed):
    """The same, with a weight that is a tensor of a class of its own."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__(layer)
        self.weight = nn.Parameter((self.weight / 128).as_subclass(_Eighths), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight.as_subclass(Tensor), self.bias)


class _Eighths(Tensor):
    pass


class Quantized(Small):
    kind: Any = Packed

    def build(self) -> None:
        super().build()
        for place in (0, 3):
            self.net[place] = self.kind(self.net[place])  # type: ignore[index, operator]

    def loss(self, batch: Any) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])


@pytest.mark.parametrize("kind", [Packed, Weightless, Wrapped])
@pytest.mark.parametrize("export", ["last", "best", None])
def test_a_base_that_takes_no_merge_gives_its_adapter_and_says_what_would_be_merged(
    tmp_path: Path, kind: Any, export: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    Quantized.kind = kind
    options: dict[str, Any] = {"export_dir": str(tmp_path / "export"), "export_from": export} if export else {}
    model, keeper = Quantized(batch_norm=False), ModelCheckpoint(tmp_path, monitor="val")
    with caplog.at_level(logging.INFO):
        trainer(tmp_path, oft(**options), keeper, limit_train_batches=1).fit(model, loader(), loader(False))
    last = next(text for text in reversed(caplog.messages) if text.startswith("OFT adapter"))
    assert "not merged" in last
    assert "quantized (save_merged(model, directory)" in last
    assert not merged_layers(model)
    if export:
        assert [path.name for path in (tmp_path / "export").iterdir()] == ["adapter"]
        plain = Small(batch_norm=False)
        load_adapter(plain, tmp_path / "export" / "adapter")  # the remedy: the base without quantization
        merge(plain)
        assert merged_layers(plain) == oft_layers(plain) != {}


class Broken(Processor):
    def save_pretrained(self, directory: Path) -> None:
        raise OSError("its vocabulary is gone")


class Undeclared(Small):
    def companions(self) -> list[Any]:
        raise AttributeError("no tokenizer yet")


class Stateful(Small):
    """A part of it has a state that is no tensor."""

    def build(self) -> None:
        super().build()
        self.net[5].get_extra_state = dict  # type: ignore[index, union-attr]
        self.net[5].__class__ = _Counting  # type: ignore[index]


class _Counting(nn.ReLU):
    def get_extra_state(self) -> Any:
        return {"calls": 1}

    def set_extra_state(self, state: Any) -> None:
        pass


def _with_processor(name: str) -> Small:
    model = Small()
    setattr(model, name, Broken(name))
    return model


UNSAVED: dict[str, tuple[Any, str]] = {
    "a processor": (lambda: _with_processor("processor"), r"Broken cannot be saved .*\(its vocabulary is gone\)"),
    "a tokenizer": (lambda: _with_processor("tokenizer"), "Broken cannot be saved"),
    "none yet": (Undeclared, r"the processors cannot be saved .*\(no tokenizer yet\)"),
    "a state": (Stateful, r"the configuration of Stateful cannot be saved .*the extra state of net\.5 is no tensor"),
}


@pytest.mark.parametrize(("make", "message"), UNSAVED.values(), ids=UNSAVED)
def test_what_cannot_stand_beside_the_weights_is_refused_before_the_fit(
    tmp_path: Path, make: Any, message: str
) -> None:
    model, callback = make(), oft(export_dir=str(tmp_path / "export"))
    with pytest.raises(OSError, match=message) as error:
        trainer(tmp_path, callback).fit(model, loader())
    assert "\n" not in str(error.value)
    assert "mend it, or set it to None" in str(error.value)
    assert not oft_layers(model)
    assert not list((tmp_path / "export").iterdir())
    model.processor = model.tokenizer = None
    if isinstance(model, Stateful):
        model.net[5].__class__ = nn.ReLU  # type: ignore[index]
    model.companions = list
    trainer(tmp_path, callback).fit(model, loader())
    assert written(tmp_path / "export")


def test_a_processor_that_breaks_during_the_fit_costs_itself_alone(tmp_path: Path) -> None:
    class Breaks(Small):
        def on_train_end(self) -> None:
            self.processor.__class__ = Broken

    model = Breaks()
    model.processor = Processor("processor")  # type: ignore[assignment]
    with pytest.warns(UserWarning, match=r"merged: without Broken, which cannot be saved \(its vocabulary is gone\)"):
        trainer(tmp_path, oft(export_dir=str(tmp_path / "export"))).fit(model, loader())
    assert difference(written(tmp_path / "export"), state(model)) == 0.0


@pytest.mark.filterwarnings("ignore:the weights of net.0 have changed")
def test_the_adapter_is_there_whatever_the_merge_comes_to(tmp_path: Path) -> None:
    class Overflows(pl.Callback):
        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            pl_module.net[0].weight.data.fill_(3e38)
            pl_module.net[0].oft_R["default"].weight.data.fill_(0.3)

    model = Small()
    with pytest.raises(ValueError, match=r"overflows torch\.float32; nothing was changed"):
        trainer(tmp_path, oft(export_dir=str(tmp_path / "export")), Overflows()).fit(model, loader())
    assert read_adapter(tmp_path / "export" / "adapter").generators()
    assert not merged_layers(model)


PIPELINE = pytest.mark.filterwarnings(
    "ignore:Found .* module.* in eval mode", "ignore:PEFT cannot represent the rotations of"
)


class Pipeline(Small):
    """Two library models, and a head of its own."""

    def __init__(self) -> None:
        super().__init__(batch_norm=False)
        torch.manual_seed(3)
        sizes: dict[str, Any] = {
            "hidden_size": 8,
            "num_hidden_layers": 1,
            "num_attention_heads": 1,
            "intermediate_size": 8,
        }
        self.encoder = BertModel(BertConfig(vocab_size=9, max_position_embeddings=4, **sizes), add_pooling_layer=False)
        config = GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=9, n_positions=4, bos_token_id=0, eos_token_id=0)
        self.parts = nn.ModuleDict({"decoder": GPT2LMHeadModel(config)})
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.encoder(inputs_embeds=x[:, None]).last_hidden_state
        return self.net[6](self.parts["decoder"](inputs_embeds=hidden).logits[:, 0].repeat(1, 2)[:, :16])  # type: ignore[index, no-any-return]


BOTH = {"target_modules": ["query", "value", "c_attn"], "modules_to_save": None}


@PIPELINE
@pytest.mark.parametrize("dtype", [None, "float32"])
def test_there_is_one_directory_for_each_library_model(tmp_path: Path, dtype: str | None) -> None:
    merged, model = tmp_path / "export" / "merged", Pipeline()
    model.tokenizer = Processor("tokenizer")  # type: ignore[assignment]
    for _ in range(2):  # and a second fit replaces both
        trainer(tmp_path, oft(export_dir=str(tmp_path / "export"), merged_dtype=dtype, **BOTH)).fit(model, loader())
    assert {path.name for path in merged.iterdir()} == {"encoder", "parts.decoder"}
    for name, kind in (("encoder", BertModel), ("parts.decoder", GPT2LMHeadModel)):
        own, loaded = state(model.get_submodule(name)), state(kind.from_pretrained(merged / name))
        assert (merged / name / "tokenizer").exists()
        assert difference({key: loaded[key] for key in own}, own) == 0.0  # a pooler of the class's own beside them
    twin = Pipeline()
    load_adapter(twin, tmp_path / "export" / "adapter")
    merge(twin)
    assert difference(state(twin), state(model)) == 0.0


@PIPELINE
def test_a_model_that_refuses_to_save_itself_is_written_plain(tmp_path: Path) -> None:
    """As one that was loaded with quanto's configuration, which quantizes no Conv1D."""
    merged, model = tmp_path / "export" / "merged" / "parts.decoder", Pipeline()
    model.parts["decoder"].hf_quantizer = SimpleNamespace(is_serializable=lambda: False)
    trainer(tmp_path, oft(export_dir=str(tmp_path / "export"), **BOTH)).fit(model, loader())
    own = state(model.parts["decoder"])
    loaded = state(GPT2LMHeadModel.from_pretrained(merged))
    assert difference({key: loaded[key] for key in own}, own) == 0.0


@PIPELINE
@pytest.mark.parametrize(
    ("options", "keys"),
    [
        ({"target_modules": ["query"], "modules_to_save": None}, "embeddings.word_embeddings.weight"),
        (
            {"target_modules": ["query", "c_attn"], "modules_to_save": ["net.6"]},
            "encoder.embeddings.word_embeddings.weight",
        ),
        ({"module": "parts", "target_modules": ["c_attn"], "modules_to_save": None}, "transformer.wte.weight"),
    ],
    ids=["one of them", "and a head outside", "the part that holds one"],
)
def test_where_one_module_holds_all_of_it_that_is_written(tmp_path: Path, options: dict[str, Any], keys: str) -> None:
    trainer(tmp_path, oft(export_dir=str(tmp_path / "export"), **options)).fit(Pipeline(), loader())
    assert keys in written(tmp_path / "export")


@PIPELINE
def test_a_configuration_that_transformers_refuses_to_write_is_refused_before_the_fit(tmp_path: Path) -> None:
    model, callback = Pipeline(), oft(export_dir=str(tmp_path / "export"), **BOTH)
    generation = model.parts["decoder"].generation_config
    generation.temperature = 0.5  # type: ignore[union-attr]
    with pytest.raises(
        OSError, match=r"configuration of GPT2LMHeadModel cannot be saved .*GenerationConfig is invalid"
    ):
        trainer(tmp_path, callback).fit(model, loader())
    generation.do_sample = True  # type: ignore[union-attr]
    trainer(tmp_path, callback).fit(model, loader())
