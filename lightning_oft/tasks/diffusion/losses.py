"""What diffusion models are trained on, as pure functions on tensors.

Shapes: B examples; the rest of a shape, written ..., is that of the latents. A scheduler is one of diffusers'.
"""

from typing import Any, Literal

import torch
from torch import Tensor

Weighting = Literal["none", "logit_normal", "mode", "sigma_sqrt", "cosmap"]
"""How flow matching draws its timesteps and weighs them. Esser et al. 2024, section 3.1."""


def prediction_target(scheduler: Any, clean: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
    """What the model should have answered: noise, velocity or the clean latents, by the scheduler's prediction_type.

    clean, noise: (B, ...); timesteps: (B,) int64 -> (B, ...). Raises ValueError for another prediction_type.
    """
    kind = scheduler.config.prediction_type
    if kind == "epsilon":
        return noise
    if kind == "sample":
        return clean
    if kind == "v_prediction":
        velocity: Tensor = scheduler.get_velocity(clean, noise, timesteps)
        return velocity
    raise ValueError(f"scheduler: prediction_type {kind!r} is not known; there are epsilon, v_prediction and sample")


def min_snr_weights(scheduler: Any, timesteps: Tensor, gamma: float) -> Tensor:
    """The weights with which every prediction_type has the same loss of the clean latents, min(SNR, gamma).

    timesteps: (B,) int64 -> (B,) float32; finite also where nothing of the signal is left and SNR is 0. Hang et al. 2023,
    section 3.4.
    """
    from diffusers.training_utils import compute_snr

    snr: Tensor = compute_snr(scheduler, timesteps)
    kind = scheduler.config.prediction_type
    if kind == "epsilon":
        return (gamma / snr).clamp(max=1)
    return snr.clamp(max=gamma) / (snr + 1 if kind == "v_prediction" else 1)


def offset_noise(noise: Tensor, strength: float, generator: torch.Generator | None = None) -> Tensor:
    """Noise (B, C, H, W) with a random shift of each channel: a model learns from it to leave a middle brightness."""
    shift = torch.randn(*noise.shape[:2], 1, 1, generator=generator).to(noise)
    return noise + strength * shift


def flow_schedule(
    scheduler: Any, count: int, weighting: Weighting, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Timesteps, noise levels sigma and loss weights of flow matching, each (count,) float32 on the CPU.

    Drawn and weighed as by diffusers' training scripts; sigmas are the scheduler's, its shift included.
    """
    from diffusers.training_utils import compute_density_for_timestep_sampling, compute_loss_weighting_for_sd3

    # The scripts' own values: those of the function, None, raise.
    shape = {"logit_mean": 0.0, "logit_std": 1.0, "mode_scale": 1.29}
    drawn = compute_density_for_timestep_sampling(weighting, count, generator=generator, **shape)
    total = scheduler.config.num_train_timesteps
    index = (drawn * total).long().clamp(0, total - 1)
    sigmas = scheduler.sigmas[index].float()
    return scheduler.timesteps[index].float(), sigmas, compute_loss_weighting_for_sd3(weighting, sigmas)


def squared_errors(predicted: Tensor, target: Tensor, weights: Tensor | None = None) -> Tensor:
    """The mean squared error of each example in float32, times its weight. predicted, target: (B, ...) -> (B,)."""
    errors = (predicted.float() - target.float()).square().flatten(1).mean(1)
    return errors if weights is None else errors * weights.to(errors)


def with_prior(errors: Tensor, is_prior: Tensor, prior_weight: float) -> Tensor:
    """The mean error of the pictures of the subject, plus `prior_weight` times that of its class. Ruiz et al. 2023, eq. 2.

    errors: (B,) floating; is_prior: (B,) bool -> a scalar; a kind of which the batch has none counts for nothing.
    """
    subject, prior = (errors[chosen].sum() / chosen.sum().clamp(min=1) for chosen in (~is_prior, is_prior))
    return subject + prior_weight * prior
