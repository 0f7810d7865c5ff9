"""Frozen networks that look at pictures: a Judge names what it sees, an Embedder says how alike pictures and prompts are."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_oft.tasks.loading import load_companion, load_frozen


class FrozenNetwork:
    """An image model of transformers with its image processor; no part of the model that is trained, and on a device only
    from when it is asked until `to_memory`.

    Raises OSError, one line, when there is no such model, or no image processor, at `pretrained`.
    """

    def __init__(self, auto_class: Any, pretrained: str) -> None:
        from transformers import AutoImageProcessor

        self.pretrained, self.model = pretrained, load_frozen(auto_class, pretrained)
        self.processor = load_companion(AutoImageProcessor, pretrained, "image processor")

    def pixels(self, pictures: Sequence[Any], device: torch.device) -> Tensor:
        """Pillow images -> what the model takes, on the device, where the model is from now on."""
        self.model.to(device)
        pixels: Tensor = self.processor(list(pictures), return_tensors="pt")["pixel_values"].to(device)
        return pixels

    def to_memory(self) -> None:
        """Free the device."""
        self.model.cpu()


class Judge(FrozenNetwork):
    """An image classifier that reads off samples what their prompts asked for."""

    def __init__(self, pretrained: str) -> None:
        from transformers import AutoModelForImageClassification

        super().__init__(AutoModelForImageClassification, pretrained)
        self.names: dict[int, str] = self.model.config.id2label

    @torch.no_grad()
    def read(self, pictures: Sequence[Any], device: torch.device) -> list[str]:
        """Names of the classes that Pillow images show."""
        return [self.names[int(one)] for one in self.model(self.pixels(pictures, device)).logits.argmax(-1)]


class Embedder(FrozenNetwork):
    """A network whose vectors of alike pictures point the same way: DINO, CLIP, or any other of AutoModel.

    Raises OSError as FrozenNetwork, and where `reads_text` and the model embeds none.
    """

    def __init__(self, pretrained: str, reads_text: bool = False) -> None:
        from transformers import AutoModel, AutoTokenizer

        super().__init__(AutoModel, pretrained)
        if reads_text and not hasattr(self.model, "get_text_features"):
            raise OSError(f"{pretrained}: a {type(self.model).__name__} embeds no text; give a CLIP")
        self.tokenizer = load_companion(AutoTokenizer, pretrained, "tokenizer") if reads_text else None

    def embed(self, pictures: Sequence[Any], device: torch.device) -> Tensor:
        """Pillow images -> (B, D) float32: CLIP's image embeddings; else the class token of the last layer, as DINO's are
        compared, and the mean over all places where there is none."""
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            pixels = self.pixels(pictures, device)
            if hasattr(self.model, "get_image_features"):
                return _features(self.model.get_image_features(pixel_values=pixels))
            hidden: Tensor = self.model(pixel_values=pixels).last_hidden_state
            if hidden.ndim == 4:  # (B, D, h, w), of a convolutional network
                return hidden.mean((2, 3))
            names = (name for name, _ in self.model.named_parameters())
            return hidden[:, 0] if any(name.endswith("cls_token") for name in names) else hidden.mean(1)

    def embed_text(self, prompts: Sequence[str], device: torch.device) -> Tensor:
        """-> (B, D) float32, of a network that reads text; what is longer than it reads is cut off."""
        length = self.model.config.text_config.max_position_embeddings
        told: Any = self.tokenizer
        options = {"padding": "max_length", "truncation": True, "max_length": length}
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            tokens = told(list(prompts), return_tensors="pt", **options).to(device)
            return _features(self.model.to(device).get_text_features(**tokens))


def _features(answer: Any) -> Tensor:
    """Of a tensor, which older releases of transformers answer with, or of an output that holds it."""
    features: Tensor = getattr(answer, "pooler_output", answer)
    return features
