from torch import nn
from transformers import ResNetConfig, ResNetForImageClassification, ViTConfig, ViTModel

from lightning_oft.tasks.sharding import blocks


def names(model: nn.Module) -> list[str]:
    found = blocks(model)
    return [name for name, module in model.named_modules() if module in found]


def test_blocks_are_what_transformers_declares() -> None:
    config = ViTConfig(hidden_size=8, num_hidden_layers=3, num_attention_heads=2, intermediate_size=8)
    assert names(ViTModel(config)) == [f"layers.{i}" for i in range(3)]  # a single ViTEmbeddings is left to the rest


def test_blocks_of_a_resnet_are_its_layers() -> None:
    config = ResNetConfig(embedding_size=4, hidden_sizes=[4], depths=[2], layer_type="basic")
    found = blocks(ResNetForImageClassification(config))
    assert {type(block).__name__ for block in found} == {"ResNetConvLayer"}


def test_without_a_declaration_the_members_of_the_outermost_lists_are_blocks() -> None:
    inner = [nn.Sequential(nn.Linear(2, 2)) for _ in range(4)]
    model = nn.Sequential(nn.ModuleList([nn.ModuleList(inner[:2]), nn.ModuleList(inner[2:])]), nn.Linear(2, 2))
    assert names(model) == ["0.0.0", "0.0.1", "0.1.0", "0.1.1"]
