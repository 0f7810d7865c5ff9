"""Encoders: the parts of a pipeline that make latents of pictures and embeddings of prompts."""

import inspect
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from hashlib import sha256
from typing import Any

import torch
from torch import Tensor, nn

from lightning_oft.model.fingerprint import checksum
from lightning_oft.tasks.diffusion import pipelines
from lightning_oft.tasks.diffusion.encoded_rows import EncodedRows

Encode = Callable[[Sequence[int]], dict[str, Tensor]]


class Encoders:
    """Autoencoder and text encoders of a pipeline as training calls them.

    With a `cache_dir` each picture and each prompt is encoded once and read from there afterwards, as long as what
    encodes it is frozen. Of a picture that is the distribution of its latents, which are drawn anew each time. The parts
    that `offload` names are on the device only while they encode. Raises ValueError where the pipeline has no such part,
    or `cache_dir` is a file.
    """

    def __init__(self, pipeline: Any, family: pipelines.Family, cache_dir: str | None, offload: Sequence[str]) -> None:
        self.pipeline, self.family = pipeline, family
        self.texts = [name for name in pipelines.module_names(pipeline) if name.startswith("text_encoder")]
        encoders = ["vae", *self.texts]
        if wrong := [name for name in offload if name not in encoders]:
            raise ValueError(
                f"offload={wrong[0]!r}: must be among {', '.join(encoders)}; the others train, or are none"
            )
        self.offloaded: list[nn.Module] = [getattr(pipeline, name) for name in offload]
        self.tokenizers = pipelines.tokenizers(pipeline)
        longest = inspect.signature(pipeline.encode_prompt).parameters.get("max_sequence_length")
        # The last tokenizer is that of the encoder which reads most.
        self.limit = min(self.tokenizers[-1].model_max_length, longest.default if longest else sys.maxsize)
        """Tokens of a prompt that the pipeline reads."""
        self.rows = None if cache_dir is None else EncodedRows(cache_dir)
        self.keys: dict[tuple[str, ...], str] = {}
        """By names of parts, what tells their weights from others; see `forget_weights`."""

    def forget_weights(self) -> None:
        """To be called where the weights of frozen parts may be others than before."""
        self.keys = {}

    @torch.no_grad()
    def latents(self, pixels: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """pixels: (B, 3, H, W) in [-1, 1] -> latents (B, C, h, w) as the denoiser takes them.

        Raises ValueError where the autoencoder, or the patches of the denoiser, take no pictures of that size.
        """
        side = pipelines.picture_multiple(self.pipeline, self.family)
        if any(length % side for length in pixels.shape[-2:]):
            height, width = pixels.shape[-2:]
            fits = " or ".join(map(str, sorted({max(side, height // side * side), -(-height // side) * side})))
            raise ValueError(
                f"pixel_values: pictures of {height} x {width} pixels; the pipeline takes multiples of {side}: set the size "
                f"of the data to {fits}"
            )

        def encode(places: Sequence[int]) -> dict[str, Tensor]:
            with self.on_device(pixels.device):
                return {"moments": pipelines.encode_pictures(self.pipeline.vae, pixels[list(places)])}

        encoded = self._encoded(("vae",), pixels, encode, pixels.device)
        return pipelines.drawn_latents(self.pipeline.vae, encoded["moments"].to(pixels.device), generator)

    def conditions(self, prompts: Sequence[str], pixels: Tensor) -> dict[str, Any]:
        """What the denoiser is told: its keyword arguments for these prompts and pictures (B, 3, H, W).

        A prompt that is longer than what the pipeline reads is a warning that names it.
        """
        tokens = [[tokenizer(prompt, verbose=False).input_ids for tokenizer in self.tokenizers] for prompt in prompts]
        too_long = {
            prompt: len(ids[-1]) for prompt, ids in zip(prompts, tokens, strict=True) if len(ids[-1]) > self.limit
        }
        for prompt, count in too_long.items():
            start = prompt if len(prompt) <= 60 else f"{prompt[:60]}..."
            warnings.warn(f"prompt {start!r}: has {count} tokens, and the pipeline reads {self.limit}; shorten it")

        def encode(places: Sequence[int]) -> dict[str, Tensor]:
            chosen = [prompts[place] for place in places]
            with self.on_device(pixels.device), pipelines.quiet(bool(too_long)):
                return pipelines.encode_prompts(self.pipeline, self.family, chosen, pixels.device)

        given = list(zip(prompts, tokens, strict=True))
        encoded = self._encoded(tuple(self.texts), given, encode, pixels.device)
        dtype = getattr(self.pipeline, pipelines.denoiser_name(self.pipeline)).dtype
        encoded = {name: tensor.to(pixels.device, dtype) for name, tensor in encoded.items()}
        return pipelines.conditions(self.family, encoded, tuple(pixels.shape[-2:]))

    @contextmanager
    def on_device(self, device: torch.device) -> Iterator[None]:
        """Within this context a copy of what is offloaded is on the device; its own tensors, which are frozen, stay."""
        tensors = [tensor for part in self.offloaded for tensor in (*part.parameters(), *part.buffers())]
        own = [tensor.data for tensor in tensors]
        try:
            for tensor in tensors:
                tensor.data = tensor.data.to(device)
            yield
        finally:
            for tensor, data in zip(tensors, own, strict=True):
                tensor.data = data

    def _encoded(
        self, names: tuple[str, ...], items: Sequence[Any] | Tensor, encode: Encode, device: torch.device
    ) -> dict[str, Tensor]:
        """What `encode` makes of all items, from files where these are there and nothing of the parts trains."""
        parts = [getattr(self.pipeline, name) for name in names]
        if self.rows is None or any(map(trains, parts)):
            return encode(range(len(items)))
        if names not in self.keys:
            self.keys[names] = _weights_key(parts)
        precision = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None
        start = repr((self.family, names, self.keys[names], precision)).encode()
        return self.rows.get([sha256(start + _content(item)).hexdigest() for item in items], encode)


def trains(module: nn.Module) -> bool:
    """Whether anything of a module trains."""
    return any(parameter.requires_grad for parameter in module.parameters())


def _content(item: Any) -> bytes:
    """All that tells an item from others; of a tensor shape, dtype and bytes."""
    if not isinstance(item, Tensor):
        return repr(item).encode()
    data = item.cpu().contiguous().view(torch.uint8).numpy().tobytes()
    return repr((item.dtype, item.shape)).encode() + data


def _weights_key(parts: Sequence[nn.Module]) -> str:
    """Another one for any change of a weight, of a dtype, or of a class."""
    tensors = [
        (name, str(value.dtype), tuple(value.shape), checksum(value))
        for part in parts
        for name, value in part.state_dict().items()
        if isinstance(value, Tensor)
    ]
    return sha256(repr(([type(part).__name__ for part in parts], tensors)).encode()).hexdigest()
