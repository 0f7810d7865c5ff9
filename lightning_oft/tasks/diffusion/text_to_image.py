"""TextToImage: a diffusers pipeline learns from pictures with prompts."""

from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from typing_extensions import override

from lightning_oft.model.reference import has_reference, is_reference, reference
from lightning_oft.tasks.base import Dtype, LRInterval, Task
from lightning_oft.tasks.diffusion import losses, pipelines
from lightning_oft.tasks.diffusion.encoders import Encoders, trains
from lightning_oft.tasks.diffusion.evaluation import Evaluation
from lightning_oft.tasks.diffusion.judges import Judge
from lightning_oft.tasks.modes import evaluating

Batch = dict[str, Any]


class TextToImage(Task):
    """Text to image with any Stable Diffusion (1.5, XL, 3) or Flux pipeline: its denoiser is `self.unet` or
    `self.transformer`, its other models have the pipeline's names, and `self.pipeline` is the whole.

    Batches are {"pixel_values": (B, 3, H, W) float32 in [-1, 1], "prompt": B strings}, and may have a second one of those
    under "prior": pictures of the subject's class, which keep what the pipeline knew (DreamBooth). UNets train on noise,
    velocity or clean latents, as their scheduler says, transformers by flow matching. Autoencoder and text encoders are
    frozen; rotations in a text encoder train with the rest. Logs `train/loss`, and `val/loss` with the same noise at
    every validation.

    A test batch is {"prompt": B strings, "seed": (B,) int64, "labels": {what: B class names}}. Each prompt is sampled
    with its seed; the share of samples in which a judge reads what the labels say is logged as `test/<what>_accuracy`,
    with several test sets as `test/<set>/<what>_accuracy`, and so are the scores of `evaluators`: DINO, CLIP-I, CLIP-T,
    drift, FID, KID. Which of these are not scored, and why, is said in one line.

    Args:
        pretrained: The pipeline to start from: a folder written by save_pretrained, or a hub id.
        prompts: Prompts to look at, each sampled with its number as seed after each validation, and before and after.
        sampling: Arguments of the pipeline's call, such as num_inference_steps, guidance_scale, height and width.
        judges: Image classifiers by what they read, such as {shape: folder}.
        evaluators: Networks that compare samples with pictures and prompts, {dino, clip, fid: folder or hub id}, any.
        prompt_dropout: Probability that a training prompt is left empty, for classifier-free guidance.
        prior_weight: Weight of the loss of prior pictures.
        min_snr_gamma: Weigh timesteps by min(SNR, gamma), in terms of the clean latents; 5 is usual. UNets only.
        noise_offset: Strength of a random shift of each channel's noise; 0.05 to 0.1 where it is wanted. UNets only.
        weighting: How flow matching draws and weighs its timesteps. Transformers only.
        guidance: What a Flux that was distilled with guidance is told in training.
        cache_dir: Directory in which what frozen encoders make of pictures and prompts is kept, so that they run once for
            each. Files of other pictures, sizes, weights or precisions are others; delete it to free the space.
        offload: Encoders, such as [vae, text_encoder_2], that stay in main memory and come to the device to encode and to
            sample; they are no part of the model, and cannot be adapted.
        gradient_checkpointing: Compute activations again in the backward rather than keep them.
        optimizer: Gets what is trainable when the run starts; rotations are never decayed.
        lr_scheduler: Gets the optimizer. None keeps the learning rate.
        lr_interval: When the schedule advances; auto is every step for OneCycleLR and CyclicLR, else every epoch.
        dtype: Data type that the weights are loaded in; "auto" for the checkpoint's.

    Raises:
        OSError: When there is no pipeline at `pretrained`, or no network at one of `judges` or `evaluators`.
        ValueError: When an argument is out of its range, or the pipeline's denoiser is not known; when a fit starts and
            something trains that no gradient reaches, such as rotations in the autoencoder; when pictures are of a size
            that the pipeline does not take, or a loss is not finite, naming the prompt.
        ModuleNotFoundError: When diffusers is not installed.
    """

    shown_scores = ("accuracy", "DINO", "CLIP", "drift", "FID", "KID")

    def __init__(
        self,
        pretrained: str,
        prompts: list[str] | None = None,
        sampling: dict[str, Any] | None = None,
        judges: dict[str, str] | None = None,
        evaluators: dict[str, str] | None = None,
        prompt_dropout: float = 0.0,
        prior_weight: float = 1.0,
        min_snr_gamma: float | None = None,
        noise_offset: float = 0.0,
        weighting: losses.Weighting = "logit_normal",
        guidance: float = 1.0,
        cache_dir: str | None = None,
        offload: list[str] | None = None,
        gradient_checkpointing: bool = False,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        lr_scheduler: LRSchedulerCallable | None = None,
        lr_interval: LRInterval = "auto",
        dtype: Dtype = "float32",
    ) -> None:
        super().__init__(pretrained, dtype, optimizer=optimizer, lr_scheduler=lr_scheduler, lr_interval=lr_interval)
        self.save_hyperparameters(ignore=["optimizer", "lr_scheduler"])
        if not 0 <= prompt_dropout <= 1 or prior_weight < 0:
            raise ValueError(
                f"prompt_dropout={prompt_dropout}, prior_weight={prior_weight}: must lie in [0, 1] and be at least 0"
            )
        if min_snr_gamma is not None and min_snr_gamma <= 0:
            raise ValueError(f"min_snr_gamma={min_snr_gamma}: must be above 0; 5 is usual")
        self.prompts, self.sampling = prompts or [], sampling or {}
        self.prompt_dropout, self.prior_weight = prompt_dropout, prior_weight
        self.min_snr_gamma, self.noise_offset = min_snr_gamma, noise_offset
        self.weighting, self.guidance = weighting, guidance
        self.judges = {what: Judge(path) for what, path in (judges or {}).items()}
        self.evaluation = Evaluation(self.judges, evaluators or {})
        self._load(pretrained, gradient_checkpointing, offload or [])
        self.encoders = Encoders(self.pipeline, self.family, cache_dir, offload or [])

    def _load(self, pretrained: str, gradient_checkpointing: bool, offload: Sequence[str]) -> None:
        self.processor = None  # the pipeline is exported whole, tokenizers included
        self.pipeline, self.family = pipelines.load_pipeline(pretrained, self.load_dtype)
        self.model_attribute = pipelines.denoiser_name(self.pipeline)
        for name, part in self.pipeline.components.items():
            if isinstance(part, nn.Module):
                part.requires_grad_(name == self.model_attribute)
                if name not in offload or name == self.model_attribute:
                    setattr(self, name, part)
        self.scheduler = pipelines.training_scheduler(self.pipeline, self.family)
        self.library_model.train()
        if gradient_checkpointing:
            self.library_model.enable_gradient_checkpointing()  # type: ignore[operator]

    @override
    def configure_model(self) -> None:
        """Called for every run, before which frozen parts may have got other weights."""
        super().configure_model()
        self.encoders.forget_weights()

    @override
    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Called when the run starts: what would train without ever getting a gradient is named."""
        learns = {self.model_attribute, *(name for name in self._modules if name.startswith("text_encoder"))}
        idle = [name for name, part in self.named_children() if name not in learns and trains(part)]
        if idle:
            raise ValueError(f"{idle[0]}: trains, and no gradient reaches it; set oft.module: {self.model_attribute}")
        return super().configure_optimizers()

    def denoising_errors(self, batch: Batch, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """-> the weighted squared error of each example, (B,) float32, and which of them are prior, (B,) bool.

        With a generator, which decides noise and timesteps, no prompt is dropped.
        """
        parts = [batch, batch["prior"]] if "prior" in batch else [batch]
        pixels = torch.cat([part["pixel_values"] for part in parts])
        prompts = [prompt for part in parts for prompt in part["prompt"]]
        if generator is None and self.prompt_dropout:
            dropped = torch.rand(len(prompts)) < self.prompt_dropout
            prompts = ["" if drop else prompt for prompt, drop in zip(prompts, dropped.tolist(), strict=True)]
        clean = self.encoders.latents(pixels, generator)
        told = self.encoders.conditions(prompts, pixels)
        noise = torch.randn(clean.shape, generator=generator).to(clean)
        noising = self._diffused if self.family in ("sd", "sdxl") else self._flowing
        noisy, timesteps, target, weights = noising(clean, noise, generator)
        predicted = pipelines.predict(self.pipeline, self.family, noisy, timesteps, told, self.guidance)
        is_prior = torch.arange(len(pixels), device=clean.device) >= len(batch["prompt"])
        return losses.squared_errors(predicted, target, weights), is_prior

    def _diffused(self, clean: Tensor, noise: Tensor, generator: torch.Generator | None) -> tuple[Any, ...]:
        """-> noisy latents, timesteps (B,), target and weights (B,) of a UNet."""
        if self.noise_offset:
            noise = losses.offset_noise(noise, self.noise_offset, generator)
        total = self.scheduler.config.num_train_timesteps
        timesteps = torch.randint(total, (len(clean),), generator=generator).to(clean.device)
        noisy = self.scheduler.add_noise(clean, noise, timesteps)
        target = losses.prediction_target(self.scheduler, clean, noise, timesteps)
        gamma = self.min_snr_gamma
        weights = None if gamma is None else losses.min_snr_weights(self.scheduler, timesteps, gamma)
        return noisy, timesteps, target, weights

    def _flowing(self, clean: Tensor, noise: Tensor, generator: torch.Generator | None) -> tuple[Any, ...]:
        """-> the same of a transformer, which goes straight from noise to picture."""
        drawn = losses.flow_schedule(self.scheduler, len(clean), self.weighting, generator)
        timesteps, sigmas, weights = (one.to(clean.device) for one in drawn)
        level = sigmas.view(-1, 1, 1, 1).to(clean)
        return (1 - level) * clean + level * noise, timesteps, noise - clean, weights

    @override
    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        errors, is_prior = self.denoising_errors(batch)
        loss = losses.with_prior(errors, is_prior, self.prior_weight)
        if not bool(loss.isfinite()):
            self._refuse_loss(errors, batch)
        self.log("train/loss", loss, prog_bar=True, batch_size=len(batch["prompt"]))
        return loss

    def _refuse_loss(self, errors: Tensor, batch: Batch) -> None:
        """Raise ValueError that names the first example whose error is not finite."""
        prompts = [*batch["prompt"], *batch.get("prior", {}).get("prompt", [])]
        place = errors.isfinite().tolist().index(False)
        raise ValueError(
            f"step {self.global_step}, prompt {prompts[place]!r}: the loss is {errors[place].item()}; lower the learning "
            "rate, or load the pipeline in float32: some autoencoders overflow in float16"
        )

    @override
    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Called with the same noise for the same batch, so that two validations differ by the model alone."""
        errors, is_prior = self.denoising_errors(batch, torch.Generator().manual_seed(batch_idx))
        loss = losses.with_prior(errors, is_prior, self.prior_weight)
        self.log("val/loss", loss, prog_bar=True, batch_size=len(batch["prompt"]), sync_dist=True)

    def sample(self, prompts: Sequence[str], seeds: Sequence[int]) -> list[Any]:
        """Pillow images, each from its prompt and its own seed: the same alone as in any batch."""
        generators = [torch.Generator().manual_seed(int(seed)) for seed in seeds]
        with evaluating(self), self.encoders.on_device(self.device):
            made = self.pipeline(prompt=list(prompts), generator=generators, **self.sampling)
        return list(made.images)

    def sample_batch(self, batch: Batch) -> list[Any]:
        """-> a Pillow image for each prompt of a test batch, with its seed."""
        return self.sample(batch["prompt"], batch["seed"].tolist())

    @override
    def samples(self) -> dict[str, Any]:
        """By prompt, the picture that the model makes of it now; one at a time, as large ones fill a memory."""
        return {prompt: self.sample([prompt], [number])[0] for number, prompt in enumerate(self.prompts)}

    def _samples_before(self, batch: Batch, made: list[Any]) -> list[Any] | None:
        """What the pipeline drew of a test batch before it was trained; None where nobody asks."""
        if not self.evaluation.compares(batch["prompt"]):
            return None
        if is_reference(self):
            return made
        with reference(self):
            return self.sample_batch(batch)

    @override
    def on_test_start(self) -> None:
        data = getattr(self.trainer, "datamodule", None)
        self.evaluation.start(self.test_splits(), data, has_reference(self), self.device)

    @override
    def test_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        made = self.sample_batch(batch)
        split = self.test_splits()[dataloader_idx]
        self.evaluation.update(split, batch, made, self._samples_before(batch, made), self.device)

    @override
    def on_test_epoch_end(self) -> None:
        scores = self.evaluation.scores()
        self.log_dict(scores)
        self.evaluation.report(scores)

    @override
    def on_test_end(self) -> None:
        self.evaluation.stop()

    @override
    def predict_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> list[Any]:
        """-> a Pillow image for each prompt of a test batch."""
        return self.sample_batch(batch)
