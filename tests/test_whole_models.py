"""Whole models as people use them: every rotation gets a gradient, and with the adapter on, eval scores what trains."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import transformers
from layer_cases import randomize, relative
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from lightning_oft import OFTConfig, inject, merge, oft_layers, unload, unmerge
from lightning_oft.layers import rotations_of

pytestmark = pytest.mark.filterwarnings("ignore:block sizes adjusted")

NO_DROPOUT: dict[str, Any] = {"attention_dropout": 0.0, "dropout": 0.0, "activation_dropout": 0.0}
TEXT: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": 32,
}
VISION: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
IMAGES = (2, 3, 16, 16)


class Whole(NamedTuple):
    """A model without dropout, its inputs, and what its loss is computed from."""

    build: Callable[[], nn.Module]
    inputs: Callable[[], dict[str, Any]]
    output: Callable[[Any], Tensor]
    targets: str | list[str] = "all-linear"
    block_size: int = 4

    def config(self) -> OFTConfig:
        return OFTConfig(oft_block_size=self.block_size, target_modules=self.targets)


def _gpt2() -> nn.Module:
    sizes: dict[str, Any] = {"n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": 32, "n_positions": 16}
    rates: dict[str, Any] = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, **rates))


def _llama() -> nn.Module:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**TEXT, num_key_value_heads=1))


def _convnext() -> nn.Module:
    config = transformers.ConvNextConfig(
        hidden_sizes=[8, 12], depths=[1, 2], num_stages=2, patch_size=2, image_size=16, layer_scale_init_value=1.0
    )
    return transformers.ConvNextForImageClassification(config)


def _sam() -> nn.Module:
    config = transformers.SamVisionConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=4, output_channels=8,
        mlp_dim=24, initializer_range=0.1, num_pos_feats=8, window_size=2, global_attn_indexes=[1], attention_dropout=0.0,
    )  # fmt: skip
    return transformers.SamVisionModel(config)


def _clip() -> nn.Module:
    vision = {**VISION, "image_size": 16, "patch_size": 4, "projection_dim": 8}
    text = {**TEXT, "max_position_embeddings": 8, "projection_dim": 8, "bos_token_id": 1, "eos_token_id": 31}
    return transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=8))


def _whisper() -> nn.Module:
    layers: dict[str, Any] = {
        "encoder_layers": 1,
        "decoder_layers": 1,
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 2,
    }
    sizes: dict[str, Any] = {
        "d_model": 16,
        "encoder_ffn_dim": 24,
        "decoder_ffn_dim": 24,
        "vocab_size": 32,
        "num_mel_bins": 4,
    }
    tokens: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    positions: dict[str, Any] = {"max_source_positions": 10, "max_target_positions": 8}
    config = transformers.WhisperConfig(**layers, **sizes, **tokens, **positions, **NO_DROPOUT)
    return transformers.WhisperForConditionalGeneration(config)


def _encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(16, 2, 24, batch_first=True, dropout=0.0)
    return nn.TransformerEncoder(layer, 2)


def _transformer() -> nn.Module:
    return nn.Transformer(16, 2, 1, 1, 24, dropout=0.0, batch_first=True)


def _ids() -> Tensor:
    return torch.randint(3, 31, (2, 6))


def _sentence() -> Tensor:
    """Ends with the token that CLIP reads the sentence at."""
    return torch.cat([_ids(), torch.full((2, 1), 31)], 1)


def _similarity(output: Any) -> Tensor:
    return torch.cat([output.logits_per_image, output.text_embeds @ output.image_embeds.T])


WHOLE: dict[str, Whole] = {
    "gpt2": Whole(_gpt2, lambda: {"input_ids": _ids()}, lambda o: o.logits),
    "llama": Whole(_llama, lambda: {"input_ids": _ids()}, lambda o: o.logits),
    "llama_embedding": Whole(
        _llama, lambda: {"input_ids": _ids()}, lambda o: o.logits, ["embed_tokens", "lm_head", "down_proj"]
    ),
    "convnext": Whole(_convnext, lambda: {"pixel_values": torch.randn(IMAGES)}, lambda o: o.logits),
    "convnext_convolutions": Whole(
        _convnext,
        lambda: {"pixel_values": torch.randn(IMAGES)},
        lambda o: o.logits,
        ["patch_embeddings", "dwconv", "pwconv1", "downsampling_layer.1"],
        block_size=8,  # 7 for the depthwise 7x7 kernels
    ),
    "sam": Whole(_sam, lambda: {"pixel_values": torch.randn(IMAGES)}, lambda o: o.last_hidden_state),
    "clip": Whole(_clip, lambda: {"input_ids": _sentence(), "pixel_values": torch.randn(IMAGES)}, _similarity),
    "whisper": Whole(
        _whisper,
        lambda: {"input_features": torch.randn(2, 4, 20), "decoder_input_ids": _ids()},
        lambda o: o.logits,
    ),
    "encoder": Whole(_encoder, lambda: {"src": torch.randn(2, 5, 16)}, lambda o: o),
    "transformer": Whole(
        _transformer, lambda: {"src": torch.randn(2, 5, 16), "tgt": torch.randn(2, 4, 16)}, lambda o: o
    ),
}

whole = pytest.mark.parametrize("case", WHOLE.values(), ids=WHOLE)


def _injected(case: Whole) -> tuple[nn.Module, Callable[[], Tensor]]:
    model, inputs = case.build(), case.inputs()
    inject(model, case.config())
    return model, lambda: case.output(model(**inputs))


@whole
def test_every_rotation_gets_a_gradient_and_training_lowers_the_loss(case: Whole) -> None:
    model, run = _injected(case)
    assert oft_layers(model)
    model.train()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=2e-3)
    target = torch.randn_like(run())
    losses = []
    for step in range(8):
        optimizer.zero_grad()
        loss = (run() - target).square().mean()
        loss.backward()
        losses.append(float(loss.detach()))
        if step == 1:
            for name, layer in oft_layers(model).items():
                for part, rotation in rotations_of(layer, "default").items():
                    gradient = rotation.weight.grad
                    assert gradient is not None, f"{name} {part}"
                    assert float(gradient.abs().max()) > 0, f"{name} {part}"
        optimizer.step()
    assert losses[-1] < losses[0]
    assert all(p.grad is None for name, p in model.named_parameters() if "oft_R" not in name)


@whole
def test_identity_eval_scores_what_trains_merge_and_the_way_back(case: Whole) -> None:
    model, inputs = case.build().eval(), case.inputs()
    names, classes = list(model.state_dict()), [type(m) for m in model.modules()]

    def run() -> Tensor:
        return case.output(model(**inputs))

    with torch.no_grad():
        base = run()
        inject(model, case.config())
        assert relative(run(), base) < 1e-6
        randomize(model, 0.2)
        model.train()
        trained = run()
        model.eval()
        adapted = run()
        assert relative(trained, base) > 1e-3
        assert relative(adapted, trained) < 1e-5
    for mode in (torch.enable_grad, torch.inference_mode):
        with mode():
            assert relative(run(), trained) < 1e-5
    with torch.no_grad():
        merge(model)
        assert relative(run(), adapted) < 2e-5
        assert list(model.state_dict()) == names
        unmerge(model)
        assert torch.equal(run(), adapted)
        unload(model)
        assert torch.equal(run(), base)
    assert [type(m) for m in model.modules()] == classes


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage")
@pytest.mark.parametrize("targets", ["all-linear", ["linear2"]], ids=str)
def test_a_padded_batch_in_eval_scores_the_model_that_trains(targets: str | list[str]) -> None:
    model, x = _encoder(), torch.randn(3, 6, 16)
    padding = torch.arange(6) >= torch.tensor([[6], [4], [2]])
    model.eval()
    with torch.no_grad():
        assert float(model(x, src_key_padding_mask=padding)[2, 3].abs().max()) == 0  # packed, so padding comes out 0
    inject(model, OFTConfig(oft_block_size=4, target_modules=targets))
    randomize(model, 0.3)
    trained = model.train()(x, src_key_padding_mask=padding)
    model.eval()
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            assert relative(model(x, src_key_padding_mask=padding), trained) < 1e-5
    merge(model)
    with torch.no_grad():
        assert relative(model(x, src_key_padding_mask=padding)[~padding], trained[~padding]) < 1e-5


def test_gradient_checkpointing_changes_no_gradient() -> None:
    model, run = _injected(WHOLE["llama"])
    randomize(model, 0.2)
    model.train()
    run().square().sum().backward()
    plain = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    layers: Any = model.model.layers  # type: ignore[union-attr]
    for index, layer in enumerate(layers):
        layers[index] = checkpoint_wrapper(layer)
    run().square().sum().backward()
    assert plain
    for name, gradient in plain.items():
        torch.testing.assert_close(dict(model.named_parameters())[_inside(name)].grad, gradient)


def _inside(name: str) -> str:
    return re.sub(r"(layers\.\d+)\.", r"\1._checkpoint_wrapped_module.", name)


def test_autocast_trains_float32_generators() -> None:
    model, run = _injected(WHOLE["llama"])
    randomize(model, 0.1)
    full = run()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = run()
        mixed.float().square().sum().backward()
    assert relative(mixed, full) < 5e-2
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters() if p.requires_grad)
