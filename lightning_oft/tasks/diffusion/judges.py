"""Judge: an image classifier that reads off samples what their prompts asked for."""

from collections.abc import Sequence
from typing import Any

import torch

from lightning_oft.tasks.loading import load_pretrained, local_path


class Judge:
    """A frozen image classifier of transformers with its image processor; no part of the model that is trained.

    Raises OSError, one line, when there is no image classifier at `pretrained`.
    """

    def __init__(self, pretrained: str) -> None:
        from transformers import AutoImageProcessor, AutoModelForImageClassification

        self.model, _ = load_pretrained(AutoModelForImageClassification, pretrained)
        self.model.eval()
        processors: Any = AutoImageProcessor
        self.processor = processors.from_pretrained(local_path(pretrained), trust_remote_code=False)
        self.names: dict[int, str] = self.model.config.id2label

    @torch.no_grad()
    def read(self, pictures: Sequence[Any], device: torch.device) -> list[str]:
        """Names of the classes that Pillow images show."""
        pixels = self.processor(list(pictures), return_tensors="pt")["pixel_values"].to(device)
        return [self.names[int(one)] for one in self.model.to(device)(pixels).logits.argmax(-1)]
