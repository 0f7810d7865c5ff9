"""Mixtures of experts: exact at injection, trained, merged, saved and loaded, in every layout and every implementation."""

from __future__ import annotations

import copy
import functools
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import transformers
from layer_cases import EXPERTS, Mixture, randomize, relative
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, MixtralConfig
from transformers.models.llama4.modeling_llama4 import Llama4TextExperts
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from lightning_oft import (
    OFTConfig,
    OFTFinetuning,
    inject,
    load_adapter,
    merge,
    oft_layers,
    register_layer_type,
    save_adapter,
    save_merged,
    unload,
    unmerge,
)
from lightning_oft.functional import rotation_angle
from lightning_oft.layers import Experts, rotations_of

TEXT: dict[str, Any] = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 32,
    "num_key_value_heads": 2, "head_dim": 8, "num_experts_per_tok": 2, "initializer_range": 0.3,
}  # fmt: skip
SMALL: dict[str, Any] = {"moe_intermediate_size": 12, "n_routed_experts": 4, "n_group": 1, "topk_group": 1}
LATENT: dict[str, Any] = {
    "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8,
}  # fmt: skip
LAYOUTS: dict[str, dict[str, Any]] = {
    "Mixtral": {"num_local_experts": 4},
    "Qwen3Moe": {"num_experts": 4, "moe_intermediate_size": 12},
    "DeepseekV3": {**SMALL, **LATENT, "first_k_dense_replace": 1, "n_shared_experts": 1, "head_dim": 4},
    "GptOss": {"num_local_experts": 4, "layer_types": ["sliding_attention", "full_attention"]},
    "NemotronH": {
        **SMALL, "layers_block_type": ["moe", "attention"], "moe_shared_expert_intermediate_size": 12, "moe_latent_size": 8,
    },
}  # fmt: skip
layouts = pytest.mark.parametrize("layout", LAYOUTS)
IDS = torch.randint(3, 31, (4, 16), generator=torch.Generator().manual_seed(0))
CONFIG = OFTConfig(oft_block_size=4)
pytestmark = pytest.mark.filterwarnings("ignore:PEFT cannot represent the rotations of")


def build(layout: str, implementation: str = "grouped_mm", dtype: torch.dtype = torch.float32) -> Any:
    options = {key: value for key, value in TEXT.items() if layout != "NemotronH" or key != "num_hidden_layers"}
    config = getattr(transformers, f"{layout}Config")(**{**options, **LAYOUTS[layout]})
    torch.manual_seed(0)
    model = getattr(transformers, f"{layout}ForCausalLM")(config).to(dtype).eval()
    for parameter in model.parameters():  # NemotronH begins with experts that are next to nothing
        if parameter.dim() == 3:
            nn.init.normal_(parameter, std=0.3)
    model.set_experts_implementation(implementation)
    return model


def logits(model: Any) -> Tensor:
    found: Tensor = model(input_ids=IDS).logits
    return found


def experts_of(model: nn.Module) -> dict[str, Any]:
    return {name: layer for name, layer in oft_layers(model).items() if name.endswith(".experts")}


@layouts
def test_exact_at_injection_and_every_implementation_trains_every_rotation_alike(layout: str) -> None:
    gradients: list[dict[str, Tensor]] = []
    for implementation in ("grouped_mm", "batched_mm", "eager"):
        model = build(layout, implementation)
        with torch.no_grad():
            silent = logits(model)
        recorded = logits(model)
        inject(model, CONFIG)
        assert experts_of(model)
        assert torch.equal(logits(model), recorded)
        with torch.no_grad():
            assert torch.equal(logits(model), silent)
        randomize(model, 0.2)
        logits(model).square().mean().backward()
        trained = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
        assert all(gradient is not None and bool(gradient.any()) for gradient in trained.values())
        gradients.append(trained)  # type: ignore[arg-type]
    for name, gradient in gradients[0].items():
        assert all(relative(other[name], gradient) < 1e-4 for other in gradients[1:]), name


@layouts
def test_merged_is_as_trained_and_unmerge_returns_the_weights_to_the_bit(layout: str) -> None:
    for dtype, implementation, bound in (
        (torch.float32, "grouped_mm", 1e-5),
        (torch.float64, "batched_mm", 1e-12),
        (torch.float64, "eager", 1e-12),
    ):
        model = build(layout, implementation, dtype)
        base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        plain = logits(model)
        inject(model, OFTConfig(oft_block_size=4, use_cayley_neumann=False))
        randomize(model, 0.2)
        adapted = logits(model)
        assert relative(adapted, plain) > 0.05
        merge(model)
        assert relative(logits(model), adapted) < bound
        assert list(model.state_dict()) == list(base)
        unmerge(model)
        assert torch.equal(logits(model), adapted)
        unload(model)
        assert all(torch.equal(tensor, base[name]) for name, tensor in model.state_dict().items())


@layouts
def test_a_file_and_a_merged_directory_give_the_same_logits(layout: str, tmp_path: Path) -> None:
    model = build(layout)
    base = copy.deepcopy(model)
    inject(model, CONFIG)
    randomize(model, 0.2)
    expected = logits(model)
    with pytest.warns(
        UserWarning, match=r"PEFT cannot represent the rotations of .*experts.* PEFT will load the adapter w"
    ):
        save_adapter(model, tmp_path / "adapter")
    load_adapter(base, tmp_path / "adapter")
    assert torch.equal(logits(base), expected)
    save_merged(model, tmp_path / "merged")
    assert torch.equal(logits(model), expected)
    assert relative(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()), expected) < 1e-5


class Lit(pl.LightningModule):
    """A mixture that learns to say nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.model = build("Mixtral").train()

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss: Tensor = self.model(input_ids=batch).logits.square().mean()
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], 0.05, weight_decay=0.0)


def fit(folder: Path, epochs: int, ckpt: Any = None, **options: Any) -> tuple[Lit, pl.Trainer]:
    oft = OFTFinetuning(oft_block_size=4, use_cayley_neumann=False, **options)
    run = pl.Trainer(
        max_epochs=epochs, callbacks=[oft], accelerator="cpu", devices=1, logger=False, enable_progress_bar=False,
        enable_model_summary=False, enable_checkpointing=False, default_root_dir=folder,
    )  # fmt: skip
    task = Lit()
    run.fit(task, DataLoader(IDS, 4), ckpt_path=ckpt, weights_only=None)  # type: ignore[arg-type]
    return task, run


@pytest.mark.parametrize("limit", [{"max_angle": 2.0}, {"coft": True, "eps": 4e-3}], ids=["max_angle", "coft"])
def test_a_fit_holds_experts_in_the_constraint_and_resumes_to_the_bit(
    limit: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first, run = fit(tmp_path, 1, merge_on_fit_end=False, **limit)
    assert [line for line in caplog.messages if "10 layers (8 linear, 2 experts)" in line]
    run.save_checkpoint(tmp_path / "one.ckpt")
    whole, _ = fit(tmp_path, 2, merge_on_fit_end=False, **limit)
    resumed, _ = fit(tmp_path, 2, tmp_path / "one.ckpt", merge_on_fit_end=False, **limit)
    found = experts_of(whole)
    assert len(found) == 2
    for name, layer in found.items():
        for part, rotation in rotations_of(layer, "default").items():
            assert rotation.radius is not None
            norms = 2**0.5 * rotation.weight.detach().norm(dim=1)
            assert float(norms.max()) == pytest.approx(rotation.radius, rel=1e-3)  # as far as it may
            if "max_angle" in limit:
                assert float(rotation_angle(rotation.matrix().detach()).max()) <= 2.001
            again = rotations_of(experts_of(resumed)[name], "default")[part]
            assert torch.equal(again.weight, rotation.weight)
    assert not torch.equal(logits(first.model), logits(whole.model))


def test_all_linear_says_what_it_finds_and_what_it_leaves(caplog: pytest.LogCaptureFixture) -> None:
    model = build("DeepseekV3")
    with caplog.at_level(logging.INFO):
        names = inject(model, CONFIG)
    assert "target_modules='all-linear' finds linear (16 layers), experts (1 layer)" in caplog.messages
    routers = "leaves out model.layers.1.mlp.gate: they choose the experts of each token"
    assert [line for line in caplog.messages if routers in line]
    mlp = "model.layers.1.mlp"
    assert {f"{mlp}.experts", *(f"{mlp}.shared_experts.{part}_proj" for part in ("gate", "up", "down"))} <= {*names}


class Block(nn.Module):
    """A mixture whose router is a linear layer, as in many models' own code."""

    def __init__(self, experts: nn.Module) -> None:
        super().__init__()
        self.router, self.up = nn.Linear(16, 4), nn.Linear(16, 16)
        self.experts = experts

    def forward(self, x: Tensor) -> Tensor:
        weights, chosen = self.router(x).softmax(-1).topk(2)
        mixed: Tensor = self.experts(self.up(x), chosen, weights)
        return mixed


def test_a_linear_router_is_left_out_and_may_be_named() -> None:
    assert inject(Block(Mixture(MixtralExperts, MixtralConfig(**EXPERTS), "eager").layer), CONFIG) == ["up", "experts"]
    named = OFTConfig(oft_block_size=4, target_modules=["router"])
    assert inject(Block(Mixture(MixtralExperts, MixtralConfig(**EXPERTS), "eager").layer), named) == ["router"]


def _packed(experts: Any) -> None:
    experts.down_proj = nn.Parameter(experts.down_proj.data.to(torch.float8_e4m3fn), requires_grad=False)


def _renamed(experts: Any) -> None:
    experts.gate_up_proj_blocks, experts.gate_up_proj = experts.gate_up_proj, None


def _unflagged(experts: Any) -> None:
    del experts.is_transposed


def _misflagged(experts: Any) -> None:
    experts.is_transposed = True


def _gated(experts: Any) -> None:
    experts.gate_proj = nn.Parameter(torch.randn(4, 24, 16))


def _spread(experts: Any) -> None:
    experts._is_expert_parallel = True


def _hooked(experts: Any) -> None:
    experts.forward = functools.partial(experts.forward)


REFUSED: dict[str, tuple[Callable[[Any], None], str]] = {
    "float8": (_packed, "quantized or packed: load the base without quantization"),
    "mxfp4": (_renamed, "quantized or packed"),
    "unknown": (
        _unflagged,
        r"nothing says how a MixtralExperts stores its experts \(gate_up_proj \(4, 48, 16\), down_proj \(4, 16, 24\)\): "
        r"say it with register_layer_type\(MixtralExperts, like=Experts\(is_transposed=...\)\)",
    ),
    "contradicting": (
        _misflagged,
        "not known .* is_transposed=True.*: add it to exclude_modules, or register a LayerType",
    ),
    "three weights": (_gated, "not known .* is_transposed=False"),
    "hooked": (_hooked, "its forward was replaced on the instance"),
    "expert parallel": (_spread, "cut by tensor or expert parallelism"),
}


@pytest.mark.parametrize(("change", "reason"), REFUSED.values(), ids=REFUSED)
def test_what_is_not_understood_is_refused_by_name_and_left_by_all_linear(
    change: Callable[[Any], None], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = Block(Mixture(MixtralExperts, MixtralConfig(**EXPERTS), "eager").layer)
    change(model.experts)
    with pytest.raises(ValueError, match=rf"selects what cannot be adapted: experts: .*{reason}"):
        inject(model, OFTConfig(oft_block_size=4, target_modules=["experts"]))
    with caplog.at_level(logging.INFO):
        assert inject(model, CONFIG) == ["up"]
    assert [line for line in caplog.messages if "leaves out experts: " in line]


class Own(MixtralExperts):
    """Does more with its input than its experts do."""

    def forward(self, hidden_states: Tensor, *args: Any) -> Tensor:
        mixed: Tensor = super().forward(hidden_states.tanh(), *args)
        return mixed + hidden_states


class Routed(nn.Module):
    """Llama 4's experts, which get a batch for each of them and say nothing of how they are stored."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = Llama4TextExperts(transformers.Llama4TextConfig(**EXPERTS))
        for parameter in self.parameters():
            nn.init.normal_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        mixed: Tensor = self.layer(x.repeat(4, 1))
        return mixed


@pytest.fixture
def llama4() -> Iterator[None]:
    with register_layer_type(Llama4TextExperts, like=Experts(is_transposed=True)):
        yield


@pytest.mark.usefixtures("llama4")
@pytest.mark.parametrize(
    "make", [lambda: Mixture(Own, MixtralConfig(**EXPERTS), "batched_mm"), Routed], ids=["own forward", "registered"]
)
def test_a_forward_that_nobody_knows_runs_on_rotated_weights(make: Callable[[], nn.Module]) -> None:
    model, x = make(), torch.randn(6, 16)
    plain = model(x)
    inject(model, OFTConfig(oft_block_size=4, target_modules=["layer"]))
    assert torch.equal(model(x), plain)
    randomize(model, 0.2)
    adapted = model(x)
    adapted.square().sum().backward()
    assert all(bool(p.grad.any()) for p in model.parameters() if p.requires_grad)  # type: ignore[union-attr]
    assert relative(adapted, plain) > 0.05
    merge(model)
    assert relative(model(x), adapted) < 1e-5


@pytest.mark.filterwarnings(r"ignore:Unexpected keyword arguments \['lightning_oft'\]:UserWarning")
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_peft_computes_what_it_knows_of_a_file(tmp_path: Path) -> None:
    """Its OFT has no field for parameters of a module; the linear layers of the same file are read."""
    peft = pytest.importorskip("peft", "0.21.2")
    assert not hasattr(peft.OFTConfig(), "target_parameters")
    model = build("Mixtral")
    base = copy.deepcopy(model)
    inject(model, CONFIG)
    randomize(model, 0.2)
    save_adapter(model, tmp_path)
    assert len(experts_of(model)) == 2
    for layer in experts_of(model).values():
        for rotation in rotations_of(layer, "default").values():
            nn.init.zeros_(rotation.weight)
    assert relative(logits(peft.PeftModel.from_pretrained(base, tmp_path)), logits(model)) < 1e-5
