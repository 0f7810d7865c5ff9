from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    GPT2Config,
    GPT2LMHeadModel,
    GPT2Model,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTModel,
)

from lightning_oft.tasks.loading import load_pretrained

RESNET = ResNetConfig(num_channels=1, embedding_size=4, hidden_sizes=[4], depths=[1], num_labels=4)
VIT = ViTConfig(
    image_size=8, patch_size=4, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8
)
GPT2 = GPT2Config(vocab_size=8, n_positions=8, n_embd=8, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0)


@pytest.fixture
def images(tmp_path: Path) -> str:
    ResNetForImageClassification(RESNET).save_pretrained(tmp_path)
    return str(tmp_path)


def test_checkpoint_is_loaded_in_train_mode(images: str) -> None:
    model, new_head = load_pretrained(AutoModelForImageClassification, images)
    original = ResNetForImageClassification.from_pretrained(images)
    torch.testing.assert_close(model.state_dict(), original.state_dict())
    assert (new_head, model.dtype) == ([], torch.float32)
    assert all(module.training for module in model.modules())


def test_other_number_of_labels_is_a_new_head_and_is_said(images: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        model, new_head = load_pretrained(AutoModelForImageClassification, images, num_labels=7)
    assert (new_head, model.config.num_labels) == (["classifier.1"], 7)
    (line,) = [record.getMessage() for record in caplog.records if "new head" in record.getMessage()]
    assert "new head classifier.1 for 7 classes; OFT trains it whole unless oft.modules_to_save" in line


@pytest.mark.filterwarnings("error")
def test_backbone_without_a_head_gets_one(tmp_path: Path) -> None:
    ViTModel(VIT, add_pooling_layer=False).save_pretrained(tmp_path)
    assert load_pretrained(AutoModelForImageClassification, str(tmp_path))[1] == ["classifier"]


def test_language_model_has_no_head_to_replace(tmp_path: Path) -> None:
    GPT2LMHeadModel(GPT2).save_pretrained(tmp_path)
    model, new_head = load_pretrained(AutoModelForCausalLM, str(tmp_path), dtype="bfloat16", num_labels=None)
    assert (new_head, model.dtype) == ([], torch.bfloat16)


def test_missing_weights_that_are_no_head_are_a_warning(tmp_path: Path) -> None:
    model = GPT2Model(GPT2)
    state = {name: value for name, value in model.state_dict().items() if name != "h.0.mlp.c_fc.weight"}
    model.save_pretrained(tmp_path, state_dict=state)
    with pytest.warns(UserWarning, match=r"1 weights are not in the checkpoint and start random: .*c_fc.weight$"):
        assert load_pretrained(AutoModelForCausalLM, str(tmp_path))[1] == []


@pytest.mark.parametrize("pretrained", ["/no/such/model", "./nothing", "a/b/c"])
def test_missing_folder_is_one_line(pretrained: str) -> None:
    with pytest.raises(FileNotFoundError, match=r"^[^\n]*: no such folder; pretrained is one written by[^\n]*$"):
        load_pretrained(AutoModelForCausalLM, pretrained)


@pytest.mark.parametrize("auto", [AutoModelForCausalLM, AutoModelForImageClassification])
def test_folder_without_such_a_model_is_one_line(tmp_path: Path, auto: Any) -> None:
    with pytest.raises(
        OSError, match=rf"^[^\n]*{auto.__name__} could not load a model \([^\n]*\); give a folder[^\n]*$"
    ):
        load_pretrained(auto, str(tmp_path))
