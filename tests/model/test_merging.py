"""Into the weights and out again: all or nothing, to the bit where the base is kept, and never a tied weight harmed."""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib
import logging
import pickle
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from layer_cases import KINDS, config, randomize, relative
from norm_net import batch, net, same, snapshot
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightning_oft import (
    OFTConfig,
    delete_adapter,
    disable_adapters,
    inject,
    merge,
    merged,
    oft_layers,
    project,
    set_adapter,
    unload,
    unmerge,
)
from lightning_oft.layers import LayerState, state_of
from lightning_oft.model.folding import is_finite

pytestmark = pytest.mark.filterwarnings("ignore:adapter .* is not active", "ignore:block sizes adjusted")


def _stack(layers: int = 4, **options: Any) -> nn.Module:
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(layers)))
    inject(model, config(target_modules="all-linear", **options))
    randomize(model, 0.2)
    return model


# ---- all or nothing --------------------------------------------------------------------------------------------------


def _fail_at_fold(n: int, error: type[BaseException], model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two rows of a weight are folded at a time, and the n-th time, counted from 0, fails."""
    kind = type(state_of(model[0]).layer_type)  # type: ignore[union-attr]
    fold, calls = kind.fold, []

    def failing(self: Any, *args: Any) -> None:
        calls.append(1)
        if len(calls) == n + 1:
            raise error("out of memory")
        fold(self, *args)

    monkeypatch.setattr("lightning_oft.model.folding.CPU_PIECE", 16)
    monkeypatch.setattr(kind, "fold", failing)


@pytest.mark.parametrize(
    ("n", "keep_base", "error"),
    [(0, "never", ValueError), (13, "always", KeyboardInterrupt), (12, "never", ValueError), (14, "never", SystemExit)],
)
def test_a_failure_at_the_nth_fold_leaves_the_model_as_it_was(
    n: int, keep_base: Any, error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x = _stack(), torch.randn(3, 8)
    before, output = snapshot(model), model(x).detach()
    _fail_at_fold(n, error, model, monkeypatch)
    with pytest.raises(error, match="out of memory"):
        merge(model, keep_base=keep_base)
    monkeypatch.undo()
    if keep_base == "always" or n == 0:
        assert same(model, before)
        assert torch.equal(model(x), output)
    else:
        assert all(relative(tensor + 0, before[name]) < 1e-6 for name, tensor in model.state_dict().items())
    assert relative(model(x), output) < 1e-6
    merge(model)
    assert relative(model(x), output) < 1e-5


def test_a_failure_while_the_base_is_solved_for_leaves_a_model_that_can_still_be_unmerged(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, x = _stack().bfloat16(), torch.randn(3, 8, dtype=torch.bfloat16)
    before, output = snapshot(model), model(x).detach()
    merge(model, keep_base="never")
    _fail_at_fold(6, KeyboardInterrupt, model, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        unmerge(model)
    monkeypatch.undo()
    assert [state.merged is None for state in _states(model)] == [True, False, False, False]
    assert relative(model(x), output) < 2e-2
    unmerge(model)
    assert all(relative(tensor + 0, before[name]) < 1e-2 for name, tensor in model.state_dict().items())


def test_a_generator_that_is_not_finite_is_refused_and_nothing_changes() -> None:
    model = _stack()
    layer: Any = oft_layers(model)["2"]
    layer.oft_R["default"].weight.data[0, 1] = float("nan")
    before = {name: t for name, t in snapshot(model).items() if "oft_R" not in name}
    with pytest.raises(ValueError, match="cannot merge: generators of 2 are NaN or infinite; nothing was changed"):
        merge(model)
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())
    assert all(state.merged is None for state in _states(model))


def _states(model: nn.Module) -> list[LayerState]:
    return [state for layer in oft_layers(model).values() if (state := state_of(layer)) is not None]


def test_a_merge_that_overflows_half_precision_is_refused_and_nothing_changes() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)).half()
    inject(model, config(target_modules="all-linear"))
    randomize(model, 0.5)
    model[1].weight.data.fill_(65000.0)  # type: ignore[operator]
    before = snapshot(model)
    with pytest.raises(
        ValueError, match=r"cannot merge: the merged weight overflows torch.float16; nothing was changed"
    ):
        merge(model)
    assert same(model, before)


def test_a_failure_takes_back_the_choice_of_adapter_too() -> None:
    model, x = nn.Sequential(nn.Linear(8, 8)), torch.randn(3, 8)
    inject(model, config(target_modules=["0"], bias="all"), "one")
    inject(model, config(target_modules=["0"]), "two")
    randomize(model, 0.2, "one")
    with torch.no_grad():
        model[0].bias.add_(1)  # type: ignore[operator]
    layer: Any = model[0]
    layer.oft_R["two"].weight.data.fill_(float("nan"))
    output, flags = model(x), [p.requires_grad for p in model.parameters()]
    with pytest.raises(ValueError, match="NaN"):
        merge(model, "two")
    assert torch.equal(model(x), output)
    assert [p.requires_grad for p in model.parameters()] == flags
    with pytest.raises(ValueError, match="no adapter 'three' here"):
        merge(model, ["one", "three"])
    assert torch.equal(model(x), output)


@pytest.mark.parametrize("adapters", ["two", ["two", "one"]], ids=str)
def test_a_merge_may_name_its_adapters(adapters: str | list[str]) -> None:
    model, x = nn.Sequential(nn.Linear(8, 8)), torch.randn(3, 8)
    for seed, name in enumerate(("one", "two")):
        inject(model, config(target_modules=["0"]), name)
        randomize(model, 0.2, name, seed)
    set_adapter(model, adapters)
    expected = model(x)
    set_adapter(model, "one")
    assert merge(model, adapters) == ["0"]
    assert relative(model(x), expected) < 1e-5


def test_a_layer_that_the_merged_adapters_leave_alone_stays_as_it_is(caplog: pytest.LogCaptureFixture) -> None:
    model, x = nn.Sequential(*(nn.Linear(8, 8) for _ in range(3))), torch.randn(2, 8)
    inject(model, config(target_modules=["0", "1"]))
    inject(model, config(target_modules=["1", "2"]), "second")
    for key, generator in model.named_parameters():
        if "oft_R" in key:
            nn.init.normal_(generator, std=0.2)
    for name, alone in (("default", 2), ("second", 0)):
        set_adapter(model, name)
        weight, adapted = model[alone].weight.detach().clone(), model(x)
        with merged(model):
            assert relative(model(x), adapted) < 1e-6
        merge(model, name)
        assert relative(model(x), adapted) < 1e-6
        assert torch.equal(model[alone].weight, weight)
        unmerge(model)
        assert torch.equal(model(x), adapted)
    assert not caplog.messages


def test_a_merged_model_refuses_what_needs_its_base_and_an_unmerged_one_has_nothing_to_undo() -> None:
    model = _stack()
    with pytest.raises(RuntimeError, match="nothing to unmerge: no layer of the model is merged"):
        unmerge(model)
    merge(model)
    values = snapshot(model)
    for action in (
        lambda: inject(model, config(target_modules=["0"]), "second"),
        lambda: set_adapter(model, "default"),
        lambda: disable_adapters(model).__enter__(),
        lambda: delete_adapter(model, "default"),
        lambda: merge(model),
    ):
        with pytest.raises(RuntimeError, match=r"0, 1, 2, 3 are merged; call unmerge.model. first"):
            action()
    assert same(model, values)
    unmerge(model)
    with pytest.raises(ValueError, match="nothing to merge: the model has no adapter; call inject or load_adapter"):
        merge(nn.Linear(8, 8))


def test_keep_base_takes_three_words() -> None:
    with pytest.raises(ValueError, match="keep_base=True: must be 'auto', 'always' or 'never'"):
        merge(_stack(), keep_base=True)  # type: ignore[arg-type]


def test_auto_keeps_up_to_the_limit(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    module = importlib.import_module("lightning_oft.model.merging")
    for limit, kept in ((4 * 64 * 4, True), (4 * 64 * 4 - 1, False)):
        monkeypatch.setattr(module, "KEEP_LIMIT", limit)
        model = _stack()
        with caplog.at_level(logging.INFO):
            merge(model)
        assert all((tensor is not None) == kept for state in _states(model) for tensor in state.base.values())
        assert caplog.records[-1].getMessage().startswith("merge: keeping" if kept else "merge: not keeping")


# ---- the way back ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "keep_base"), [("one_weight", "always"), ("load_state_dict", "never"), ("training", "always")]
)
def test_changed_weights_are_not_thrown_away(change: str, keep_base: Any) -> None:
    model, x = _stack(), torch.randn(3, 8)
    merge(model, keep_base=keep_base)
    if change == "one_weight":
        model[1].weight.data[3, 3] += 0.1  # type: ignore[index, union-attr]
    elif change == "load_state_dict":
        model.load_state_dict(nn.Sequential(*(nn.Linear(8, 8) for _ in range(4))).state_dict())
    else:
        model.requires_grad_()
        optimizer = torch.optim.SGD(model.parameters(), 1e-2)
        model(x).square().sum().backward()
        optimizer.step()
    before, output = snapshot(model), model(x)
    with pytest.raises(
        RuntimeError, match=r"cannot unmerge (1|0, 1).*: the weights were changed after the merge.*unload"
    ):
        unmerge(model)
    assert same(model, before)
    unload(model)
    assert torch.equal(model(x), output)
    assert oft_layers(model) == {}


def test_reloading_the_merged_weights_is_no_change() -> None:
    model = _stack()
    base = snapshot(model)
    merge(model)
    model.load_state_dict(snapshot(model))
    unmerge(model)
    assert same(model, base)


def test_a_merged_model_may_be_cast_and_come_back() -> None:
    model, x, dtype = _stack(), torch.randn(3, 8), torch.bfloat16
    output = model(x)
    merge(model)
    model.to(dtype)
    unmerge(model)
    assert relative(model(x.to(dtype)), output) < 3e-2


def test_the_mode_changed_while_merged_holds_for_the_rotations_too() -> None:
    model, x = _stack(module_dropout=0.5), torch.randn(3, 8)
    output = model.eval()(x)
    merge(model.train())
    model.eval()
    unmerge(model)
    assert torch.equal(model(x), output)
    merge(model)
    model.train()
    unmerge(model)
    assert len({tuple(model(x).flatten().tolist()) for _ in range(20)}) > 1


def test_dropout_never_reaches_a_merge() -> None:
    model, x = _stack(module_dropout=0.9), torch.randn(3, 8)
    output = model.eval()(x)
    merge(model.train())
    assert relative(model(x), output) < 1e-5


def test_a_merged_model_is_a_plain_one() -> None:
    plain = nn.Sequential(*(nn.Linear(8, 8) for _ in range(4)))
    model = copy.deepcopy(plain)
    inject(model, config(target_modules="all-linear"))
    randomize(model)
    identities = {name: id(parameter) for name, parameter in model.named_parameters() if "oft_R" not in name}
    merge(model)
    assert list(model.state_dict()) == list(plain.state_dict())
    assert {name: id(parameter) for name, parameter in model.named_parameters()} == identities
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert not any(p.requires_grad for p in model.parameters())
    unload(model)
    assert all(p.requires_grad for p in model.parameters())


def test_training_goes_on_after_unmerge() -> None:
    model, x = _stack(), torch.randn(3, 8)
    rotations = {name: p for name, p in model.named_parameters() if "oft_R" in name}
    merge(model)
    unmerge(model)
    assert {name: p for name, p in model.named_parameters() if "oft_R" in name} == rotations
    model(x).square().sum().backward()
    assert all(p.grad is not None and p.requires_grad for p in rotations.values())


# ---- memory format ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layer", "shape", "memory_format"),
    [
        (lambda: nn.Conv2d(4, 6, 3, groups=2), (2, 4, 6, 6), torch.channels_last),
        (lambda: nn.ConvTranspose2d(4, 6, 3), (2, 4, 6, 6), torch.channels_last),
        (lambda: nn.Conv3d(4, 6, 3), (2, 4, 5, 5, 5), torch.channels_last_3d),
    ],
)
def test_channels_last_stays_channels_last(
    layer: Any, shape: tuple[int, ...], memory_format: torch.memory_format
) -> None:
    model: Any = nn.Sequential(layer())
    model.to(memory_format=memory_format)
    x = torch.randn(shape).to(memory_format=memory_format)
    strides = model[0].weight.stride()
    inject(model, config(target_modules=["0"], oft_block_size=2))
    randomize(model, 0.2)
    output = model(x)
    assert output.is_contiguous(memory_format=memory_format)
    seen: list[tuple[int, ...]] = []
    if isinstance(model[0], nn.Conv2d):
        convolve = torch.nn.functional.conv2d
        with pytest.MonkeyPatch.context() as patch:

            def watched(input: Tensor, weight: Tensor, *rest: Any) -> Tensor:
                seen.append(weight.stride())
                output: Tensor = convolve(input, weight, *rest)
                return output

            patch.setattr("torch.nn.functional.conv2d", watched)
            model(x)
        assert len(seen) == 1
    assert all(stride == strides for stride in seen)
    merge(model)
    assert model[0].weight.stride() == strides
    assert relative(model(x), output) < 1e-5
    assert model(x).is_contiguous(memory_format=memory_format)
    unmerge(model)
    assert model[0].weight.stride() == strides
    merge(model, keep_base="never")
    unmerge(model)
    assert model[0].weight.stride() == strides


def test_projecting_a_merged_model_changes_nothing() -> None:
    model, x = nn.Sequential(nn.Linear(8, 8)), torch.randn(3, 8)
    inject(model, OFTConfig(oft_block_size=4, max_angle=1.0, use_cayley_neumann=False))
    nn.init.normal_(model[0].oft_R["default"].weight, std=0.1)  # type: ignore[index, arg-type, union-attr]
    adapted = model(x)
    merge(model, keep_base="never")
    project(model)
    unmerge(model)
    torch.testing.assert_close(model(x), adapted)
    project(model)
    assert not torch.allclose(model(x), adapted, atol=1e-3)


# ---- tied weights ------------------------------------------------------------------------------------------------------


def _tied() -> Any:
    sizes: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    options = transformers.LlamaConfig(**sizes, intermediate_size=24, vocab_size=32, tie_word_embeddings=True)
    return transformers.LlamaForCausalLM(options).eval()


@pytest.mark.parametrize(
    ("targets", "keep_base"),
    [
        (["lm_head"], "never"),
        (["embed_tokens"], "always"),
        (["lm_head", "embed_tokens"], "never"),
        (["q_proj"], "never"),
    ],
)
def test_tied_weights_are_merged_apart_and_tied_again(targets: list[str], keep_base: Any, tmp_path: Path) -> None:
    model, ids = _tied(), torch.randint(0, 32, (2, 5))
    base = model(ids).logits
    inject(model, config(target_modules=targets))
    randomize(model, 0.3)
    adapted = model(ids).logits
    assert relative(adapted, base) > 1e-4
    merge(model, keep_base=keep_base)
    assert relative(model(ids).logits, adapted) < 1e-5
    tied = targets == ["q_proj"]
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    assert model.config.tie_word_embeddings == tied
    model.save_pretrained(tmp_path)
    again = transformers.LlamaForCausalLM.from_pretrained(tmp_path).eval()
    assert relative(again(ids).logits, adapted) < 1e-5
    unmerge(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.config.tie_word_embeddings
    assert relative(model(ids).logits, adapted) < 1e-6
    unload(model)
    assert relative(model(ids).logits, base) < 1e-6


def test_a_failure_unties_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = _tied(), torch.randint(0, 32, (2, 5))
    inject(model, config(target_modules=["embed_tokens", "lm_head"]))
    randomize(model, 0.3)
    adapted = model(ids).logits
    layer_type = type(state_of(model.lm_head).layer_type)  # type: ignore[union-attr]
    monkeypatch.setattr(layer_type, "fold", lambda *_: (_ for _ in ()).throw(MemoryError("none left")))
    with pytest.raises(MemoryError):
        merge(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.config.tie_word_embeddings
    assert torch.equal(model(ids).logits, adapted)


def test_plain_modules_that_share_a_weight_are_merged_apart(caplog: pytest.LogCaptureFixture) -> None:
    model, x = nn.ModuleDict({"a": nn.Linear(8, 8), "b": nn.Linear(8, 8)}), torch.randn(3, 8)
    model["b"].weight = model["a"].weight
    untouched = model["b"](x)
    inject(model, config(target_modules=["a"]))
    randomize(model, 0.3)
    adapted = model["a"](x)
    merge(model)
    assert "merge: a shared a weight with another module" in caplog.text
    assert relative(model["a"](x), adapted) < 1e-5
    assert torch.equal(model["b"](x), untouched)
    unmerge(model)
    assert model["b"].weight is model["a"].weight


# ---- the context ---------------------------------------------------------------------------------------------------


class _Leaves(Exception):
    pass


def _identities(model: nn.Module) -> dict[str, Any]:
    """All that a context must give back as it found it: the same objects with the same memory, flags and modes."""
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers()]
    return {
        "tensors": {name: (id(one), one.data_ptr(), one.requires_grad, id(one.grad)) for name, one in tensors},
        "modules": {name: (id(one), type(one), one.training) for name, one in model.named_modules()},
        "hooks": {name: len(one._forward_pre_hooks) + len(one._forward_hooks) for name, one in model.named_modules()},
        "active": [(state.active, state.enabled, state.merged, state.base) for state in _states(model)],
    }


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("leaves_by", ["end", "error"])
def test_within_merged_a_model_is_plain_and_after_it_as_before(name: str, leaves_by: str) -> None:
    model = KINDS[name].build()
    keys, inputs = list(model.state_dict()), KINDS[name].inputs()
    inject(model, config())
    randomize(model, 0.2)
    adapted = model(*inputs)
    adapted.square().sum().backward()
    before, identities = snapshot(model), _identities(model)
    with contextlib.suppress(_Leaves), merged(model):
        assert list(model.state_dict()) == keys
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
        assert relative(model(*inputs), adapted) < 1e-5
        assert not model(*inputs).requires_grad
        if leaves_by == "error":
            raise _Leaves
    assert same(model, before)
    assert _identities(model) == identities
    assert torch.equal(model(*inputs), adapted)


def _several() -> Any:
    """Two adapters with biases and a head of their own, a norm, an encoder with its fused path, gradients."""
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    parts = [("body", nn.Linear(8, 8)), ("norm", nn.BatchNorm1d(5)), ("encoder", nn.TransformerEncoder(layer, 1))]
    model: Any = nn.Sequential(OrderedDict([*parts, ("head", nn.Linear(8, 4))]))
    for seed, name in enumerate(("one", "two")):
        inject(model, config(target_modules="all-linear", bias="all", modules_to_save=["head"]), name)
        randomize(model, 0.2, name, seed)
    set_adapter(model, "two")
    with torch.no_grad():
        model.head.bias.add_(1)
    set_adapter(model, "one")
    model.train()(torch.randn(4, 5, 8)).square().sum().backward()
    return model


@pytest.mark.parametrize("adapters", [None, "two", ["two"]], ids=str)
def test_merged_may_name_its_adapters_and_gives_the_choice_back(adapters: Any) -> None:
    model, x = _several(), torch.randn(4, 5, 8)
    set_adapter(model, adapters or "one")
    expected = model.eval()(x)
    set_adapter(model, "one")
    model.train()(x).square().sum().backward()
    before, identities = snapshot(model), _identities(model)
    with merged(model, adapters):
        assert relative(model.eval()(x), expected) < 1e-5
        model.requires_grad_()
    assert same(model, before)
    assert _identities(model) == identities


def test_norms_of_the_frozen_base_rest_within_merged() -> None:
    model, x = net(), batch(4)
    inject(model, config(target_modules=["fc"]))
    model.train()
    before, output = snapshot(model), model(x)
    with merged(model):
        assert relative(model(x), output) < 1e-6
    assert same(model, before)
    assert model.norm.training is False


def test_a_merged_model_stays_merged_within_merged() -> None:
    model, x = _stack(), torch.randn(3, 8)
    output = model(x)
    with merged(model):
        inside = snapshot(model)
        with merged(model), merged(model, "default"):
            assert same(model, inside)
        assert same(model, inside)
        with (
            pytest.raises(RuntimeError, match="cannot merge other: 0, 1, 2, 3 are merged; call unmerge"),
            merged(model, "other"),
        ):
            pass
    assert torch.equal(model(x), output)
    merge(model[1])  # type: ignore[index]
    part = snapshot(model)
    with merged(model):
        assert all(state.merged is not None for state in _states(model))
        assert relative(model(x), output) < 1e-5
    assert same(model, part)
    merge_all = [state.merged is not None for state in _states(model)]
    assert merge_all == [False, True, False, False]


def _one_entry(model: Any) -> None:
    model[1].weight.data[3, 3] += 1e-6


def _two_rows(model: Any) -> None:
    model[1].weight.data = model[1].weight.data.flip(0)


def _optimizer_step(model: Any) -> None:
    weight = model[1].weight.requires_grad_()
    optimizer = torch.optim.AdamW([weight], lr=1e-6, fused=True)
    model(torch.randn(3, 8)).square().sum().backward()
    optimizer.step()


def _other_checkpoint(model: Any) -> None:
    model[1].load_state_dict(nn.Linear(8, 8).state_dict())


@pytest.mark.parametrize("change", [_one_entry, _two_rows, _optimizer_step, _other_checkpoint])
def test_a_merged_weight_that_is_changed_inside_is_not_dropped(change: Any) -> None:
    model, x = _stack(), torch.randn(3, 8)
    inside: dict[str, Tensor] = {}

    def leave() -> None:
        with merged(model):
            change(model)
            inside.update(snapshot(model))

    with pytest.raises(RuntimeError, match=r"the weights of 1 were changed inside, so it stays merged; call unload"):
        leave()
    assert same(model, inside)
    output = model(x)
    unload(model)
    assert torch.equal(model(x), output)
    assert same(model, inside)


def test_what_is_no_merged_weight_may_change_inside() -> None:
    model, x = _several(), torch.randn(4, 5, 8)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    start = snapshot(model)
    with merged(model):
        optimizer.step()  # with the gradients of before
    trained = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, start[name])}
    assert {name for name in trained if "oft_R.one" in name} != set()
    assert "head.bias" in trained
    assert not any(name.endswith("weight") and "oft_R" not in name and "head" not in name for name in trained)
    with torch.no_grad():
        assert model(x).isfinite().all()


@pytest.mark.parametrize("end", [unmerge, unload])
def test_a_model_may_be_unmerged_or_unloaded_inside(end: Any) -> None:
    model, x = _stack(bias="all"), torch.randn(3, 8)
    before, output = snapshot(model), model(x)
    with merged(model):
        end(model)
        inside = snapshot(model)
        assert relative(model(x), output) < 1e-5
    assert same(model, before if end is unmerge else inside)
    assert relative(model(x), output) < 1e-5
    assert len(oft_layers(model)) == (4 if end is unmerge else 0)


def test_a_cast_inside_is_no_change() -> None:
    model, x = _stack(), torch.randn(3, 8)
    output, base = model(x), snapshot(model)
    with merged(model):
        model.bfloat16()
    assert torch.equal(model[0].weight, base["0.weight"].bfloat16())  # type: ignore[index]
    assert relative(model(x.bfloat16()), output) < 3e-2


@pytest.mark.parametrize("inside", [torch.no_grad, torch.inference_mode, contextlib.nullcontext])
def test_a_backward_in_flight_finds_its_weights_again(inside: Any) -> None:
    model, x = _stack(), torch.randn(3, 8)
    expected = torch.autograd.grad(model(x).square().sum(), model[0].oft_R.parameters())  # type: ignore[index]
    loss = model(x).square().sum()
    with inside(), merged(model):
        model(x)
    assert torch.equal(torch.autograd.grad(loss, model[0].oft_R.parameters())[0], expected[0])  # type: ignore[index]
    again = torch.autograd.grad(model(x).square().sum(), model[0].oft_R.parameters())  # type: ignore[index]
    assert torch.equal(again[0], expected[0])


def test_tied_weights_are_apart_within_merged_and_tied_after_it(caplog: pytest.LogCaptureFixture) -> None:
    model, ids = _tied(), torch.randint(0, 32, (2, 5))
    inject(model, config(target_modules=["lm_head", "q_proj"]))
    randomize(model, 0.3)
    adapted, shared = model(ids).logits, model.lm_head.weight
    with merged(model):
        assert relative(model(ids).logits, adapted) < 1e-5
        assert model.lm_head.weight is not model.model.embed_tokens.weight
        assert not model.config.tie_word_embeddings
    assert model.lm_head.weight is model.model.embed_tokens.weight is shared
    assert model.config.tie_word_embeddings
    assert torch.equal(model(ids).logits, adapted)
    assert "shared a weight" not in caplog.text


def test_compiled_code_sees_the_merge_and_its_end() -> None:
    model, x = _stack().eval(), torch.randn(3, 8)
    compiled: Any = torch.compile(model, backend="eager")
    with torch.no_grad():
        output = compiled(x)
        with merged(compiled):
            assert relative(compiled(x), output) < 1e-5
        assert relative(compiled(x), output) < 1e-6


def test_merged_refuses_what_merge_refuses_and_changes_nothing() -> None:
    with torch.device("meta"):
        absent = nn.Sequential(nn.Linear(8, 8))
    inject(absent, config(target_modules=["0"]))
    broken = _stack()
    broken[2].oft_R["default"].weight.data.fill_(float("nan"))  # type: ignore[index, union-attr]
    disabled = _stack()
    for model, around, message in (
        (nn.Linear(8, 8), contextlib.nullcontext(), "nothing to merge: the model has no adapter"),
        (absent, contextlib.nullcontext(), "the weights of 0 are on the meta device, not loaded or offloaded"),
        (broken, contextlib.nullcontext(), "generators of 2 are NaN or infinite; nothing was changed"),
        (disabled, disable_adapters(disabled), "cannot merge inside disable_adapters"),
    ):
        before = _identities(model)
        with pytest.raises((ValueError, RuntimeError), match=message), around, merged(model):
            pass
        assert _identities(model) == before


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_finite_is_what_every_entry_is(dtype: torch.dtype) -> None:
    largest = torch.full((40, 50), torch.finfo(dtype).max, dtype=dtype)
    assert not largest.sum().isfinite()
    assert is_finite(largest)
    for layout in (lambda t: t, lambda t: t.t(), lambda t: t.view(2, 20, 5, 10).to(memory_format=torch.channels_last)):
        for entries in ({}, {7: "inf"}, {7: "-inf"}, {7: "nan"}, {7: "inf", 9: "-inf"}):
            tensor = torch.randn(40, 50).to(dtype)
            for place, value in entries.items():
                tensor[place, place] = float(value)
            assert is_finite(layout(tensor)) == (not entries)
    assert is_finite(torch.empty(0, 8, dtype=dtype))


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-14), (torch.float32, 1e-6), (torch.bfloat16, 4e-3)])
def test_a_weight_of_many_pieces_is_folded_and_solved_to_its_precision(
    dtype: torch.dtype, bound: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lightning_oft.model.folding.CPU_PIECE", 64)
    for name in ("linear_2d", "conv1d_hf", "conv_transpose2d_groups", "embedding_1d", "conv2d_3x3"):
        model = KINDS[name].build().to(dtype)
        inject(model, config())
        randomize(model, 0.3)
        inputs = [x.to(dtype) if x.is_floating_point() else x for x in KINDS[name].inputs()]
        base, adapted = snapshot(model), model(*inputs)
        held = model.layer.weight.detach()  # type: ignore[union-attr, operator]
        merge(model, keep_base="never")
        assert relative(model(*inputs), adapted) < max(4 * bound, 1e-6)
        assert torch.equal(held, base["layer.weight"])  # others may hold it
        unmerge(model)
        assert relative(model.state_dict()["layer.weight"], base["layer.weight"]) < bound


counts_holders = pytest.mark.skipif(
    not hasattr(torch._C, "_storage_Use_Count"), reason="a torch that cannot tell whether a view is held"
)


class _Largest(TorchDispatchMode):
    """The largest storage that an operator makes inside, in bytes."""

    def __init__(self, known: Tensor) -> None:
        super().__init__()
        self.known, self.nbytes = known.data_ptr(), 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for one in tree_leaves(out):
            if isinstance(one, Tensor) and one.untyped_storage().data_ptr() != self.known:
                self.nbytes = max(self.nbytes, one.untyped_storage().nbytes())
        return out


@counts_holders
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "build",
    [
        lambda: nn.Linear(24, 402),
        lambda: transformers.pytorch_utils.Conv1D(402, 24),
        lambda: nn.Conv2d(4, 402, 3),
        lambda: nn.Embedding(402, 24),
    ],
    ids=["linear", "conv1d_hf", "conv2d", "embedding"],
)
def test_a_base_that_is_not_kept_is_folded_in_its_own_memory(
    build: Any, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lightning_oft.model.folding.CPU_PIECE", 240)
    model: Any = nn.Sequential(build()).to(dtype)
    for name in ("one", "two"):
        inject(model, config(target_modules=["0"], oft_block_size=4), name)
        randomize(model, 0.3, name)
    set_adapter(model, ["one", "two"])
    other = copy.deepcopy(model)
    held, weight = other[0].weight.detach(), model[0].weight
    for action in (functools.partial(merge, keep_base="never"), unmerge):
        address, version = weight.data_ptr(), weight._version
        with _Largest(weight) as largest:
            action(model)
        assert largest.nbytes < weight.nbytes / 2
        assert weight.data_ptr() == address
        assert weight._version > version  # what was computed from the values of before is told so
        action(other)
        assert other[0].weight.data_ptr() != held.data_ptr()
        assert torch.equal(weight, other[0].weight)
        held = other[0].weight.detach()


def _an_array(layer: nn.Linear) -> Any:
    array = layer.weight.detach().numpy().copy()
    layer.weight = nn.Parameter(torch.from_numpy(array), requires_grad=False)
    return array


@pytest.mark.parametrize(
    "hold",
    [
        lambda layer: layer.state_dict()["weight"],
        lambda layer: layer.weight.detach()[2:3, 4],
        lambda layer: nn.Parameter(layer.weight, requires_grad=False),
        lambda layer: layer.weight.detach().numpy(),
        lambda layer: layer.weight.data.share_memory_(),
        _an_array,
    ],
    ids=["state_dict", "entry", "parameter", "numpy", "shared_memory", "array"],
)
def test_whoever_else_has_the_memory_of_a_weight_keeps_its_values(hold: Any) -> None:
    model: Any = nn.Sequential(nn.Linear(8, 8))
    held = hold(model[0])
    inject(model, config(target_modules=["0"]))
    randomize(model, 0.3)
    x = torch.randn(3, 8)
    before, adapted = copy.deepcopy(held), model(x).detach()  # a graph would hold the weight too
    merge(model, keep_base="never")
    assert (torch.as_tensor(held) == torch.as_tensor(before)).all()
    assert relative(model(x), adapted) < 1e-5
    unmerge(model)
    assert relative(model(x), adapted) < 1e-5


def test_memory_that_another_process_may_have_open_is_left_alone() -> None:
    model: Any = nn.Sequential(nn.Linear(8, 8))
    address = model[0].weight.data.share_memory_().data_ptr()
    inject(model, config(target_modules=["0"]))
    randomize(model, 0.3)
    merge(model, keep_base="never")
    assert model[0].weight.data_ptr() != address


@pytest.mark.parametrize(("entry", "fits"), [(2e4, True), (float("inf"), True), (65000.0, False)])
def test_near_the_end_of_the_range_the_base_is_there_until_the_merged_weight_is_known(entry: float, fits: bool) -> None:
    model: Any = nn.Sequential(nn.Linear(8, 8)).half()
    inject(model, config(target_modules=["0"]))
    randomize(model, 0.3)
    model[0].weight.data[3] = entry
    before, address = snapshot(model), model[0].weight.data_ptr()
    with contextlib.nullcontext() if fits else pytest.raises(ValueError, match="overflows"):
        merge(model, keep_base="never")
    assert (model[0].weight.data_ptr() != address) == fits
    assert fits or same(model, before)


@pytest.mark.skipif(not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="a kernel without large pages")
@pytest.mark.parametrize("rows", [768, 8192], ids=["own", "of malloc"])
def test_a_merged_weight_beside_its_base_is_asked_for_in_large_pages(rows: int) -> None:
    """Its first writing takes hundreds of page faults else, and as long as the fold. One of a few MiB begins with a page."""
    model = nn.Sequential(nn.Linear(1024, rows))
    inject(model, OFTConfig(oft_block_size=32, target_modules="all-linear"))
    merge(model, keep_base="always")
    address = model[0].weight.data_ptr()
    assert "hg" in _memory_flags(address + 2**20)
    assert rows > 768 or address % 2**21 == 0
    kept = pickle.loads(pickle.dumps(copy.deepcopy(model[0].weight)))
    assert torch.equal(kept, model[0].weight)
    assert kept.untyped_storage().nbytes() == model[0].weight.untyped_storage().nbytes() == 4096 * rows


def _memory_flags(address: int) -> list[str]:
    """What Linux was told of the memory at an address."""
    is_here = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first, *others = line.split()
        if first == "VmFlags:" and is_here:
            return others
        if not first.endswith(":"):
            low, high = (int(end, 16) for end in first.split("-"))
            is_here = low <= address < high
    return []
