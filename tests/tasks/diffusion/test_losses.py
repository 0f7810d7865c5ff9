"""The losses against the formulas of diffusers' training scripts, and where those have none or are wrong against x0."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_oft.tasks.diffusion import losses

diffusers = pytest.importorskip(
    "diffusers", reason="diffusers is not installed: pip install 'lightning_oft[diffusion]'"
)
training_utils = pytest.importorskip("diffusers.training_utils")

KINDS = ("epsilon", "v_prediction", "sample")
LAST = 999


def scheduler(kind: str, zero_snr: bool = False) -> Any:
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    return diffusers.DDPMScheduler(prediction_type=kind, rescale_betas_zero_snr=zero_snr, **betas)


def batch(count: int = 6) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    clean, noise, predicted = torch.randn(3, count, 4, 5, 3)
    return clean, noise, predicted, torch.tensor([0, 5, 200, 450, 800, LAST])[:count]


def loss(schedule: Any, gamma: float | None, prior: int = 0, prior_weight: float = 1.0) -> Tensor:
    """Ours; the last `prior` of the batch are pictures of the class."""
    clean, noise, predicted, times = batch()
    weights = None if gamma is None else losses.min_snr_weights(schedule, times, gamma)
    errors = losses.squared_errors(predicted, losses.prediction_target(schedule, clean, noise, times), weights)
    return losses.with_prior(errors, torch.arange(len(errors)) >= len(errors) - prior, prior_weight)


def _seeded(make: Any) -> Any:
    torch.manual_seed(0)
    return make()


@pytest.mark.parametrize("gamma", [None, 5.0])
@pytest.mark.parametrize("kind", KINDS[:2])
def test_unet_losses_are_those_of_train_text_to_image(kind: str, gamma: float | None) -> None:
    schedule = scheduler(kind)
    ours = _seeded(lambda: loss(schedule, gamma))
    clean, noise, predicted, times = _seeded(batch)
    target = noise if kind == "epsilon" else schedule.get_velocity(clean, noise, times)
    if gamma is None:
        theirs = torch.nn.functional.mse_loss(predicted.float(), target.float(), reduction="mean")
    else:
        snr = training_utils.compute_snr(schedule, times)
        weights = torch.stack([snr, gamma * torch.ones_like(times)], dim=1).min(dim=1)[0]
        weights = weights / (snr if kind == "epsilon" else snr + 1)
        each = torch.nn.functional.mse_loss(predicted.float(), target.float(), reduction="none")
        theirs = (each.mean(dim=list(range(1, len(each.shape)))) * weights).mean()
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("zero_snr", [False, True])
def test_min_snr_is_one_loss_of_the_clean_latents_whatever_is_predicted(kind: str, zero_snr: bool) -> None:
    schedule = scheduler(kind, zero_snr)
    clean, noise, predicted, times = (part.double() if part.is_floating_point() else part for part in batch())
    alpha = schedule.alphas_cumprod.double()[times].sqrt()[:, None, None, None]
    sigma = (1 - alpha.square()).sqrt()
    noisy = alpha * clean + sigma * noise
    target = losses.prediction_target(schedule, clean, noise, times)
    ours = losses.squared_errors(predicted, target, losses.min_snr_weights(schedule, times, 5.0))
    assert ours.isfinite().all()
    guess = {"epsilon": (noisy - sigma * predicted) / alpha, "v_prediction": alpha * noisy - sigma * predicted}
    error = (guess.get(kind, predicted) - clean).square().flatten(1).mean(1)
    expected = (alpha / sigma).flatten().square().clamp(max=5.0) * error
    # Where no signal is left, noise that was predicted says nothing of the clean latents.
    compared = slice(0, 5) if kind == "epsilon" and zero_snr else slice(None)
    torch.testing.assert_close(ours[compared], expected.float()[compared], atol=1e-4, rtol=2e-4)


@pytest.mark.parametrize(("gamma", "prior_weight"), [(None, 1.0), (None, 0.3), (5.0, 0.3)])
@pytest.mark.parametrize("kind", KINDS)
def test_prior_preservation_is_the_sum_of_the_losses_of_both_halves(
    kind: str, gamma: float | None, prior_weight: float
) -> None:
    schedule = scheduler(kind)
    ours = _seeded(lambda: loss(schedule, gamma, prior=3, prior_weight=prior_weight))
    clean, noise, predicted, times = _seeded(batch)
    target = losses.prediction_target(schedule, clean, noise, times)
    # train_dreambooth.py without min-SNR; with it the script's loss is undefined, so each half is weighed by itself.
    snr = training_utils.compute_snr(schedule, times)
    weights = torch.ones(6)
    if gamma is not None:
        weights = torch.minimum(snr, torch.full_like(snr, gamma))
        weights = weights / {"epsilon": snr, "v_prediction": snr + 1, "sample": torch.ones(6)}[kind]
    each = (predicted - target).square().mean(dim=(1, 2, 3)) * weights
    subject, prior = each.chunk(2)
    torch.testing.assert_close(ours, subject.mean() + prior_weight * prior.mean(), atol=1e-6, rtol=1e-6)


def test_a_batch_of_one_kind_has_the_loss_of_that_kind() -> None:
    errors = torch.rand(3)
    nothing, everything = torch.zeros(3, dtype=torch.bool), torch.ones(3, dtype=torch.bool)
    torch.testing.assert_close(losses.with_prior(errors, nothing, 0.3), errors.mean())
    torch.testing.assert_close(losses.with_prior(errors, everything, 0.3), 0.3 * errors.mean())


def test_another_prediction_type_is_named() -> None:
    clean, noise, _, times = batch()
    with pytest.raises(ValueError, match=r"prediction_type 'x' is not known; there are epsilon"):
        losses.prediction_target(scheduler("x"), clean, noise, times)


def test_offset_noise_shifts_whole_channels() -> None:
    noise = torch.randn(2, 3, 4, 5)
    shift = losses.offset_noise(noise, 0.1) - noise
    torch.testing.assert_close(shift, shift[..., :1, :1].expand_as(shift))
    torch.manual_seed(1)
    expected = torch.randn(2, 3, 1, 1)
    torch.manual_seed(1)
    torch.testing.assert_close(losses.offset_noise(noise, 0.1), noise + 0.1 * expected)


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("weighting", ["none", "logit_normal", "mode", "sigma_sqrt", "cosmap"])
def test_flow_matching_is_that_of_train_dreambooth_sd3(weighting: losses.Weighting, shift: float) -> None:
    schedule = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    clean, noise, predicted, _ = batch()
    times, sigmas, weights = losses.flow_schedule(schedule, 6, weighting, torch.Generator().manual_seed(2))
    ours = losses.with_prior(
        losses.squared_errors(predicted, noise - clean, weights), torch.zeros(6, dtype=torch.bool), 1
    )
    u = training_utils.compute_density_for_timestep_sampling(
        weighting, 6, logit_mean=0.0, logit_std=1.0, mode_scale=1.29, generator=torch.Generator().manual_seed(2)
    )
    indices = (u * schedule.config.num_train_timesteps).long()
    their_times = schedule.timesteps[indices]
    steps = [(schedule.timesteps == t).nonzero().item() for t in their_times]
    their_sigmas = schedule.sigmas[steps].flatten().view(-1, 1, 1, 1)
    weigh = training_utils.compute_loss_weighting_for_sd3(weighting_scheme=weighting, sigmas=their_sigmas)
    theirs = (weigh.float() * (predicted.float() - (noise - clean).float()) ** 2).reshape(6, -1).mean(1).mean()
    assert torch.equal(times, their_times)
    assert torch.equal(sigmas, their_sigmas.flatten())
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-6)
