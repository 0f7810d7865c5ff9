"""TextToImage on tiny pipelines of every family: its losses, what trains, what is sampled and what is exported."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import diffusion_models as tiny
import pytest
import torch
from diffusion_models import FAMILIES, SIZE, diffusers
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging, ModelCheckpoint
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_oft import OFTFinetuning, load_from_checkpoint
from lightning_oft.callback.random_state import RandomState
from lightning_oft.callback.samples import Samples
from lightning_oft.tasks import TextToImage
from lightning_oft.tasks.diffusion import losses, pipelines

pytestmark = [
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`"),
    # Of the frozen autoencoder and text encoders, which belong in eval mode.
    pytest.mark.filterwarnings(r"ignore:Found \d+ module\(s\) in eval mode at the start of training"),
    pytest.mark.filterwarnings("ignore:PEFT cannot represent the rotations of"),
]

SAMPLING = {"num_inference_steps": 2, "height": SIZE, "width": SIZE}
PROMPTS = ["a cat", "two dogs", "sks", "a bird"]


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return {family: tiny.save(family, tmp_path_factory.mktemp(family)) for family in FAMILIES}


def examples(count: int = 4) -> list[dict[str, Any]]:
    pixels = torch.rand(count, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(3)) * 2 - 1
    return [{"pixel_values": one, "prompt": prompt} for one, prompt in zip(pixels, PROMPTS, strict=False)]


def loader(rows: Any = None, size: int = 2) -> DataLoader[Any]:
    return DataLoader(rows or examples(), size)


def batch(prior: bool = False) -> dict[str, Any]:
    made: dict[str, Any] = next(iter(loader()))
    return {**made, "prior": next(iter(loader(examples()[2:])))} if prior else made


def trainer(root: Path, *callbacks: Any, **options: Any) -> Trainer:
    quiet: dict[str, Any] = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary"), False)
    options = {"max_epochs": 1, "enable_checkpointing": False, "num_sanity_val_steps": 0, **options}
    return Trainer(accelerator="cpu", default_root_dir=root, callbacks=list(callbacks), **quiet, **options)


def oft(module: str, **options: Any) -> OFTFinetuning:
    return OFTFinetuning(module=module, **{"oft_block_size": 4, "target_modules": "all-linear", **options})


def adam(lr: float = 0.01) -> Any:
    return partial(torch.optim.AdamW, lr=lr)


def expected_errors(task: TextToImage, given: dict[str, Any], seed: int) -> Tensor:
    """The mean squared error of each example as diffusers' own training scripts of that family compute it."""
    drawn, family, pipe = torch.Generator().manual_seed(seed), task.family, task.pipeline
    vae, pixels, prompts = pipe.vae, given["pixel_values"], given["prompt"]
    clean = (vae.encode(pixels).latent_dist.sample(drawn) - vae.config.shift_factor) * vae.config.scaling_factor
    noise = torch.randn(clean.shape, generator=drawn)
    if family in ("sd", "sdxl"):
        noising = diffusers.DDPMScheduler.from_config(pipe.scheduler.config)
        times = torch.randint(1000, (len(clean),), generator=drawn)
        noisy = noising.add_noise(clean, noise, times)
    else:
        times, sigmas, _ = losses.flow_schedule(pipe.scheduler, len(clean), "logit_normal", drawn)
        noisy = (1.0 - sigmas.view(-1, 1, 1, 1)) * clean + sigmas.view(-1, 1, 1, 1) * noise
    if family == "sd":
        ids = pipe.tokenizer(prompts, max_length=16, padding="max_length", return_tensors="pt").input_ids
        predicted = pipe.unet(noisy, times, pipe.text_encoder(ids)[0]).sample
    elif family == "sdxl":
        words, _, pooled, _ = pipe.encode_prompt(prompts, do_classifier_free_guidance=False)
        told = {"text_embeds": pooled, "time_ids": torch.tensor([[SIZE, SIZE, 0, 0, SIZE, SIZE]] * len(clean))}
        predicted = pipe.unet(noisy, times, words, added_cond_kwargs=told).sample
    elif family == "sd3":
        words, _, pooled, _ = pipe.encode_prompt(prompts, None, None, do_classifier_free_guidance=False)
        predicted = pipe.transformer(noisy, words, pooled, times).sample
    else:
        words, pooled, text_ids = pipe.encode_prompt(prompts, None)
        _, _, height, width = noisy.shape
        packed = pipe._pack_latents(noisy, len(clean), 4, height, width)
        ids = pipe._prepare_latent_image_ids(len(clean), height // 2, width // 2, "cpu", torch.float32)
        answer = pipe.transformer(packed, words, pooled, times / 1000, ids, text_ids).sample
        predicted = pipe._unpack_latents(answer, SIZE, SIZE, pipe.vae_scale_factor)
    target = noise if family in ("sd", "sdxl") else noise - clean
    return (predicted - target).square().flatten(1).mean(1)


@pytest.mark.parametrize("family", FAMILIES)
def test_errors_are_those_of_the_training_scripts(bases: dict[str, str], family: str) -> None:
    task = TextToImage(bases[family]).eval()
    with torch.no_grad():
        errors, is_prior = task.denoising_errors(batch(), torch.Generator().manual_seed(5))
        torch.testing.assert_close(errors, expected_errors(task, batch(), 5), atol=1e-6, rtol=1e-6)
    assert not is_prior.any()


def test_auto_is_the_dtype_that_each_part_was_saved_in(tmp_path: Path) -> None:
    pipeline = tiny.pipeline("sd")
    pipeline.unet.to(torch.bfloat16)
    pipeline.text_encoder.to(torch.float16)
    pipeline.save_pretrained(tmp_path)
    task = TextToImage(str(tmp_path), dtype="auto").eval()
    dtypes = [next(part.parameters()).dtype for part in (task.unet, task.text_encoder, task.vae)]
    assert dtypes == [torch.bfloat16, torch.float16, torch.float32]
    assert task.denoising_errors(batch())[0].isfinite().all()


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_prior_min_snr_and_offset_reach_the_loss(tmp_path: Path, kind: str) -> None:
    base = tiny.save("sd", tmp_path, prediction_type=kind)
    task = TextToImage(base, min_snr_gamma=5.0, noise_offset=0.1, prior_weight=0.5).eval()
    both = batch(prior=True)
    _, is_prior = task.denoising_errors(both, torch.Generator().manual_seed(1))
    assert is_prior.tolist() == [False, False, True, True]
    task.log = lambda *_, **__: None  # type: ignore[method-assign,assignment]
    torch.manual_seed(4)
    loss = task.training_step(both, 0)
    torch.manual_seed(4)
    pixels = torch.cat([both["pixel_values"], both["prior"]["pixel_values"]])
    clean = pipelines.drawn_latents(task.pipeline.vae, pipelines.encode_pictures(task.pipeline.vae, pixels))
    noise = losses.offset_noise(torch.randn(clean.shape), 0.1)
    times = torch.randint(1000, (4,))
    words = task.encoders.conditions(PROMPTS, pixels)
    predicted = task.library_model(task.scheduler.add_noise(clean, noise, times), times, **words).sample
    target = losses.prediction_target(task.scheduler, clean, noise, times)
    each = (predicted - target).square().flatten(1).mean(1) * losses.min_snr_weights(task.scheduler, times, 5.0)
    torch.testing.assert_close(loss, each[:2].mean() + 0.5 * each[2:].mean(), atol=1e-6, rtol=1e-6)


def test_dropped_prompts_are_empty_and_only_in_training(bases: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    task, seen = TextToImage(bases["sd"], prompt_dropout=0.5), []
    encode = pipelines.encode_prompts
    monkeypatch.setattr(pipelines, "encode_prompts", lambda *given: seen.append(given[2]) or encode(*given))
    rows = {"pixel_values": torch.zeros(40, 3, SIZE, SIZE), "prompt": ["a cat"] * 40}
    task.denoising_errors(rows)
    task.denoising_errors(rows, torch.Generator())
    assert 8 < seen[0].count("") < 32
    assert set(seen[0]) == {"", "a cat"}
    assert set(seen[1]) == {"a cat"}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_fit_trains_rotations_alone_and_exports_a_whole_pipeline(
    bases: dict[str, str], tmp_path: Path, family: str
) -> None:
    task = TextToImage(bases[family], sampling=SAMPLING, optimizer=adam(), gradient_checkpointing=True)
    before = {name: value.clone() for name, value in task.state_dict().items()}
    (first,) = task.sample(["a cat"], [3])
    trainer(tmp_path, oft(task.model_attribute, export_dir=str(tmp_path))).fit(task, loader())
    moved = {name.split(".")[0] for name, value in task.state_dict().items() if not torch.equal(before[name], value)}
    assert moved == {task.model_attribute}
    (ours,) = task.sample(["a cat"], [3])
    assert ours.tobytes() != first.tobytes()
    loaded = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "merged")
    assert type(loaded) is type(task.pipeline)
    loaded.set_progress_bar_config(disable=True)
    theirs = loaded(["a cat"], generator=[torch.Generator().manual_seed(3)], **SAMPLING).images[0]
    assert theirs.tobytes() == ours.tobytes()


def test_two_callbacks_adapt_two_parts_and_each_exports_both(bases: dict[str, str], tmp_path: Path) -> None:
    task = TextToImage(bases["sd"], sampling=SAMPLING, optimizer=adam())
    parts = ("unet", "text_encoder")
    callbacks = [oft(part, adapter_name=part, export_dir=str(tmp_path / part)) for part in parts]
    trainer(tmp_path, *callbacks).fit(task, loader())
    (ours,) = task.sample(["a cat"], [3])
    for part in parts:
        loaded = diffusers.DiffusionPipeline.from_pretrained(tmp_path / part / "merged")
        loaded.set_progress_bar_config(disable=True)
        theirs = loaded(["a cat"], generator=[torch.Generator().manual_seed(3)], **SAMPLING).images[0]
        assert theirs.tobytes() == ours.tobytes()
        assert (tmp_path / part / "adapter" / "adapter_config.json").is_file()


@pytest.mark.filterwarnings("ignore:You're using the WeightAveraging callback with a model that overrides")
def test_what_is_exported_of_an_average_is_the_average(bases: dict[str, str], tmp_path: Path) -> None:
    class Watch(Callback):
        average: dict[str, Tensor] = {}

        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            now = {name: p.detach().clone() for name, p in pl_module.unet.named_parameters() if "oft_R" in name}
            self.average = {name: (self.average.get(name, value) + value) / 2 for name, value in now.items()}

    task, watch = TextToImage(bases["sd"], sampling=SAMPLING, optimizer=adam()), Watch()
    callbacks = [oft("unet", export_dir=str(tmp_path)), EMAWeightAveraging(decay=0.5), watch]
    trainer(tmp_path, *callbacks, max_epochs=2).fit(task, loader())
    written = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert len(written) == len(watch.average)
    for name, value in watch.average.items():
        torch.testing.assert_close(written[f"base_model.model.{name}".replace(".default", "")], value)
    loaded = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "merged")
    loaded.set_progress_bar_config(disable=True)
    theirs = loaded(["a cat"], generator=[torch.Generator().manual_seed(3)], **SAMPLING).images[0]
    assert theirs.tobytes() == task.sample(["a cat"], [3])[0].tobytes()


def test_a_resumed_fit_is_one_that_never_stopped(bases: dict[str, str], tmp_path: Path) -> None:
    def fit(epochs: int, resume: Path | None = None) -> tuple[TextToImage, Path]:
        torch.manual_seed(2)
        task = TextToImage(bases["sd"], prompt_dropout=0.3, optimizer=adam())
        keeper = ModelCheckpoint(tmp_path / str(epochs))
        run = trainer(tmp_path, oft("unet"), RandomState(), keeper, max_epochs=epochs, enable_checkpointing=True)
        run.fit(task, loader(), ckpt_path=resume)
        return task, Path(keeper.best_model_path)

    straight, _ = fit(2)
    _, checkpoint = fit(1)
    resumed, _ = fit(2, checkpoint)
    for name, value in straight.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
    assert load_from_checkpoint(TextToImage, checkpoint, pretrained=bases["sd"]).prompt_dropout == 0.3


def test_validation_repeats_its_noise_and_shows_samples(bases: dict[str, str], tmp_path: Path) -> None:
    task = TextToImage(bases["sd"], prompts=["a cat", "dog"], sampling=SAMPLING, prompt_dropout=1.0)
    run = trainer(tmp_path, Samples())
    scores = [run.validate(task, loader(), verbose=False)[0]["val/loss"] for _ in range(2)]
    assert scores[0] == scores[1]
    from PIL import Image

    (grid,) = (tmp_path / "samples").glob("*.png")
    with Image.open(grid) as picture:
        assert picture.width > 2 * 96


def test_a_sample_depends_on_its_own_seed_alone(bases: dict[str, str]) -> None:
    task = TextToImage(bases["sd"], sampling=SAMPLING)
    modes, state = [module.training for module in task.modules()], torch.get_rng_state()
    together = task.sample(["a cat", "a cat", "a dog"], [1, 2, 1])
    assert together[1].tobytes() == task.sample(["a cat"], [2])[0].tobytes() != together[0].tobytes()
    assert together[2].tobytes() != together[0].tobytes()
    assert task.samples() == {}
    assert modes == [module.training for module in task.modules()]
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"prompt_dropout": 1.5}, ValueError, "prompt_dropout=1.5"),
        ({"prior_weight": -1.0}, ValueError, "prior_weight=-1.0"),
        ({"min_snr_gamma": 0.0}, ValueError, "min_snr_gamma=0.0: must be above 0"),
        ({"pretrained": "./none"}, FileNotFoundError, "./none: no such folder"),
        ({"pretrained": str(Path(__file__).parent)}, OSError, "no pipeline could be loaded"),
        ({"judges": {"shape": "./none"}}, FileNotFoundError, "./none: no such folder"),
    ],
)
def test_impossible_arguments_are_refused(
    bases: dict[str, str], arguments: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message) as raised:
        TextToImage(**{"pretrained": bases["sd"], **arguments})
    assert "\n" not in str(raised.value)


def test_what_no_gradient_reaches_is_refused(bases: dict[str, str], tmp_path: Path) -> None:
    task = TextToImage(bases["sd"])
    with pytest.raises(ValueError, match=r"vae: trains, and no gradient reaches it; set oft\.module: unet"):
        trainer(tmp_path, OFTFinetuning(oft_block_size=4)).fit(task, loader())
