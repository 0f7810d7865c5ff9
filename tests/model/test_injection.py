"""Going in and coming out: what is adapted, that deleting takes one adapter, and that no trace of the last one stays."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from layer_cases import config, randomize, relative
from norm_net import batch, changed, flags, net, same, snapshot, train, trainable
from torch import Tensor, nn

from lightning_oft import (
    OFTConfig,
    delete_adapter,
    disable_adapters,
    inject,
    merge,
    oft_layers,
    set_adapter,
    unload,
    unmerge,
)
from lightning_oft.layers import state_of
from lightning_oft.model.saved_modules import saved_tensors
from lightning_oft.model.traversal import adapter_names, walk

pytestmark = pytest.mark.filterwarnings("ignore:block sizes adjusted")


class Body(nn.Module):
    """Two layers of a user's own: torch skips the frames of nn.Sequential itself."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        down: Tensor = self.down(self.up(x).relu())
        return down


# ---- in --------------------------------------------------------------------------------------------------------------


def test_injecting_again_is_harmless() -> None:
    model, x = net(), batch()
    options = OFTConfig(oft_block_size=4, modules_to_save=["head"], bias="oft_only")
    inject(model, options)
    train(model)
    expected, state = model.eval()(x), snapshot(model)
    assert inject(model, options) == ["fc"]
    assert same(model, state)
    assert torch.equal(model(x), expected)


def test_plain_checkpoints_still_load_and_rotations_are_beside() -> None:
    model, other = net(), net()
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
    assert len(trainable(model)) == 1
    adapted = model["a"](x)
    assert torch.equal(model["b"](x), adapted)
    merge(model)
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
    first, second = (layer.oft_R["default"] for layer in oft_layers(model).values())  # type: ignore[index]
    assert not first.training  # type: ignore[union-attr]
    assert (first.weight.device.type, second.weight.device.type) == ("cpu", "meta")  # type: ignore[union-attr]


def test_two_adapters_on_two_layers_are_both_active() -> None:
    model, x = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), torch.randn(2, 8)
    base = model(x)
    inject(model, config(target_modules=["0"]))
    inject(model, config(target_modules=["1"]), "second")
    randomize(model[0], 0.2)
    one = model(x)
    randomize(model[1], 0.2, "second")
    both = model(x)
    assert relative(one, base) > 1e-3
    assert relative(both, one) > 1e-3
    assert all(trains == ("oft_R" in name) for name, trains in flags(model).items())
    set_adapter(model, ["default", "second"])
    assert torch.equal(model(x), both)


# ---- out -------------------------------------------------------------------------------------------------------------

OWNING: list[dict[str, Any]] = [
    {"oft_block_size": 3, "target_modules": ["conv", "fc"]},
    {"bias": "all"},
    {"modules_to_save": ["head"], "bias": "oft_only"},
    {"modules_to_save": ["head", "norm"], "bias": "all"},
]


@pytest.mark.parametrize("options", OWNING, ids=str)
@pytest.mark.parametrize("how", ["unload", "delete_adapter"])
def test_without_a_merge_the_base_stays_and_no_trace(options: dict[str, Any], how: str) -> None:
    model, x = net(), batch()
    model.fc.weight.requires_grad_(False)
    before, were = snapshot(model), flags(model)
    attributes = {name: set(m.__dict__) for name, m in model.named_modules()}
    classes = [type(m) for m in model.modules()]
    output = model.eval()(x)
    for _ in range(2):  # the second time is as the first
        inject(model, OFTConfig(**{"oft_block_size": 4, **options}))
        train(model)
        assert relative(model.eval()(x), output) > 1e-3
        unload(model) if how == "unload" else delete_adapter(model, "default")
        assert same(model, before)
        assert torch.equal(model.eval()(x), output)
        assert flags(model) == were
        assert [type(m) for m in model.modules()] == classes
        assert {name: set(m.__dict__) for name, m in model.named_modules()} == attributes
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
        assert oft_layers(model) == {}
    assert all(m.training for m in model.train().modules())


def test_after_a_merge_the_trained_model_stays() -> None:
    model, x = net(), batch()
    inject(model, OFTConfig(oft_block_size=4, modules_to_save=["head"], bias="all"))
    train(model)
    trained = model.eval()(x)
    merge(model)
    unload(model)
    assert relative(model(x), trained) < 1e-5
    assert all(flags(model).values())
    unload(model)  # nothing to do


# ---- delete_adapter --------------------------------------------------------------------------------------------------


def _two(**options: Any) -> Any:
    """`one` trains the head and the biases, `two` another layer too; `one` is active."""
    model = net()
    exclude = r"head\..*"
    inject(model, OFTConfig(oft_block_size=4, modules_to_save=["head"], bias="all", exclude_modules=exclude), "one")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        targets = options.pop("target_modules", ["fc"])
        inject(model, OFTConfig(oft_block_size=4, target_modules=targets, exclude_modules=exclude, **options), "two")
    randomize(model, 0.2, "two", seed=3)
    return model


def test_deleting_a_silent_adapter_changes_nothing_for_the_active_one() -> None:
    model, x = _two(bias="all"), batch()
    set_adapter(model, "one", trainable=[])
    before, were = model.eval()(x), flags(model)
    delete_adapter(model, "two")
    assert torch.equal(model(x), before)
    assert flags(model) == {name: trains for name, trains in were.items() if ".two." not in name}
    assert adapter_names(walk(model)) == ["one"]
    with pytest.raises(ValueError, match="no adapter 'two' here; there are: one"):
        delete_adapter(model, "two")


def test_deleting_the_active_adapter_returns_what_it_trained_and_the_next_one_acts() -> None:
    model, x = _two(), batch()
    set_adapter(model, "two")
    expected, values = model.eval()(x), snapshot(model)
    set_adapter(model, "one")
    train(model)
    assert {"head.1.running_mean", "conv.bias", "fc.bias"} <= changed(model, values)
    with pytest.warns(UserWarning, match="adapter 'one' was active and is deleted; 'two' is active now"):
        delete_adapter(model, "one")
    assert torch.equal(model.eval()(x), expected)
    assert all("one" not in saved.slot.owners for saved in saved_tensors(walk(model)))
    assert trainable(model) == {"fc.oft_R.two.weight"}
    assert not model.train().head[1].training  # its statistics are the base's again
    unload(model)
    assert all(flags(model).values())


def test_the_next_adapters_own_values_come_back() -> None:
    model, x = _two(bias="all"), batch()
    set_adapter(model, "two")
    train(model)
    expected, were = model.eval()(x), trainable(model)
    set_adapter(model, "one")
    with pytest.warns(UserWarning, match="'two' is active now"):
        delete_adapter(model, "one")
    assert torch.equal(model(x), expected)
    assert trainable(model) == were


def test_of_several_active_adapters_the_others_stay_active() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    for name, targets in (("a", ["0"]), ("b", ["0", "1"]), ("c", ["1"])):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            inject(model, config(target_modules=targets), name)
    set_adapter(model, ["c", "a", "b"], trainable="c")
    delete_adapter(model, "a")
    assert [state.active for layer in model if (state := state_of(layer))] == [["b"], ["c", "b"]]
    assert trainable(model) == {"1.oft_R.c.weight"}
    delete_adapter(model, "b")
    assert list(oft_layers(model)) == ["1"]
    assert type(model[0]) is nn.Linear
    assert not model[0]._forward_pre_hooks


def test_another_is_deleted_where_two_that_act_train_one_head() -> None:
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(3)))
    for name, target in (("one", "0"), ("two", "1")):
        inject(model, config(target_modules=[target], modules_to_save=["2"]), name)
    with pytest.warns(UserWarning, match="'three' is not active on 0"):
        inject(model, config(target_modules=["0"]), "three")
    delete_adapter(model, "three")
    assert adapter_names(walk(model)) == ["one", "two"]
    assert [slot.live for _, _, slot in saved_tensors(walk(model))] == ["one", "one"]


def test_where_the_deleted_adapter_alone_acted_the_active_one_takes_over() -> None:
    """Injected beside another, an adapter acts only where it is alone; then it is alone everywhere."""
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    inject(model, config(target_modules=["0"]), "a")
    with pytest.warns(UserWarning, match="'b' is not active on 0"):
        inject(model, config(target_modules="all-linear"), "b")
    delete_adapter(model, "a")
    assert [state.active for layer in model if (state := state_of(layer))] == [["b"], ["b"]]
    assert trainable(model) == {"0.oft_R.b.weight", "1.oft_R.b.weight"}


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
@pytest.mark.parametrize("how", ["inner", "in_place"])
def test_compiled_code_sees_adapters_come_and_go(how: str) -> None:
    model: Any = Body().eval() if how == "in_place" else nn.Sequential(Body(), nn.Linear(8, 8)).eval()
    x = torch.randn(3, 8)
    if how == "inner":
        model[0] = torch.compile(model[0], backend="eager")
    else:
        model.compile(backend="eager")
    base = model(x)
    names = inject(model, config(target_modules="all-linear"))
    assert names == (["up", "down"] if how == "in_place" else ["0.up", "0.down", "1"])
    assert relative(model(x), base) < 1e-6
    randomize(model, 0.2)
    adapted = model(x)
    assert relative(adapted, base) > 0.01
    plain = copy.deepcopy(model)
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


LAYERS = {"linear": nn.Linear(8, 8), "conv": nn.Conv2d(4, 4, 3), "embedding": nn.Embedding(5, 8)}


@_dynamo
@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize("kind", LAYERS)
def test_adapted_layers_compile_into_one_graph(kind: str) -> None:
    x = {"linear": torch.randn(3, 8), "conv": torch.randn(1, 4, 5, 5), "embedding": torch.tensor([1, 2])}[kind]
    model = nn.Sequential(copy.deepcopy(LAYERS[kind]), nn.ReLU())
    inject(model, config(target_modules=["0"]))
    randomize(model)
    expected = model(x)
    compiled: Any = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert relative(compiled(x), expected) < 1e-5
    compiled(x).sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    with torch.no_grad():
        assert relative(compiled.eval()(x), expected) < 1e-5


def test_deleting_an_adapter_leaves_the_choice_of_every_layer() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)).eval(), torch.randn(3, 8)
    for name, targets in (("first", ["0"]), ("second", ["0", "1"]), ("third", ["1"])):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*is not active on")
            inject(model, OFTConfig(oft_block_size=4, target_modules=targets, init_weights=False), name)
    before, trains = model(x), {n for n, p in model.named_parameters() if p.requires_grad}
    delete_adapter(model, "third")
    assert torch.equal(model(x), before)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == trains
