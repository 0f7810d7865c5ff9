"""Magnitude fitting: one scale per output neuron beside a rotation, W' = diag(m) W R^T."""

from __future__ import annotations

import copy
import itertools
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from layer_cases import KINDS, config, randomize, relative
from quantized import KINDS as QUANTIZED
from quantized import llama, logits, rotate
from small import Small, inputs, loader, oft, trainer
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from lightning_oft import (
    OFTConfig,
    delete_adapter,
    disable_adapters,
    inject,
    load_adapter,
    load_from_checkpoint,
    merge,
    oft_layers,
    project,
    save_adapter,
    save_merged,
    set_adapter,
    unload,
    unmerge,
)
from lightning_oft.formats import read_adapter
from lightning_oft.formats.checkpoint_file import CheckpointError
from lightning_oft.layers.state import every_rotation
from lightning_oft.model.adapter_state import take

UNFIT = ("embedding_1d", "experts", "experts_transposed")
FIT = {name: case for name, case in KINDS.items() if name not in UNFIT}
cases = pytest.mark.parametrize("case", FIT.values(), ids=FIT)
pytestmark = [
    pytest.mark.filterwarnings("ignore:block sizes adjusted"),
    pytest.mark.filterwarnings("ignore:PEFT cannot represent"),
]


def scales(model: nn.Module, std: float = 0.3) -> list[nn.Parameter]:
    """The magnitudes of all layers, made random."""
    own = [one for layer in oft_layers(model).values() for one in every_rotation(layer)]
    found = [one.magnitude for one in own if one.magnitude is not None]
    for magnitude in found:
        nn.init.normal_(magnitude, std=std)
    return found


@cases
def test_two_adapters_start_exactly_train_and_merge_to_what_they_compute(case: Any) -> None:
    for dtype, bound in ((torch.float32, 1e-5), (torch.bfloat16, 3e-2)):
        base = case.build().to(dtype).eval()
        model, x = copy.deepcopy(base), [one.to(dtype) if one.is_floating_point() else one for one in case.inputs()]
        inject(model, config(magnitude="joint"))
        for train, grad in itertools.product((False, True), repeat=2):
            with torch.set_grad_enabled(grad):
                assert torch.equal(model.train(train)(*x), base.train(train)(*x))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            inject(model, config(magnitude="joint"), "second")
        for seed, name in enumerate(("default", "second")):
            randomize(model, adapter_name=name, seed=seed)
        rotated = model(*x)
        own = scales(model)
        set_adapter(model, ["second", "default"])
        adapted = model(*x)
        assert relative(adapted, rotated) > 0.05
        adapted.float().square().sum().backward()
        assert all(one.grad is not None and one.grad.any() for one in own)
        for keep in ("always", "never"):
            merge(model, keep_base=keep)  # type: ignore[arg-type]
            assert relative(model(*x), adapted) < bound
            unmerge(model)
            assert relative(model(*x), adapted) < (bound if keep == "never" else 1e-30)
        unload(model)
        assert relative(model(*x), base(*x)) < bound


@pytest.mark.parametrize("case", [KINDS[name] for name in UNFIT], ids=UNFIT)
def test_layers_without_neurons_to_scale_are_refused_untouched(case: Any) -> None:
    model = case.build()
    with pytest.raises(
        ValueError, match=r"^layer: magnitude='joint', and nothing scales the neurons of \w+ layers; leave"
    ):
        inject(model, config(magnitude="joint"))
    assert not oft_layers(model)


class _Doubled(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


def test_a_layer_whose_forward_does_more_than_its_class_is_scaled_by_its_weight() -> None:
    model = nn.Sequential(_Doubled(8, 4))
    inject(model, OFTConfig(oft_block_size=4, target_modules=["0"], magnitude="joint"))
    scales(model)
    x = torch.randn(3, 8)
    adapted = model(x)
    merge(model)
    torch.testing.assert_close(model(x), adapted)


def test_a_forward_on_the_instance_that_a_scale_would_not_reach_is_refused() -> None:
    layer = nn.Linear(8, 4)
    forward, model = layer.forward, nn.Sequential(layer)
    layer.forward = lambda input: 2 * forward(input)  # type: ignore[method-assign]
    plain = OFTConfig(oft_block_size=4, target_modules=["0"])
    with pytest.raises(ValueError, match="forward"):
        inject(model, OFTConfig(oft_block_size=4, target_modules=["0"], magnitude="joint"))
    assert inject(model, plain) == ["0"]


def _net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 4)).eval()


def _config(**options: Any) -> OFTConfig:
    return OFTConfig(oft_block_size=2, target_modules=["0", "2"], **options)


def test_the_hook_is_there_only_while_an_adapter_has_magnitudes() -> None:
    model, x = _net(), torch.randn(3, 8)
    inject(model, _config())
    assert not any(layer._forward_hooks for layer in oft_layers(model).values())
    with pytest.warns(UserWarning, match="not active"):
        inject(model, _config(magnitude="joint"), "scaled")
    scales(model)
    set_adapter(model, ["default", "scaled"])
    both = model(x)
    set_adapter(model, "default")
    plain = model(x)
    assert relative(both, plain) > 0.01
    with disable_adapters(model):
        assert torch.equal(model(x), _net()(x))
    delete_adapter(model, "scaled")
    assert torch.equal(model(x), plain)
    assert not any(layer._forward_hooks for layer in oft_layers(model).values())


def test_projection_leaves_magnitudes_alone() -> None:
    model = _net()
    inject(model, _config(magnitude="joint", max_angle=1.0))
    randomize(model, std=1.0)
    before = [one.detach().clone() for one in scales(model, std=5.0)]
    project(model)
    after = [one.magnitude for layer in oft_layers(model).values() for one in every_rotation(layer)]
    assert all(torch.equal(*pair) for pair in zip(before, after, strict=True))


@pytest.mark.parametrize("kind", ["attention", "linear_3d", "conv_transpose2d_groups"])
def test_files_and_another_model_take_magnitudes_over(kind: str, tmp_path: Path) -> None:
    case, magnitude = KINDS[kind], "joint"
    model = case.build().eval()
    base, x = copy.deepcopy(model), case.inputs()
    inject(model, config(magnitude=magnitude))
    randomize(model)
    scales(model)
    with pytest.warns(UserWarning, match=r"PEFT cannot represent .* cannot load this adapter"):
        save_adapter(model, tmp_path)
    load_adapter(base, tmp_path)
    assert torch.equal(base(*x), model(*x))
    state, again = take(model), read_adapter(tmp_path)
    assert again.config == state.config
    assert again.known_to_peft() == state.known_to_peft() == []
    load_adapter(base, tmp_path)  # over itself
    assert torch.equal(base(*x), model(*x))


def test_magnitudes_of_another_model_or_none_are_refused(tmp_path: Path) -> None:
    model = _net()
    inject(model, _config(magnitude="joint"))
    randomize(model)
    save_adapter(model, tmp_path)
    wide = nn.Sequential(nn.Linear(8, 10), nn.Tanh(), nn.Linear(6, 4))
    with pytest.raises(ValueError, match=r"has 10 neurons to scale, the file 6 magnitudes"):
        load_adapter(wide, tmp_path, ignore_mismatched_base=True)
    assert not oft_layers(wide)
    plain = _net()
    inject(plain, _config())
    with pytest.raises(ValueError, match="magnitude is None there and 'joint' in the file"):
        load_adapter(plain, tmp_path)


def test_fitted_afterwards_they_train_alone_and_start_from_the_rotations(tmp_path: Path) -> None:
    model, x = _net(), torch.randn(3, 8)
    inject(model, _config())
    randomize(model)
    save_adapter(model, tmp_path)
    again = _net()
    load_adapter(again, tmp_path, magnitude="after")
    assert torch.equal(again(x), model(x))
    trained = [name for name, one in again.named_parameters() if one.requires_grad]
    assert trained == ["0.oft_R.default.magnitude", "2.oft_R.default.magnitude"]
    set_adapter(again, "default")
    assert trained == [name for name, one in again.named_parameters() if one.requires_grad]


def test_a_fit_trains_rotations_then_magnitudes_and_both_resume(tmp_path: Path) -> None:
    first = Small()
    trainer(tmp_path, oft(export_dir=str(tmp_path / "first"))).fit(first, loader(), loader(shuffle=False))
    module = Small()
    start = {"pretrained_adapter": str(tmp_path / "first/adapter"), "magnitude": "after", "merge_on_fit_end": False}
    end = trainer(tmp_path, oft(**start))
    end.fit(module, loader(), loader(shuffle=False))
    state, theirs = take(module), read_adapter(tmp_path / "first/adapter")
    for name, one in state.layers.items():
        assert torch.equal(one.generators[""], theirs.layers[name.removeprefix(f"{theirs.root}.")].generators[""])
        assert one.magnitudes[""].any()
    end.save_checkpoint(tmp_path / "last.ckpt")
    found = load_from_checkpoint(Small, tmp_path / "last.ckpt")
    x = inputs()[0]
    assert torch.equal(found(x), module.eval()(x))
    resumed = trainer(tmp_path, oft(**start), max_epochs=2)
    resumed.fit(Small(), loader(), loader(shuffle=False), ckpt_path=tmp_path / "last.ckpt")
    assert resumed.global_step == 16


def test_what_a_file_does_not_have_given_beside_it_is_refused(tmp_path: Path) -> None:
    model = Small()
    with pytest.warns(UserWarning, match="PEFT cannot represent"):
        trainer(tmp_path, oft(magnitude="joint", export_dir=str(tmp_path / "one"))).fit(
            model, loader(), loader(shuffle=False)
        )
    wrong = trainer(tmp_path, oft(magnitude=None, pretrained_adapter=str(tmp_path / "one/adapter")))
    with pytest.raises(ValueError, match="magnitude=None"):
        wrong.fit(Small(), loader(), loader(shuffle=False))


class _Loose(Small):
    strict_loading = False


@pytest.mark.parametrize(("mine", "theirs", "says"), [("joint", None, "has"), (None, "joint", "lacks")])
def test_a_checkpoint_with_magnitudes_goes_on_with_them_alone(
    mine: str | None, theirs: str | None, says: str, tmp_path: Path
) -> None:
    run = trainer(tmp_path, oft(magnitude=mine, merge_on_fit_end=False))
    run.fit(_Loose(), loader(), loader(False))
    run.save_checkpoint(tmp_path / "last.ckpt")
    other = trainer(tmp_path, oft(magnitude=theirs))
    with pytest.raises(CheckpointError, match=rf"another one: it {says} net.0.oft_R.default.magnitude, net.3"):
        other.validate(_Loose(), loader(False), ckpt_path=tmp_path / "last.ckpt")


@pytest.mark.parametrize("kind", QUANTIZED)
def test_quantized_bases(kind: str, tmp_path: Path) -> None:
    model = llama(kind)
    inject(model, OFTConfig(oft_block_size=8, magnitude="joint"))
    plain = logits(model)
    rotate(model)
    scales(model)
    adapted = logits(model)
    assert relative(adapted, plain) > 0.05
    save_merged(model, tmp_path)
    assert relative(logits(LlamaForCausalLM.from_pretrained(tmp_path).train()), adapted) < 1e-2
