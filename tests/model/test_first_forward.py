"""What the first forward shows: weights read past their layers, and layers that are not called; said once, in time."""

from __future__ import annotations

import copy
import logging
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from layer_cases import config, randomize, relative
from small import Small, loader, oft, trainer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_oft import OFTConfig, inject, load_adapter, merge, save_adapter, unload


class Decoder(nn.Module):
    """Uses its encoder's weight a second time, transposed."""

    def __init__(self, is_mended: bool = False) -> None:
        super().__init__()
        self.encode, self.out = nn.Linear(8, 6), nn.Linear(6, 6)
        self.decode = nn.Linear(6, 8, bias=False) if is_mended else None

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.out(self.encode(x))
        return self.decode(hidden) if self.decode is not None else F.linear(hidden, self.encode.weight.t())


class Fused(nn.Module):
    """Puts two weights into one product, and casts it, as mixed models do."""

    def __init__(self, is_mended: bool = False) -> None:
        super().__init__()
        self.encode, self.other, self.out = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False), nn.Linear(16, 4)
        self.is_mended = is_mended

    def forward(self, x: Tensor) -> Tensor:
        if self.is_mended:
            return self.out(torch.cat([self.encode(x), self.other(x)], -1))  # type: ignore[no-any-return]
        weight = torch.cat([self.encode.weight, self.other.weight]).to(x)
        return self.out(x @ weight.mT)  # type: ignore[no-any-return]


class Bypassed(nn.Module):
    """Reads weight and bias, and never calls the layer, as timm's eva02 does."""

    def __init__(self, is_mended: bool = False) -> None:
        super().__init__()
        self.encode, self.out = nn.Linear(8, 24), nn.Linear(8, 8)
        self.is_mended = is_mended

    def forward(self, x: Tensor) -> Tensor:
        packed = self.encode(x) if self.is_mended else F.linear(x, self.encode.weight, bias=self.encode.bias)
        return self.out(sum(packed.chunk(3, -1)))  # type: ignore[no-any-return]


class Scaled(nn.Module):
    """Scales a convolution's weight outside of it, as the equalised layers of GANs do."""

    def __init__(self, is_mended: bool = False) -> None:
        super().__init__()
        self.encode, self.out = nn.Conv1d(8, 6, 3), nn.Conv1d(6, 4, 3)
        self.is_mended = is_mended

    def forward(self, x: Tensor) -> Tensor:
        x = x[..., None].expand(-1, -1, 5)
        hidden = self.encode(0.5 * x) if self.is_mended else F.conv1d(x, 0.5 * self.encode.weight)
        return self.out(hidden)  # type: ignore[no-any-return]


READERS = {cls.__name__: cls for cls in (Decoder, Fused, Bypassed, Scaled)}


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad])
@pytest.mark.parametrize("cls", READERS.values(), ids=READERS)
def test_a_weight_that_is_read_past_its_layer_is_said_in_the_first_forward_and_the_remedies_work(
    cls: Callable[..., nn.Module], mode: Any
) -> None:
    x = torch.randn(3, 8)
    model, name = cls(), cls.__name__
    inject(model, config(target_modules=["encode"]))
    with mode(), pytest.warns(UserWarning, match=rf"weight of encode is read in {name}, past.*exclude_modules") as said:
        model(x)
    assert len(said) == 1
    model(x)  # which would raise: it is said once
    for mended, excluded in ((cls(is_mended=True), None), (cls(), ["encode"])):
        inject(mended, config(oft_block_size=2, target_modules=["encode", "out"], exclude_modules=excluded))
        randomize(mended)
        adapted = mended(x)
        merge(mended)
        assert relative(mended(x), adapted) < 1e-5


class Harmless(nn.Module):
    """Reads its weights in every way that a merge does not change."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.mix, self.head = nn.Embedding(11, 8), nn.Linear(8, 8), nn.Linear(8, 11, bias=False)
        self.head.weight = self.words.weight  # tied: a merge gives the embedding one of its own
        self.block = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)
        self.filter = nn.Conv1d(8, 8, 3, padding=1)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.words(ids).type_as(self.mix.weight).to(self.mix.weight)
        weight = self.mix.weight
        penalty = weight.square().sum() + (weight @ weight.mT - torch.eye(8)).norm() + (weight - 1).abs().mean()
        x = x + torch.zeros_like(weight)[0] + weight.new_ones(8)
        x = self.block(checkpoint(self.mix, x, use_reentrant=False))
        return self.head(self.filter(x.mT).mT) + penalty  # type: ignore[no-any-return]


TARGETS = ["words", "mix", "self_attn", "linear1", "linear2", "filter"]


def test_penalties_ties_casts_checkpoints_and_fused_layers_are_no_reads(caplog: pytest.LogCaptureFixture) -> None:
    model, ids = Harmless().train(), torch.randint(0, 11, (2, 4))
    inject(model, config(target_modules=TARGETS))
    with caplog.at_level(logging.WARNING):
        model(ids).sum().backward()
    assert caplog.messages == []
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)


class Shared(nn.Module):
    """One embedding's weight under two modules of which only one is called, as in T5."""

    def __init__(self) -> None:
        super().__init__()
        self.shared, self.inner = nn.Embedding(11, 8), nn.ModuleDict({"words": nn.Embedding(11, 8)})
        self.inner["words"].weight = self.shared.weight
        self.out = nn.Linear(8, 4)

    def forward(self, ids: Tensor) -> Tensor:
        return self.out(self.inner["words"](ids))  # type: ignore[no-any-return]


class Spare(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.shared, self.out = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, ids: Tensor) -> Tensor:
        return self.out(F.one_hot(ids % 8, 8).float())  # type: ignore[no-any-return]


class Replaced(Spare):
    """A layer made of another one's weight after the injection, as fused projections are."""

    def forward(self, ids: Tensor) -> Tensor:
        if not hasattr(self, "copied"):
            self.copied = nn.Linear(8, 8)
            self.copied.weight.data.copy_(self.shared.weight.data)
        return self.out(self.copied(F.one_hot(ids % 8, 8).float()))  # type: ignore[no-any-return]


@pytest.mark.parametrize("cls", [Shared, Spare, Replaced])
def test_a_layer_that_is_never_called_is_said_in_the_first_forward_and_when_the_adapter_leaves(
    cls: Callable[[], nn.Module], caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    model, ids = cls(), torch.randint(0, 11, (2, 4))
    inject(model, config(target_modules=["shared", "out"]))
    model(ids)
    assert [message for message in caplog.messages if "shared: not called in the model's first forward" in message]
    model(ids).sum().backward()
    torch.optim.SGD(model.parameters(), 0.1).step()
    for leave in (lambda: save_adapter(model, tmp_path), lambda: merge(model)):
        caplog.clear()
        leave()  # type: ignore[no-untyped-call]
        assert [message for message in caplog.messages if "shared are still the identity, though others" in message]
    unload(model)
    caplog.clear()
    inject(model, config(target_modules=["shared", "out"], exclude_modules=["shared"]))
    model(ids)
    assert caplog.messages == []


def test_layers_of_parts_that_do_not_run_are_not_mentioned(caplog: pytest.LogCaptureFixture) -> None:
    class Routed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.ModuleList([nn.Sequential(nn.Linear(8, 8)) for _ in range(3)])

        def forward(self, x: Tensor) -> Tensor:
            return self.experts[1](x)  # type: ignore[no-any-return]

    model = Routed()
    inject(model, config(target_modules="all-linear"))
    model(torch.randn(2, 8))
    assert caplog.messages == []


def _stack() -> int:
    return int(torch._C._len_torch_function_stack())


def test_the_watch_ends_with_the_first_forward_however_that_ends() -> None:
    class Failing(Decoder):
        def forward(self, x: Tensor) -> Tensor:
            super().forward(x)
            raise OSError("as it may")

    model = Failing()
    inject(model, config(target_modules=["encode"]))
    with pytest.raises(OSError, match="as it may"):
        model(torch.randn(2, 8))
    assert _stack() == 0
    with pytest.raises(OSError, match="as it may"):
        model(torch.randn(2, 8))
    model.forward = lambda x: x  # type: ignore[method-assign]
    model(torch.randn(2, 8))
    assert not model._forward_hooks  # the watch of a forward that failed leaves with the next that does not
    for take in (lambda model: model, copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))):
        model = nn.Sequential(nn.Linear(8, 8))
        inject(model, config(target_modules=["0"]))
        taken = take(model)
        taken(torch.randn(2, 8))
        assert not taken._forward_hooks
        assert not taken._forward_pre_hooks
        assert _stack() == 0
    for leave in (unload, merge):
        model = nn.Sequential(nn.Linear(8, 8))
        inject(model, config(target_modules=["0"]))
        leave(model)
        assert not model._forward_pre_hooks


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.inner, x, use_reentrant=False)  # type: ignore[no-any-return]


@pytest.mark.parametrize("rows", [2, 64], ids=["input", "weight"])
def test_a_checkpoint_computes_in_the_first_forward_what_it_computes_again(rows: int) -> None:
    """Whichever side is rotated: the second time nobody watches."""
    model = Checkpointed()
    names = inject(model, OFTConfig(oft_block_size=4))
    model(torch.randn(rows, 16)).sum().backward()
    generators = [p.grad for n, p in model.named_parameters() if "oft_R" in n]
    assert len(generators) == len(names) == 2
    assert all(grad is not None for grad in generators)


def test_a_loaded_adapter_is_watched_too(tmp_path: Path) -> None:
    model = Decoder(is_mended=True)
    inject(model, config(target_modules=["encode"]))
    save_adapter(model, tmp_path)
    again = Decoder()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*trained on another base")
        load_adapter(again, tmp_path, ignore_mismatched_base=True)
    with pytest.warns(UserWarning, match="weight of encode is read in Decoder"):
        again(torch.randn(2, 8))


@pytest.mark.parametrize("target", ["model", "function"])
def test_compiled_code_is_left_alone(target: str) -> None:
    """A mode would be compiled into it; with `fullgraph` anything of ours in there would raise."""
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    model, x = Decoder(), torch.randn(2, 8)
    inject(model, config(target_modules=["encode"]))
    counter = CompileCounter()
    if target == "model":
        compiled = torch.compile(model, backend=counter, fullgraph=True)
    else:
        compiled = torch.compile(lambda x: model(x), backend=counter, fullgraph=True)  # type: ignore[assignment]
    for _ in range(3):
        compiled(x)
    assert counter.frame_count == 1
    torch._dynamo.reset()


def test_the_callback_stops_a_fit_before_its_first_backward(tmp_path: Path) -> None:
    class Autoencoder(Small):
        def build(self) -> None:
            super().build()
            self.decoder = Decoder()

        def loss(self, batch: Any) -> Tensor:
            return self.net(self.decoder(batch[0])).square().mean()  # type: ignore[no-any-return]

    options: dict[str, Any] = {"target_modules": ["decoder.encode", "net.0"], "modules_to_save": None}
    fit = trainer(tmp_path, oft(**options), max_steps=1, limit_val_batches=0)
    with pytest.raises(RuntimeError, match=r"weight of decoder.encode is read in Decoder, past its layer's forward"):
        fit.fit(Autoencoder(batch_norm=False), loader(), loader())
    assert _stack() == 0
    fit = trainer(tmp_path, oft(**options, exclude_modules=["encode"]), max_steps=1, limit_val_batches=0)
    fit.fit(Autoencoder(batch_norm=False), loader(), loader())
