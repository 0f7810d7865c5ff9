"""What the first forward shows: weights read past their layers, and layers that are not called; said once, in time."""

from __future__ import annotations

import contextlib
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
from lightning_oft.callback.checks import watch_first_forward


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
    with mode(), pytest.warns(UserWarning, match=rf"weight of encode is used in {name}, past.*exclude_modules") as said:
        model(x)
    assert len(said) == 1
    model(x)  # which would raise: it is said once
    for mended, excluded in ((cls(is_mended=True), None), (cls(), ["encode"])):
        inject(mended, config(oft_block_size=2, target_modules=["encode", "out"], exclude_modules=excluded))
        randomize(mended)
        adapted = mended(x)
        merge(mended)
        assert relative(mended(x), adapted) < 1e-5


class Past(nn.Module):
    """Uses a weight in one of the ways that a product with the input is not."""

    def __init__(self, how: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.encode, self.out, self.how = nn.Linear(8, 8), nn.Linear(8, 4), how

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.how(self.encode, x))  # type: ignore[no-any-return]


class Product(torch.autograd.Function):
    """x W^T with a backward of its own, as fused losses have."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        return x @ weight.mT

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0] @ ctx.saved_tensors[0], None


USES: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "elementwise": lambda layer, x: layer(x) + (x[:, None] * layer.weight).sum(-1),
    "distances": lambda layer, x: torch.cdist(x, layer.weight),
    "cosines": lambda layer, x: F.cosine_similarity(x[:, None], layer.weight, dim=-1),
    "lengths": lambda layer, x: layer(x) * layer.weight.norm(dim=0),
    "solved": lambda layer, x: torch.linalg.solve(layer.weight.mT @ layer.weight + torch.eye(8), x.mT).mT,
    "looked_up": lambda layer, x: layer(x) + layer.weight[x.argmax(-1)],
    "added": lambda layer, x: x + layer.weight[0].expand_as(x),
    "written_into": lambda layer, x: x.clone().index_copy_(0, torch.tensor([0]), layer.weight[:1]),
    "custom_function": lambda layer, x: Product.apply(x, layer.weight),  # type: ignore[no-untyped-call]
    "forward": lambda layer, x: layer.forward(x),
    "forward_of_the_class": lambda layer, x: nn.Linear.forward(layer, x),
    "checkpointed": lambda layer, x: checkpoint(layer.forward, x, use_reentrant=False),  # type: ignore[no-any-return]
    "shifted": lambda layer, x: torch.func.functional_call(layer, {"weight": layer.weight + x.mean(0)}, (x,)),
}


@pytest.mark.parametrize("how", USES.values(), ids=USES)
def test_other_uses_than_products_and_calls_of_forward_are_said_too_and_leaving_it_out_helps(how: Any) -> None:
    x, model = torch.randn(3, 8), Past(how)
    inject(model, config(target_modules=["encode", "out"]))
    with pytest.warns(
        UserWarning, match="the weight of encode is used in Past, past its layer, where no rotation reach"
    ):
        model(x)
    unload(model)
    inject(model, config(target_modules=["encode", "out"], exclude_modules=["encode"]))
    randomize(model)
    adapted = model(x)
    merge(model)
    assert relative(model(x), adapted) < 1e-5


def _mask(layer: Any, args: Any) -> None:
    layer.weight.data.mul_(layer.weight.data.gt(0))


def _clip(layer: Any, args: Any) -> None:
    with torch.no_grad():
        layer.weight.copy_(torch.renorm(layer.weight, 2, 1, 0.3))


def _replace(layer: Any, args: Any) -> None:
    layer.weight.data = layer.weight.data.clamp(-0.2, 0.2)


class Clamped(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight.clamp(-0.2, 0.2), self.bias)


@pytest.mark.parametrize("hook", [_mask, _clip, _replace])
def test_a_hook_that_writes_the_weight_is_said_and_a_subclass_does_the_same(hook: Any) -> None:
    model, x = nn.Sequential(nn.Linear(8, 8)), torch.randn(3, 8)
    model[0].register_forward_pre_hook(hook)
    inject(model, config(target_modules=["0"]))
    with pytest.warns(
        UserWarning, match="the weight of 0 is written when its layer is called.*a subclass.*exclude_mod"
    ):
        model(x)
    mended = nn.Sequential(Clamped(8, 8))
    inject(mended, config(target_modules=["0"], use_cayley_neumann=False))
    randomize(mended)
    adapted = mended(x)
    merge(mended)
    assert relative(mended(x), adapted) < 1e-5


@pytest.mark.parametrize("first", ["inject", "hooks"])
def test_hooks_that_change_or_read_the_input_merge_as_they_were_trained(first: str) -> None:
    """A hook before the forward may come later; one behind it that is there is given the input as it was."""
    model, x = nn.Sequential(nn.Linear(8, 8)), torch.randn(3, 8)
    steps = [
        lambda: inject(model, config(target_modules=["0"], use_cayley_neumann=False)),
        lambda: model[0].register_forward_pre_hook(lambda layer, args: (args[0] * torch.arange(8.0),)),
    ]
    if first == "hooks":
        model[0].register_forward_hook(lambda layer, args, output: output + args[0].sort().values)
    for step in steps if first == "inject" else reversed(steps):
        step()
    randomize(model)
    adapted = model(x)
    merge(model)
    assert relative(model(x), adapted) < 1e-5


def test_a_hook_that_reads_a_weight_which_is_rotated_below_the_forward_is_said() -> None:
    model = nn.Sequential(nn.Conv1d(8, 8, 1))
    model[0].register_forward_hook(lambda layer, args, output: output + layer.weight[:, 0])
    inject(model, config(target_modules=["0"]))
    with pytest.warns(UserWarning, match="the weight of 0 is used in Sequential, past its layer"):
        model(torch.randn(2, 8, 1))


class Harmless(nn.Module):
    """Reads its weights in every way that a merge does not change."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.mix, self.head = nn.Embedding(11, 8), nn.Linear(8, 8), nn.Linear(8, 11, bias=False)
        self.head.weight = self.words.weight  # tied: a merge gives the embedding one of its own
        self.block = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)
        self.filter = nn.Conv1d(8, 8, 3, padding=1)
        self.anchor = self.mix.weight.detach().clone()
        self.register_buffer("average", torch.zeros(8, 8))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.words(ids).type_as(self.mix.weight).to(self.mix.weight)
        weight = self.mix.weight
        penalty = weight.square().sum() + (weight @ weight.mT - torch.eye(8)).norm() + (weight - 1).abs().mean()
        penalty = penalty + (weight - self.anchor).square().sum()  # to where it began
        x = x @ self.average.lerp_(weight.detach(), 0.1)  # type: ignore[operator]
        x = x + torch.zeros_like(weight)[0] + weight.new_ones(8)
        x = self.block(checkpoint(self.mix, x, use_reentrant=False))
        return self.head(self.filter(x.mT).mT) + penalty  # type: ignore[no-any-return]


TARGETS = ["words", "mix", "self_attn", "linear1", "linear2", "filter"]


def test_penalties_ties_casts_checkpoints_and_fused_layers_are_no_reads(caplog: pytest.LogCaptureFixture) -> None:
    model, ids = Harmless().train(), torch.randint(0, 11, (2, 4))
    inject(model, config(target_modules=TARGETS))
    with caplog.at_level(logging.WARNING):
        model(ids).sum().backward()
    assert [line for line in caplog.messages if "they are tied" not in line] == []
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


@pytest.mark.filterwarnings("ignore:copied.weight, copied.bias. trained or changed beside adapter")
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


class Encoder(nn.Module):
    """Used by a method of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.encode = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.encode(x)  # type: ignore[no-any-return]

    def read(self, x: Tensor) -> Tensor:
        return self.encode(x) + F.linear(x, self.encode.weight)  # type: ignore[no-any-return]


@pytest.mark.parametrize("how", ["method", "compiled", "forward"])
def test_a_merge_says_that_no_forward_could_be_looked_at(how: str, caplog: pytest.LogCaptureFixture) -> None:
    model, x = Encoder(), torch.randn(3, 8)
    inject(model, config(target_modules=["encode"]))
    run: Any = {"method": model.read, "compiled": torch.compile(model, backend="eager"), "forward": model}[how]
    run(x).sum().backward()
    merge(model)
    said = [one for one in caplog.messages if "no forward of the model was looked at" in one]
    assert len(said) == (how != "forward")


@pytest.mark.parametrize("why", ["the model is compiled", "the weights of encode are sharded"])
def test_what_a_fit_cannot_look_at_is_said_at_its_start(why: str, caplog: pytest.LogCaptureFixture) -> None:
    model: Any = Encoder()
    inject(model, config(target_modules=["encode"]))
    if "sharded" in why:
        model.encode.weight._fsdp_flattened = True
    else:
        model.compile(backend="eager")
    with caplog.at_level(logging.INFO), contextlib.ExitStack() as undo:
        watch_first_forward(model, torch.randn(3, 8), undo)
    assert [one for one in caplog.messages if why in one and "used past its layer" in one]


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
    with pytest.warns(UserWarning, match="weight of encode is used in Decoder"):
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
    with pytest.raises(RuntimeError, match=r"weight of decoder.encode is used in Decoder, past its layer"):
        fit.fit(Autoencoder(batch_norm=False), loader(), loader())
    assert _stack() == 0
    fit = trainer(tmp_path, oft(**options, exclude_modules=["encode"]), max_steps=1, limit_val_batches=0)
    fit.fit(Autoencoder(batch_norm=False), loader(), loader())
