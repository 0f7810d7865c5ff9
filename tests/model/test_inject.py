"""Going in and coming out: what is frozen, what is trained, and that no trace stays."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers
from layer_cases import config, randomize, relative
from torch import Tensor, nn

from lightning_oft import OFTConfig, disable_adapters, inject, merge, oft_layers, set_adapter, unload, unmerge
from lightning_oft.model.freezing import freeze
from lightning_oft.model.traversal import walk


class Body(nn.Module):
    """Two layers of a user's own: torch skips the frames of nn.Sequential itself."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        down: Tensor = self.down(self.up(x).relu())
        return down


class Net(nn.Module):
    """A bit of everything that freezing concerns."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.norm = nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, 8)
        self.head: Any = nn.Sequential(nn.Linear(8, 4), nn.BatchNorm1d(4))

    def forward(self, x: Tensor) -> Tensor:
        pooled = self.norm(self.conv(x)).relu().mean((2, 3))
        output: Tensor = self.head(self.fc(pooled).relu())
        return output


def _net() -> Net:
    net = Net()
    for _ in range(3):  # statistics that are not the initial ones
        net(torch.randn(4, 3, 6, 6) * 2 + 1)
    return net


def _snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def _train(model: nn.Module, steps: int = 3, lr: float = 0.05) -> None:
    model.train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=lr)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(4, 3, 6, 6)).square().sum().backward()
        optimizer.step()


def _same(model: nn.Module, before: dict[str, Tensor]) -> bool:
    now = model.state_dict()
    return list(now) == list(before) and all(torch.equal(now[name], tensor) for name, tensor in before.items())


# ---- no trace --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"target_modules": ["conv", "fc"]},
        {"bias": "all"},
        {"bias": "oft_only"},
        {"modules_to_save": ["head"]},
        {"modules_to_save": ["head", "norm"], "bias": "all"},
    ],
)
@pytest.mark.parametrize("trained", [False, True])
def test_unload_leaves_the_base_and_no_trace(options: dict[str, Any], trained: bool) -> None:
    model = _net()
    model.fc.weight.requires_grad_(False)
    before, x = _snapshot(model), torch.randn(2, 3, 6, 6)
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    attributes = {name: set(m.__dict__) for name, m in model.named_modules()}
    classes = [type(m) for m in model.modules()]
    output = model.eval()(x)
    inject(model, OFTConfig(**{"oft_block_size": 3 if "conv" in str(options) else 4, **options}))
    randomize(model)
    if trained:
        _train(model)
        assert relative(model.eval()(x), output) > 1e-3
    unload(model)
    assert _same(model, before)
    assert torch.equal(model.eval()(x), output)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    assert [type(m) for m in model.modules()] == classes
    assert {name: set(m.__dict__) for name, m in model.named_modules()} == attributes
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert oft_layers(model) == {}
    model.train()
    assert all(m.training for m in model.modules())


pytestmark = pytest.mark.filterwarnings("ignore:block sizes adjusted")


def test_flags_come_back_also_where_another_adapter_was_chosen_last() -> None:
    model = _net()
    model.head[0].bias.requires_grad_(False)
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    inject(model, OFTConfig(oft_block_size=4, bias="all", exclude_modules=r"head\..*"))
    with pytest.warns(UserWarning, match="'plain' is not active"):
        inject(model, OFTConfig(oft_block_size=4, exclude_modules=r"head\..*"), "plain")
    assert model.head[0].bias.requires_grad
    set_adapter(model, "plain")
    assert not model.head[0].bias.requires_grad
    unload(model)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags


def test_again_after_unload_is_as_the_first_time() -> None:
    model, x = _net(), torch.randn(2, 3, 6, 6)
    for _ in range(2):
        names = inject(model, OFTConfig(oft_block_size=4, modules_to_save=["head"]))
        assert names == ["fc"]
        _train(model)
        trained = model.eval()(x)
        merge(model)
        assert relative(model(x), trained) < 1e-5
        unload(model)
        assert relative(model(x), trained) < 1e-5


def test_injecting_again_is_harmless() -> None:
    model, x = _net(), torch.randn(2, 3, 6, 6)
    options = OFTConfig(oft_block_size=4, modules_to_save=["head"], bias="oft_only")
    inject(model, options)
    _train(model)
    expected, state = model.eval()(x), _snapshot(model)
    assert inject(model, options) == ["fc"]
    assert _same(model, state)
    assert torch.equal(model(x), expected)
    with disable_adapters(model):
        assert relative(model(x), expected) > 1e-3


def test_unload_without_merge_returns_the_base_and_with_it_the_trained_model() -> None:
    for merged in (False, True):
        model, x = _net(), torch.randn(2, 3, 6, 6)
        base = model.eval()(x)
        inject(model, OFTConfig(oft_block_size=4, modules_to_save=["head"], bias="all"))
        _train(model)
        trained = model.eval()(x)
        if merged:
            merge(model)
        unload(model)
        assert relative(model(x), trained if merged else base) < 1e-5
        assert relative(trained, base) > 1e-2


# ---- frozen means frozen ---------------------------------------------------------------------------------------------


def test_only_rotations_train_and_no_statistic_drifts() -> None:
    model = _net()
    inject(model, OFTConfig(oft_block_size=4))
    before = _snapshot(model)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {
        "fc.oft_R.default.weight",
        "head.0.oft_R.default.weight",
    }
    _train(model)
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {"fc.oft_R.default.weight", "head.0.oft_R.default.weight"}
    assert model.training
    assert not model.norm.training


@pytest.mark.parametrize("bias", ["all", "oft_only"])
def test_trained_biases_do_not_set_the_statistics_free(bias: str) -> None:
    model = _net()
    inject(model, OFTConfig(oft_block_size=4, bias=bias, exclude_modules=r"head\..*"))  # type: ignore[arg-type]
    before = _snapshot(model)
    _train(model)
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    every = {"conv.bias", "norm.bias", "head.0.bias", "head.1.bias"} if bias == "all" else set()
    # conv.bias stands before a batch norm in eval, so it has a gradient
    assert changed == {"fc.oft_R.default.weight", "fc.bias", *every}


def test_a_norm_in_modules_to_save_trains_its_statistics() -> None:
    model = _net()
    inject(model, OFTConfig(oft_block_size=4, modules_to_save=["head"]))
    before = _snapshot(model)
    _train(model)
    assert not torch.equal(model.head[1].running_mean, before["head.1.running_mean"])
    assert int(model.head[1].num_batches_tracked) == int(before["head.1.num_batches_tracked"]) + 3
    assert torch.equal(model.norm.running_mean, before["norm.running_mean"])  # type: ignore[arg-type]


def test_statistics_belong_to_the_adapter_that_trained_them() -> None:
    model = _net()
    base = _snapshot(model)
    inject(model, OFTConfig(oft_block_size=4, modules_to_save=["head"]))
    with pytest.warns(UserWarning, match="'plain' is not active"):
        inject(model, OFTConfig(oft_block_size=4, exclude_modules=r"head\..*"), "plain")
    _train(model)
    own = model.head[1].running_mean.clone()
    set_adapter(model, "plain")
    assert torch.equal(model.head[1].running_mean, base["head.1.running_mean"])
    assert not model.head[1].training
    _train(model)
    assert torch.equal(model.head[1].running_mean, base["head.1.running_mean"])
    set_adapter(model, "default")
    assert model.head[1].training
    assert torch.equal(model.head[1].running_mean, own)


def test_freeze_alone_is_undone_by_unload_and_idempotent() -> None:
    model = _net()
    freeze(walk(model))
    freeze(walk(model))
    assert not any(p.requires_grad for p in model.parameters())
    assert not model.train().norm.training
    unload(model)
    assert all(p.requires_grad for p in model.parameters())
    assert model.norm.training
    assert type(model.norm) is nn.BatchNorm2d


def test_a_frozen_norm_copies_and_prints_as_what_it_was() -> None:
    model = _net()
    inject(model, OFTConfig(oft_block_size=4))
    twin = copy.deepcopy(model).train()
    assert repr(twin.norm) == repr(_net().norm)
    assert not twin.norm.training
    unload(twin)
    assert type(twin.norm) is nn.BatchNorm2d
    assert twin.norm.training
    assert not model.train().norm.training


# ---- where rotations go ----------------------------------------------------------------------------------------------


def test_plain_checkpoints_still_load_and_rotations_are_beside() -> None:
    model, other = _net(), _net()
    inject(model, OFTConfig(oft_block_size=4))
    result = model.load_state_dict(other.state_dict(), strict=False)
    assert result.unexpected_keys == []
    assert result.missing_keys == ["fc.oft_R.default.weight", "head.0.oft_R.default.weight"]
    assert torch.equal(model.fc.weight, other.fc.weight)


def test_a_layer_under_two_names_gets_one_rotation_and_turns_once() -> None:
    shared = nn.Linear(8, 8)
    model, x = nn.ModuleDict({"a": shared, "b": nn.Sequential(shared)}), torch.randn(2, 8)
    assert inject(model, config(target_modules="all-linear")) == ["a"]
    randomize(model)
    trainable = [p for p in model.parameters() if p.requires_grad]
    assert len(trainable) == 1
    adapted = model["a"](x)
    assert torch.equal(model["b"](x), adapted)
    merge(model)
    assert relative(model["b"](x), adapted) < 1e-5
    unload(model)
    assert relative(model["b"](x), adapted) < 1e-5


def test_the_model_itself_may_be_the_layer() -> None:
    model, x = nn.Linear(8, 4), torch.randn(2, 8)
    assert inject(model, OFTConfig(oft_block_size=4)) == [""]
    randomize(model)
    expected = model(x)
    merge(model)
    assert relative(model(x), expected) < 1e-5


def test_rotations_follow_the_training_mode_and_the_device_of_their_layer() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)).eval()
    model[1].to("meta")
    inject(model, config(target_modules=["0", "1"]))
    first, second = (oft_layers(model)[name].oft_R["default"] for name in ("0", "1"))  # type: ignore[index]
    assert not first.training  # type: ignore[union-attr]
    assert (first.weight.device.type, second.weight.device.type) == ("cpu", "meta")  # type: ignore[union-attr]


def test_two_adapters_on_two_layers_are_both_active() -> None:
    model, x = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), torch.randn(2, 8)
    inject(model, config(target_modules=["0"]))
    inject(model, config(target_modules=["1"]), "second")
    randomize_each(model)
    base = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    base.load_state_dict({k: v for k, v in model.state_dict().items() if "oft_R" not in k})
    assert all(p.requires_grad == ("oft_R" in name) for name, p in model.named_parameters())
    for layers in ([], ["0"], ["1"]):
        assert relative(base(x), model(x)) > 1e-3
        assert layers is not None
    both = model(x)
    set_adapter(model, ["default", "second"])
    assert torch.equal(model(x), both)


def randomize_each(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if "oft_R" in name:
            nn.init.normal_(parameter, std=0.2)


# ---- modules_to_save and tied weights --------------------------------------------------------------------------------


def test_tied_modules_to_save_are_trained_and_switched_as_one() -> None:
    options: dict[str, Any] = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 24,
    }
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**options, vocab_size=32, tie_word_embeddings=True))
    ids = torch.randint(0, 32, (2, 5))
    base = model.eval()(ids).logits
    inject(model, config(target_modules=["q_proj"], modules_to_save=["lm_head", "embed_tokens"]))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    with torch.no_grad():
        model.lm_head.weight.add_(torch.randn_like(model.lm_head.weight) * 0.1)
    trained = model(ids).logits
    assert relative(trained, base) > 1e-2
    for _ in range(2):
        with disable_adapters(model):
            assert torch.equal(model(ids).logits, base)
        assert torch.equal(model(ids).logits, trained)
    unload(model)
    assert torch.equal(model(ids).logits, base)


# ---- torch.compile ---------------------------------------------------------------------------------------------------


# dynamo makes an instance of torch.autograd.Function to trace one, which torch deprecates
_dynamo = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")


@pytest.fixture
def _fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@_dynamo
@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize(("how", "backend"), [("inner", "aot_eager"), ("outer", "eager"), ("in_place", "eager")])
def test_compiled_code_sees_adapters_come_and_go(how: str, backend: str) -> None:
    model: Any = Body().eval() if how == "in_place" else nn.Sequential(Body(), nn.Linear(8, 8)).eval()
    x = torch.randn(3, 8)
    if how == "inner":
        model[0] = torch.compile(model[0], backend=backend)
    elif how == "outer":
        model = torch.compile(model, backend=backend)
    else:
        model.compile(backend=backend)
    base = model(x)
    for seed in (0, 1):
        names = inject(model, config(target_modules="all-linear"))
        assert names == (["up", "down"] if how == "in_place" else ["0.up", "0.down", "1"])
        assert relative(model(x), base) < 1e-6
        randomize(model, 0.2, seed=seed)
        adapted = model(x)
        assert relative(adapted, base) > 0.01
        plain = copy.deepcopy(getattr(model, "_orig_mod", model))
        with torch.compiler.set_stance("force_eager"):
            assert relative(adapted, plain(x)) < 1e-5
        with disable_adapters(model):
            assert relative(model(x), base) < 1e-6
        assert relative(model(x), adapted) < 1e-6
        model(x).sum().backward()
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
        merge(model)
        assert relative(model(x), adapted) < 1e-5
        unmerge(model)
        assert relative(model(x), adapted) < 1e-5
        unload(model)
        assert relative(model(x), base) < 1e-6


@_dynamo
@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize("kind", ["linear", "conv", "embedding"])
def test_adapted_layers_compile_into_one_graph(kind: str) -> None:
    layer, x = {
        "linear": (nn.Linear(8, 8), torch.randn(3, 8)),
        "conv": (nn.Conv2d(4, 4, 3), torch.randn(1, 4, 5, 5)),
        "embedding": (nn.Embedding(5, 8), torch.tensor([1, 2])),
    }[kind]
    model = nn.Sequential(layer, nn.ReLU())
    inject(model, config(target_modules=["0"]))
    randomize(model)
    expected = model(x)
    compiled: Any = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert relative(compiled(x), expected) < 1e-5
    compiled(x).sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    with torch.no_grad():
        assert relative(compiled.eval()(x), expected) < 1e-5
