"""Models that are fused, cast, offloaded, quantized or saved after an injection: right, or one line that helps."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from accelerate import cpu_offload
from accelerate.hooks import remove_hook_from_module
from layer_cases import config, randomize, relative
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from torch.nn.utils.fusion import fuse_conv_bn_eval

from lightning_oft import OFTConfig, inject, load_adapter, merge, oft_layers, save_adapter, unload, unmerge
from lightning_oft.layers import Rotation

X = torch.randn(3, 8)


def _adapted(*layers: nn.Module, **options: Any) -> nn.Sequential:
    model = nn.Sequential(*layers).eval()
    targets = [str(index) for index in range(len(layers))]
    inject(model, config(**{"target_modules": targets, "use_cayley_neumann": False, **options}))
    randomize(model)
    return model


# ---- fused -------------------------------------------------------------------------------------------------------------


class ModelMixin(nn.Module):
    """Named as the base class of diffusers' models."""


class Fusable(ModelMixin):
    """Fuses its projections as diffusers' attention does: a new layer of their weights, which stay."""

    def __init__(self) -> None:
        super().__init__()
        self.to_q, self.to_k, self.to_out = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False), nn.Linear(16, 4)
        self.fused_projections = False

    @torch.no_grad()
    def fuse_qkv_projections(self) -> None:
        self.to_qk = nn.Linear(8, 16, bias=False)
        self.to_qk.weight.copy_(torch.cat([self.to_q.weight.data, self.to_k.weight.data]))
        self.fused_projections = True

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.to_qk(x) if self.fused_projections else torch.cat([self.to_q(x), self.to_k(x)], -1)
        return self.to_out(hidden)  # type: ignore[no-any-return]


class FusableAttention(nn.Module):
    """A part whose projections can be fused by themselves, as diffusers' attention modules have it."""

    to_qk: nn.Linear

    def __init__(self) -> None:
        super().__init__()
        self.to_q, self.to_k = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)

    @torch.no_grad()
    def fuse_projections(self) -> None:
        self.to_qk = nn.Linear(8, 16, bias=False)
        self.to_qk.weight.copy_(torch.cat([self.to_q.weight.data, self.to_k.weight.data]))

    def forward(self, x: Tensor) -> Tensor:
        return self.to_qk(x) if hasattr(self, "to_qk") else torch.cat([self.to_q(x), self.to_k(x)], -1)


PROJECTIONS = {"target_modules": ["to_q", "to_k", "to_out"]}


def test_projections_of_an_adapted_model_are_not_fused_before_it_is_merged() -> None:
    model = Fusable()
    inject(model, config(**PROJECTIONS))
    randomize(model)
    adapted = model(X)
    with pytest.raises(
        RuntimeError, match=r"^Fusable: fuse_qkv_projections\(\) .* base weights.*call merge\(model\) first"
    ):
        model.fuse_qkv_projections()
    assert torch.equal(model(X), adapted)
    merge(model)
    model.fuse_qkv_projections()
    assert relative(model(X), adapted) < 1e-5


def test_one_attention_is_not_fused_before_it_is_merged_either() -> None:
    model = nn.Sequential(FusableAttention(), nn.Linear(16, 4), FusableAttention())
    inject(model, config(target_modules=["0.to_q", "0.to_k"]))
    randomize(model)
    adapted, part = model[:2](X), model[0]
    with pytest.raises(RuntimeError, match=r"^FusableAttention: fuse_projections\(\) .*call merge\(model\) first"):
        part.fuse_projections()  # type: ignore[operator]
    model[2].fuse_projections()  # type: ignore[operator]  # nothing below it is adapted
    merge(model)
    assert type(part) is FusableAttention
    part.fuse_projections()
    assert relative(model[:2](X), adapted) < 1e-5


def test_copies_of_projections_that_were_fused_take_no_adapter_and_the_remedy_works() -> None:
    """Unfusing takes them away, and neither it nor a file would take their rotations along, merged or not."""
    model = Fusable()
    model.fuse_qkv_projections()
    model.to_kv = model.to_qk  # type: ignore[assignment]
    del model.to_qk
    with pytest.raises(ValueError, match=r"^to_kv: a copy of projections that were fused.*unfuse_qkv.*exclude_modules"):
        inject(model, config(target_modules="all-linear"))
    assert not oft_layers(model)
    model.fused_projections = False
    del model.to_kv
    inject(model, config(**PROJECTIONS, exclude_modules=["to_kv"]))
    randomize(model)
    adapted = model(X)
    merge(model)
    model.fuse_qkv_projections()
    assert relative(model(X), adapted) < 1e-5


def test_projections_that_were_fused_before_are_named_in_the_first_forward(caplog: pytest.LogCaptureFixture) -> None:
    model = Fusable()
    model.fuse_qkv_projections()
    inject(model, config(**PROJECTIONS))
    model(X)
    assert ["to_q, to_k: not called in the model's first forward" in message for message in caplog.messages] == [True]
    unload(model)
    caplog.clear()
    inject(model, config(**PROJECTIONS, exclude_modules=["to_q", "to_k"]))
    model(X)
    assert caplog.messages == []


def test_a_batch_norm_is_fused_into_an_adapted_convolution() -> None:
    model, x = _adapted(nn.Conv2d(4, 6, 3)), torch.randn(2, 4, 5, 5)
    norm = nn.BatchNorm2d(6).eval()
    norm.running_mean.normal_()  # type: ignore[union-attr]
    expected = norm(model(x))
    fused = nn.Sequential(fuse_conv_bn_eval(model[0], norm))
    assert relative(fused(x), expected) < 1e-5
    merge(fused)
    assert relative(fused(x), expected) < 1e-5


# ---- cast --------------------------------------------------------------------------------------------------------------


def _cast_layer_by_layer(model: nn.Module) -> None:
    """Weights kept in float8 between forwards, as diffusers' layerwise casting does it by a forward on the instance."""
    for layer in model.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            layer.forward = _Casting(layer, layer.forward)  # type: ignore[method-assign]
            layer.to(torch.float8_e4m3fn)


class _Casting:
    def __init__(self, layer: nn.Module, forward: Any) -> None:
        self.layer, self.forward = layer, forward

    def __call__(self, *args: Any) -> Any:
        self.layer.to(torch.float32)
        try:
            return self.forward(*args)
        finally:
            self.layer.to(torch.float8_e4m3fn)


@pytest.mark.filterwarnings("ignore:the forward of .* was replaced on the instance")
@pytest.mark.parametrize("first", ["inject", "cast"])
@pytest.mark.parametrize(("layer", "x"), [(nn.Linear(8, 6), X), (nn.Conv2d(4, 6, 3), torch.randn(2, 4, 5, 5))])
def test_layers_kept_in_float8_train_and_are_not_merged_into_it(layer: nn.Module, x: Tensor, first: str) -> None:
    model = nn.Sequential(copy.deepcopy(layer))
    steps: list[Callable[[], Any]] = [
        lambda: inject(model, config(target_modules=["0"], use_cayley_neumann=False)),
        lambda: _cast_layer_by_layer(model),
    ]
    for step in steps if first == "inject" else reversed(steps):
        step()
    randomize(model)
    rotations = [module for module in model.modules() if isinstance(module, Rotation)]
    assert [rotation.weight.dtype for rotation in rotations] == [torch.float32]
    model(x).square().sum().backward()
    assert all(bool(rotation.weight.grad.any()) for rotation in rotations)  # type: ignore[union-attr]
    with pytest.raises(ValueError, match=r"the weights of 0 are quantized or packed.*save_merged"):
        merge(model)
    expected = model(x)
    del model[0].forward  # type: ignore[attr-defined]
    model.float()
    merge(model)
    assert relative(model(x), expected) < 1e-5


# ---- offloaded ---------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:PEFT cannot represent")
def test_an_offloaded_model_computes_with_its_rotations_and_says_why_it_cannot_be_merged_or_saved(
    tmp_path: Path,
) -> None:
    model, x = _adapted(nn.Conv1d(8, 8, 1), nn.Flatten(), nn.Linear(8, 6), target_modules=["0", "2"]), X[..., None]
    expected = model(x).detach()
    cpu_offload(model, execution_device=torch.device("cpu"))
    assert all(parameter.is_meta for parameter in model.parameters())
    assert torch.equal(model(x), expected)
    for leave in (lambda: merge(model), lambda: save_adapter(model, tmp_path)):
        with pytest.raises(
            ValueError, match=r"0, 2 are on the meta device, not loaded or offloaded.*remove_hook_from_module"
        ):
            leave()  # type: ignore[no-untyped-call]
    remove_hook_from_module(model, recurse=True)
    save_adapter(model, tmp_path)
    merge(model)
    assert relative(model(x), expected) < 1e-5


def test_an_offloaded_layer_is_not_adapted_before_it_is_back() -> None:
    model = nn.Sequential(nn.Linear(8, 6))
    cpu_offload(model, execution_device=torch.device("cpu"))
    with pytest.raises(ValueError, match=r"^0: its tensors are offloaded .*remove_hook_from_module"):
        inject(model, config(target_modules=["0"]))
    remove_hook_from_module(model, recurse=True)
    assert inject(model, config(target_modules=["0"])) == ["0"]
    cpu_offload(model, execution_device=torch.device("cpu"))
    assert model(X).shape == (3, 6)


# ---- quantized, reparametrized -----------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated", "ignore:torch.quantize_per_tensor")
@pytest.mark.parametrize("kind", [nn.Linear, nn.Embedding])
def test_a_model_that_was_quantized_without_its_rotations_says_so(kind: type[nn.Module]) -> None:
    model, x = (
        (_adapted(nn.Linear(8, 6)), X) if kind is nn.Linear else (_adapted(nn.Embedding(11, 8)), torch.tensor([1, 2]))
    )
    expected = model(x)
    quantization: Any = torch.ao.quantization
    wanted = {nn.Linear} if kind is nn.Linear else {nn.Embedding: quantization.float_qparams_weight_only_qconfig}
    quantized = quantization.quantize_dynamic(model, wanted)
    with pytest.raises(RuntimeError, match=r"was made of an adapted layer without its rotations.*call merge\(model\)"):
        quantized(x)
    merge(model)
    unload(model)
    assert relative(quantization.quantize_dynamic(model, wanted)(x), expected) < 0.05


class Rectified(nn.Linear):
    """Computes from another weight than it has."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight.relu(), self.bias)


class Dropping(nn.Linear):
    """The arithmetic of its class, and a dropout that a trial must not take for another."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(nn.functional.dropout(x, 0.5, self.training))


@pytest.mark.parametrize(
    ("layer", "cls", "reason"),
    [
        (nn.Linear(8, 8), Rectified, "the forward that was put on it does not compute the same"),
        (nn.Conv2d(8, 8, 1), nn.Conv2d, "its class was changed to Conv2d after the injection"),
    ],
)
def test_a_class_that_was_changed_later_is_named_by_a_merge(layer: Any, cls: type[nn.Module], reason: str) -> None:
    model = _adapted(layer)
    layer.__class__ = cls
    before = layer.weight.clone()
    with pytest.raises(ValueError, match=f"cannot merge 0: {reason}"):
        merge(model)
    assert torch.equal(layer.weight, before)


def test_a_class_of_ones_own_that_computes_the_same_is_merged_in_training_too() -> None:
    model = _adapted(Dropping(8, 8))
    before = model(X)
    merge(model.train())
    torch.testing.assert_close(model.eval()(X), before)


@pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning", "ignore:`torch.jit.script:FutureWarning")
@pytest.mark.parametrize("targets", [["0", "1"], ["0"]])
def test_torch_script_takes_no_rotations(targets: list[str]) -> None:
    model = nn.Sequential(nn.Linear(8, 8), torch.jit.script(nn.Linear(8, 8)))  # type: ignore[no-untyped-call]
    with pytest.raises(ValueError, match=r"^1: TorchScript, which takes no rotations .* script it after a merge"):
        inject(model, config(target_modules=targets))
    assert not oft_layers(model)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_lazy_head_is_named_before_anything_is_frozen() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.LazyLinear(4))
    with pytest.raises(ValueError, match=r"^1: its shape is not known yet: run one batch through the model first"):
        inject(model, config(target_modules=["0"]))
    assert not oft_layers(model)
    assert all(parameter.requires_grad for parameter in model.parameters())
    model(X)
    assert inject(model, config(target_modules=["0"])) == ["0"]


def test_a_weight_norm_that_came_later_trains_with_its_rotations_and_is_named_by_a_merge() -> None:
    model = _adapted(nn.Linear(8, 6))
    expected = model(X)
    parametrizations.weight_norm(model[0])
    assert relative(model(X), expected) < 1e-5
    with pytest.raises(
        ValueError, match=r"cannot merge 0: its weight is parametrized: call .*remove_parametrizations first"
    ):
        merge(model)
    parametrize.remove_parametrizations(model[0], "weight")
    merge(model)
    assert relative(model(X), expected) < 1e-5


# ---- saved -------------------------------------------------------------------------------------------------------------


def _bert() -> nn.Module:
    sizes: dict[str, Any] = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 24,
    }
    return transformers.BertModel(transformers.BertConfig(**sizes, vocab_size=32, max_position_embeddings=16)).eval()


class Embedder(nn.Module):
    """Saves the model inside it, as sentence-transformers does."""

    def __init__(self) -> None:
        super().__init__()
        self.auto_model: Any = _bert()

    def forward(self, ids: Tensor) -> Tensor:
        return self.auto_model(ids).last_hidden_state.mean(1)  # type: ignore[no-any-return]

    def save(self, directory: Path) -> None:
        self.auto_model.save_pretrained(directory)


def _save_as_a_trainer_does(model: Any, directory: Path) -> None:
    model.save_pretrained(directory, state_dict=model.state_dict())


SAVES: dict[str, tuple[Callable[[], nn.Module], Callable[[Any, Path], None]]] = {
    "transformers": (_bert, lambda model, directory: model.save_pretrained(directory)),
    "sentence_transformers": (Embedder, lambda model, directory: model.save(directory)),
    "trainer": (_bert, _save_as_a_trainer_does),
}


@pytest.mark.parametrize(("build", "save"), SAVES.values(), ids=SAVES)
def test_saving_an_unmerged_library_model_says_that_the_rotations_are_dropped(
    build: Callable[[], nn.Module], save: Callable[[Any, Path], None], tmp_path: Path
) -> None:
    ids, model = torch.arange(8).view(2, 4), build()
    inject(model, OFTConfig(oft_block_size=4, target_modules="all-linear", use_cayley_neumann=False))
    randomize(model, 0.3)
    inner: Any = getattr(model, "auto_model", model)
    expected = inner(ids).last_hidden_state
    with pytest.warns(
        UserWarning, match=r"BertModel.save_pretrained: the rotations are not merged.*save_adapter.*save_merged"
    ):
        save(model, tmp_path / "dropped")
    save_adapter(model, tmp_path / "adapter")
    again: Any = transformers.BertModel.from_pretrained(tmp_path / "dropped").eval()
    assert relative(again(ids).last_hidden_state, expected) > 1e-3
    load_adapter(again, tmp_path / "adapter")
    assert relative(again(ids).last_hidden_state, expected) < 1e-6
    merge(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        save(model, tmp_path / "merged")
    again = transformers.BertModel.from_pretrained(tmp_path / "merged").eval()
    assert relative(again(ids).last_hidden_state, expected) < 1e-5


class ModelHubMixin(nn.Module):
    """Named as huggingface_hub's, whose from_pretrained passes over keys that it does not know."""

    def save_pretrained(self) -> None:
        """Would write."""


def test_a_module_of_the_hubs_mixin_speaks_up_too() -> None:
    model = ModelHubMixin()
    model.layer = nn.Linear(8, 8)
    inject(model, config())
    with pytest.warns(UserWarning, match="ModelHubMixin.save_pretrained: the rotations are not merged"):
        model.save_pretrained()


def test_a_library_model_stays_what_it_is_in_every_other_way() -> None:
    model: Any = _bert()
    cls = type(model)
    inject(model, OFTConfig(oft_block_size=4, target_modules="all-linear"))
    assert isinstance(model, cls)
    assert (type(model).__name__, type(model).__module__) == (cls.__name__, cls.__module__)
    assert not hasattr(model, "fuse_qkv_projections")
    for taken in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert list(oft_layers(taken)) == list(oft_layers(model))
        with pytest.warns(UserWarning, match="not merged"), pytest.raises(TypeError):
            taken.save_pretrained()
    merge(model)
    assert type(model) is cls
    unmerge(model)
    assert type(model) is not cls
    unload(model)
    assert type(model) is cls
