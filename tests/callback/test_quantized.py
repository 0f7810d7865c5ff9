from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_oft import OFTFinetuning, load_from_checkpoint, merge, oft_layers
from lightning_oft.callback.strategies.base import StrategyAdapter, check_cut
from lightning_oft.codecs import packed_codec
from lightning_oft.formats.checkpoint import NOTE
from lightning_oft.formats.checkpoint_file import CheckpointError
from lightning_oft.model.traversal import walk
from tests.quantized import KINDS, package, quantize
from tests.small import trainer


class Quantized(pl.LightningModule):
    """Two quantized layers, of which one has a bias, and a plain one."""

    def __init__(self, kind: str, seed: int = 0) -> None:
        super().__init__()
        self.save_hyperparameters()
        torch.manual_seed(seed)
        layers = (nn.Linear(64, 64), nn.Linear(64, 64, bias=False))
        self.net = nn.Sequential(*(quantize(kind, layer) for layer in layers), nn.Linear(64, 2))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.training_step(batch, batch_idx)

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), 0.01)


def loader() -> DataLoader[Any]:
    x = torch.randn(16, 64, generator=torch.Generator().manual_seed(0))
    return DataLoader(TensorDataset(x, (x[:, 0] > 0).long()), 8)


def fit(model: pl.LightningModule, root: Path, epochs: int, path: Path | None = None, **options: Any) -> pl.Trainer:
    """A fit with Lightning's sanity validation, which runs the layers in eval mode and without gradient first."""
    oft = OFTFinetuning(oft_block_size=16, target_modules=["net.0", "net.1"], **options)
    done = trainer(root, oft, max_epochs=epochs)
    done.fit(model, loader(), loader(), ckpt_path=path, weights_only=True)
    return done


def generators(model: nn.Module) -> dict[str, Tensor]:
    return {name: layer.oft_R["default"].weight.detach() for name, layer in oft_layers(model).items()}  # type: ignore[index, union-attr]


@pytest.mark.parametrize("kind", KINDS)
def test_a_fit_ends_unmerged_and_is_resumed_and_read_exactly(
    tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    whole = Quantized(kind)
    with caplog.at_level(logging.INFO):
        done = fit(whole, tmp_path, 2, export_dir=str(tmp_path / "out"))
    assert all(bool((generator != 0).any()) for generator in generators(whole).values())
    last = [record.message for record in caplog.records if record.message.startswith("OFT adapter")][-1]
    assert all(words in last for words in ("not merged", "quantized", "save_merged"))
    assert (tmp_path / "out" / "adapter" / "adapter_config.json").is_file()
    assert not (tmp_path / "out" / "merged").exists()
    done.save_checkpoint(tmp_path / "last.ckpt")

    parted = Quantized(kind)
    fit(parted, tmp_path, 1).save_checkpoint(tmp_path / "first.ckpt")
    stored = torch.load(tmp_path / "first.ckpt", weights_only=True)["state_dict"]
    assert set(stored) == {NOTE, *(f"net.{layer}.oft_R.default.weight" for layer in (0, 1))}
    resumed = Quantized(kind)
    fit(resumed, tmp_path, 2, tmp_path / "first.ckpt")
    loaded = load_from_checkpoint(Quantized, tmp_path / "last.ckpt")
    x = torch.randn(3, 64)
    for other in (resumed, loaded):
        assert all(torch.equal(value, generators(whole)[name]) for name, value in generators(other).items())
        assert torch.equal(other.net.train()(x), whole.net.train()(x))


@pytest.mark.parametrize("kind", ["nf4", "ao-int8"])
def test_a_checkpoint_of_another_quantized_base_is_refused(tmp_path: Path, kind: str) -> None:
    fit(Quantized(kind), tmp_path, 1).save_checkpoint(tmp_path / "last.ckpt")
    with pytest.raises(CheckpointError, match="trained on another base"):
        fit(Quantized(kind, seed=1), tmp_path, 2, tmp_path / "last.ckpt")


def test_the_storage_of_a_quantized_weight_is_not_another_base(tmp_path: Path) -> None:
    fit(Quantized("nf4"), tmp_path, 1).save_checkpoint(tmp_path / "last.ckpt")
    fit(Quantized("nf4-bf16-storage"), tmp_path, 2, tmp_path / "last.ckpt")


@pytest.mark.filterwarnings(
    "ignore:You.re using the WeightAveraging callback:UserWarning"
)  # it asks of our one-shot hook
@pytest.mark.parametrize("kind", ["nf4", "int8", "ao-int8"])
def test_an_average_of_weights_is_resumed(tmp_path: Path, kind: str) -> None:
    def run(path: Path | None = None) -> dict[str, Tensor]:
        model, oft = Quantized(kind), OFTFinetuning(oft_block_size=16, target_modules=["net.0", "net.1"])
        kept = pl.callbacks.ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
        done = trainer(tmp_path, oft, pl.callbacks.EMAWeightAveraging(decay=0.5), kept, max_epochs=2)
        done.fit(model, loader(), loader(), ckpt_path=path, weights_only=True)
        return {name: value.clone() for name, value in generators(model).items()}

    whole, resumed = run(), run(tmp_path / "epoch=0.ckpt")
    assert all(torch.equal(value, whole[name]) for name, value in resumed.items())


def test_without_adapter_only_checkpoints_leave_out_the_packed_layers(tmp_path: Path) -> None:
    done = fit(Quantized("nf4"), tmp_path, 1, save_adapter_only=False)
    done.save_checkpoint(tmp_path / "last.ckpt")
    stored = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    assert set(stored) == {*(f"net.{layer}.oft_R.default.weight" for layer in (0, 1)), "net.2.weight", "net.2.bias"}
    fit(Quantized("nf4"), tmp_path, 2, tmp_path / "last.ckpt", save_adapter_only=False)


def test_merged_dtype_is_refused_where_no_process_has_the_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lightning_oft.callback.oft.strategy_adapter", type("Sharded", (StrategyAdapter,), {}))
    with pytest.raises(
        ValueError, match=r"merged_dtype='float32': cannot be written under .*lightning-oft merge --base ID"
    ):
        fit(Quantized("plain"), tmp_path, 1, export_dir=str(tmp_path), merged_dtype="float32")


def test_merged_is_written_on_request(tmp_path: Path) -> None:
    model = Quantized("nf4")
    fit(model, tmp_path, 1, export_dir=str(tmp_path), merged_dtype="float32")
    from safetensors.torch import load_file

    plain = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64, bias=False), nn.Linear(64, 2))
    state = load_file(tmp_path / "merged" / "model.safetensors")
    plain.load_state_dict({name.removeprefix("net."): value for name, value in state.items()})
    x = torch.randn(3, 64)
    assert torch.allclose(plain(x), model.net(x), atol=1e-5)


def test_a_requantized_merge_is_taken_back_for_a_run_and_made_again(tmp_path: Path) -> None:
    model = Quantized("nf4")
    fit(model, tmp_path, 1)
    merge(model, requantize=True)
    x = torch.randn(3, 64)
    before = model.net(x)
    trainer(tmp_path, OFTFinetuning(oft_block_size=16, target_modules=["net.0", "net.1"])).validate(model, loader())
    assert torch.equal(model.net(x), before)
    assert set(walk(model)) == {"", "net", "net.0", "net.1", "net.2"}


@pytest.mark.parametrize(("precision", "storage"), [("16-true", "nf4-bf16-storage"), ("64-true", "nf4")])
def test_a_precision_that_would_destroy_the_weights_is_refused(tmp_path: Path, precision: Any, storage: str) -> None:
    model = Quantized(storage)
    codec = packed_codec(model.net[0])
    assert codec is not None
    before = codec.read(model.net[0], "weight").clone()
    refused = trainer(tmp_path, OFTFinetuning(oft_block_size=16), precision=precision)
    with pytest.raises(ValueError, match=r"casts the quantized weights of net.0, net.1, which destroys them"):
        refused.fit(model, loader(), loader())
    assert torch.equal(codec.read(model.net[0], "weight"), before)


@pytest.mark.parametrize(("precision", "kind"), [("16-true", "nf4"), ("bf16-true", "nf4-bf16-storage")])
def test_other_precisions_leave_the_weights_as_they_are(tmp_path: Path, precision: Any, kind: str) -> None:
    model = Quantized(kind)
    codec = packed_codec(model.net[0])
    assert codec is not None
    before = codec.read(model.net[0], "weight").clone()
    oft = OFTFinetuning(oft_block_size=16, target_modules=["net.0", "net.1"])
    x = torch.randn(8, 64, dtype=torch.float16 if precision == "16-true" else torch.bfloat16)
    data = DataLoader(TensorDataset(x, torch.zeros(8, dtype=torch.long)), 8)
    trainer(tmp_path, oft, precision=precision).fit(model, data, data)
    assert torch.equal(codec.read(model.net[0], "weight"), before)
    assert all(bool(generator.any()) for generator in generators(model).values())


class BitsandbytesPrecision(pl.plugins.precision.Precision):
    """Replaces layers as Lightning's plug-in of this name does, which asks for a GPU."""

    def convert_module(self, module: nn.Module) -> nn.Module:
        for name, layer in list(module.named_modules()):
            if type(layer) is nn.Linear and name != "net.2":
                module.set_submodule(name, quantize("nf4", layer))
        return module


def test_a_plugin_that_replaces_layers_does_so_before_the_injection(tmp_path: Path) -> None:
    package("nf4")
    model = Quantized("plain")
    oft = OFTFinetuning(oft_block_size=16, target_modules=["net.0", "net.1"])
    trainer(tmp_path, oft, plugins=[BitsandbytesPrecision()]).fit(model, loader(), loader())
    assert packed_codec(model.net[0]) is not None
    assert all(bool(generator.any()) for generator in generators(model).values())


@pytest.mark.parametrize("strategy", ["ModelParallelStrategy", "FSDPStrategy"])
@pytest.mark.parametrize("kind", [*KINDS, "plain"])
def test_a_format_that_a_strategy_cannot_cut_is_refused(kind: str, strategy: str) -> None:
    taken = {"ModelParallelStrategy": ("nf4", "fp4", "NF4", "plain"), "FSDPStrategy": ("nf4", "fp4", "plain")}
    modules = walk(Quantized(kind))
    if kind.startswith(taken[strategy]):
        check_cut(modules, strategy)
        return
    with pytest.raises(
        ValueError, match=rf"{strategy}: the quantized weights of net.0, net.1 \(.*\) cannot be sharded"
    ):
        check_cut(modules, strategy)
