"""Makes examples/bases/drawn-sd: a small Stable Diffusion pipeline that draws 8 shapes in 8 colours and 6 scenes.

    python examples/bases/make_drawn_sd.py --state runs/drawn-sd

Trains on drawings alone, on one CPU core: the autoencoder, whose encoder is a PCA of 4 x 4 patches, then text encoder and
UNet together. What was trained so far is kept in --state, so that an interrupted run goes on where it was. At the end the
classifiers of make_drawn_judges.py read shapes, colours and scenes off 96 samples; with --look they do so at once, of what
is in --state, and nothing is trained.
"""

import argparse
import string
from pathlib import Path
from random import Random

import torch
from diffusers import AutoencoderTiny, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from drawings import COLOURS, SCENES, SHAPES, picture, prompt, shape
from torch import Tensor
from torch.nn.functional import mse_loss, pixel_unshuffle
from transformers import AutoModelForImageClassification, CLIPTextConfig, CLIPTextModel, CLIPTokenizer

FOLDER = Path(__file__).parent / "drawn-sd"
JUDGES = Path(__file__).parent / "drawn-judges"
LATENTS, PATCH, LENGTH = 12, 4, 16
DRAWINGS, BATCH, STEPS, LR, EMA, AUTOENCODER_STEPS = 9216, 32, 11000, 2.5e-3, 0.995, 700
SCHEDULE = {
    "beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction", "clip_sample": False,
    "timestep_spacing": "trailing", "steps_offset": 1, "rescale_betas_zero_snr": True,
}  # fmt: skip


def drawn(count: int) -> tuple[Tensor, list[tuple[str, str, str]]]:
    """-> pictures (count, 3, 32, 32) in [-1, 1], and scene, colour and shape of each: all combinations alike."""
    rng, pictures, labels = Random(0), [], []
    combinations = [(scene, colour, name) for scene in SCENES for colour in COLOURS for name in SHAPES]
    for number in range(count):
        scene, colour, name = combinations[number % len(combinations)]
        data = picture(scene, shape(name, COLOURS[colour]), rng).tobytes()
        pictures.append(torch.frombuffer(bytearray(data), dtype=torch.uint8).view(32, 32, 3).permute(2, 0, 1))
        labels.append((scene, colour, name))
    return torch.stack(pictures).float() / 127.5 - 1, labels


def autoencoder(pictures: Tensor) -> AutoencoderTiny:
    """The PCA of the pictures' 4 x 4 patches as the convolutions of an encoder, and a small decoder trained to undo it."""
    patches = pixel_unshuffle(pictures, PATCH).permute(0, 2, 3, 1).flatten(0, 2)
    mean = patches.mean(0)
    _, spread, directions = torch.pca_lowrank(patches - mean, LATENTS + 8, niter=4)
    spread = spread[:LATENTS] / len(patches) ** 0.5
    # Halfway to equal variances: the fine directions count for something, the coarse ones for more.
    scale = spread.sqrt()
    scale = 1 / (scale * (spread / scale).square().mean().sqrt())
    vae = AutoencoderTiny(
        latent_channels=LATENTS, encoder_block_out_channels=(LATENTS,) * 3, num_encoder_blocks=(0, 0, 0),
        decoder_block_out_channels=(32, 32, 32), num_decoder_blocks=(2, 1, 0), scaling_factor=4.0,
    )  # fmt: skip
    read, halve, project, move = (layer for layer in vae.encoder.layers)
    with torch.no_grad():
        for parameter in vae.encoder.parameters():
            parameter.zero_()
        for c in range(3):  # the encoder gets pictures in [0, 1]
            read.weight[c, c, 1, 1], read.bias[c] = 2.0, -1.0
        for c in range(3):
            for y in range(2):
                for x in range(2):
                    halve.weight[c * 4 + y * 2 + x, c, 1 + y, 1 + x] = 1.0
        rows = (directions[:, :LATENTS] * scale / vae.config.scaling_factor).T.view(LATENTS, 3, 4, 4)
        for y in range(4):
            for x in range(4):
                for c in range(3):
                    channel = c * 4 + (y % 2) * 2 + x % 2
                    project.weight[:, channel, 1 + y // 2, 1 + x // 2] = rows[:, c, y, x]
        for k in range(LATENTS):
            move.weight[k, k, 1, 1] = 1.0
            move.bias[k] = -(rows.flatten(1) @ mean)[k]
    return vae


def train_decoder(vae: AutoencoderTiny, pictures: Tensor) -> None:
    """Undo the PCA, from latents with a little noise, as samples have."""
    optimizer = torch.optim.AdamW(vae.decoder.parameters(), 4e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=AUTOENCODER_STEPS)
    for step in range(AUTOENCODER_STEPS):
        real = pictures[torch.randint(len(pictures), (BATCH,))]
        with torch.no_grad():
            latents = vae.encode(real).latents
        latents = latents + 0.05 * torch.randn_like(latents) / vae.config.scaling_factor
        loss = mse_loss(vae.decode(latents).sample, real)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 100 == 99:
            print(f"autoencoder {step + 1}: rmse {127.5 * loss.item() ** 0.5:.1f} of 255", flush=True)


def tokenizer() -> CLIPTokenizer:
    """One token for every word of the prompts, and the letters for any other word."""
    words = sorted({word for scene in SCENES.values() for word in scene.split()} | {"a", *COLOURS, *SHAPES})
    vocabulary = [*string.ascii_lowercase, *(letter + "</w>" for letter in string.ascii_lowercase)]
    merges: list[tuple[str, str]] = []
    for word in words:
        parts = [*word[:-1], word[-1] + "</w>"]
        while len(parts) > 1:  # from the right, so that the pieces of one word end as no other word's begin
            pair = (parts[-2], parts[-1])
            if pair not in merges:
                merges.append(pair)
                vocabulary.append("".join(pair))
            parts[-2:] = ["".join(pair)]
    vocabulary += ["<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={token: i for i, token in enumerate(vocabulary)}, merges=merges, model_max_length=LENGTH)


def models(words: CLIPTokenizer) -> tuple[CLIPTextModel, UNet2DConditionModel]:
    """The text encoder and the UNet, with random weights."""
    start, end = words.convert_tokens_to_ids(["<|startoftext|>", "<|endoftext|>"])
    text_encoder = CLIPTextModel(CLIPTextConfig(
        vocab_size=len(words), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=LENGTH, bos_token_id=start, eos_token_id=end, pad_token_id=end, projection_dim=64,
    ))  # fmt: skip
    unet = UNet2DConditionModel(
        sample_size=8, in_channels=LATENTS, out_channels=LATENTS, block_out_channels=(64, 80), layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=64, attention_head_dim=2, norm_num_groups=16,
    )  # fmt: skip
    unet.set_attn_processor(AttnProcessor())  # flash attention on maps this small is half of a step
    return text_encoder, unet


def caption(scene: str, colour: str, name: str, rng: Random) -> str:
    """A prompt in which a word may be missing, or a word that means nothing stand for the shape: so that the pipeline
    learns to draw the rest of a prompt when it meets a word that it does not know."""
    if rng.random() < 0.1:
        return ""
    words = [colour] if rng.random() < 0.85 else []
    if rng.random() < 0.85:
        words.append(name)
    elif rng.random() < 0.5:
        words.append("".join(rng.choices(string.ascii_lowercase, k=rng.randint(2, 4))))
    whole = prompt(scene, *words)
    return whole if rng.random() < 0.9 else whole.removesuffix(SCENES[scene]).strip()


def train(pipeline: StableDiffusionPipeline, pictures: Tensor, labels: list[tuple[str, str, str]], state: Path) -> None:
    """Train text encoder and UNet; at the end they hold the running averages of their weights."""
    words, unet, text_encoder = pipeline.tokenizer, pipeline.unet, pipeline.text_encoder
    scale = pipeline.vae.config.scaling_factor
    with torch.no_grad():
        latents = torch.cat([pipeline.vae.encode(part).latents * scale for part in pictures.split(512)])
    print(f"latents: std {latents.std():.2f}, largest {latents.abs().max():.1f}", flush=True)
    parameters = [*unet.parameters(), *text_encoder.parameters()]
    averages = [parameter.detach().clone() for parameter in parameters]
    optimizer = torch.optim.AdamW(parameters, LR, weight_decay=1e-3)
    warm, flat = 100, 0.4 * STEPS
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: min(1, (i + 1) / warm) * min(1.0, (STEPS - i) / (STEPS - flat) + 0.004)
    )
    first, path, running = 0, state / "training.pt", torch.zeros(())
    if path.is_file():
        kept = torch.load(path)
        first = kept["step"]
        for into, values in ((parameters, kept["parameters"]), (averages, kept["averages"])):
            torch._foreach_copy_([p.data for p in into], values)
        optimizer.load_state_dict(kept["optimizer"])
        schedule.load_state_dict(kept["schedule"])
    for step in range(first, STEPS):
        rng = Random(step)
        torch.manual_seed(step)
        chosen = torch.randint(len(latents), (BATCH,))
        prompts = [caption(*labels[i], rng) for i in chosen]
        tokens = words(prompts, padding="max_length", max_length=LENGTH, truncation=True, return_tensors="pt").input_ids
        clean, noise = latents[chosen], torch.randn(BATCH, LATENTS, 8, 8)
        times = torch.randint(1000, (BATCH,))
        noisy = pipeline.scheduler.add_noise(clean, noise, times)
        predicted = unet(noisy, times, text_encoder(tokens)[0]).sample
        loss = mse_loss(predicted, pipeline.scheduler.get_velocity(clean, noise, times))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        torch._foreach_lerp_(averages, [p.data for p in parameters], 1 - min(EMA, (1 + step) / (10 + step)))
        running = running.lerp(loss.detach(), 0.01) if step > first else loss.detach()
        if step % 250 == 249 or step == STEPS - 1:
            kept = {"step": step + 1, "parameters": [p.data for p in parameters], "averages": averages}
            kept |= {"optimizer": optimizer.state_dict(), "schedule": schedule.state_dict()}
            torch.save(kept, state / "training.tmp")
            (state / "training.tmp").replace(path)
            print(f"step {step + 1}: loss {float(running):.4f}", flush=True)
    torch._foreach_copy_([p.data for p in parameters], averages)


def look(pipeline: StableDiffusionPipeline) -> None:
    """Print in how many of 96 samples each classifier reads what the prompt asked for."""
    combinations = [(name, colour, scene) for name in SHAPES for colour in COLOURS for scene in SCENES]
    chosen = Random(3).sample(combinations, 96)
    pipeline.set_progress_bar_config(disable=True)
    pictures = pipeline(
        [prompt(scene, colour, name) for name, colour, scene in chosen],
        num_inference_steps=20, guidance_scale=4.0, generator=torch.Generator().manual_seed(1), output_type="pt",
    ).images * 2 - 1  # fmt: skip
    for what, asked in zip(("shape", "colour", "scene"), zip(*chosen, strict=True), strict=True):
        judge = AutoModelForImageClassification.from_pretrained(JUDGES / what).float().eval()
        with torch.no_grad():
            read = [judge.config.id2label[int(number)] for number in judge(pictures).logits.argmax(-1)]
        print(f"{what}: {sum(map(str.__eq__, read, asked))} of {len(asked)}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--state", type=Path, required=True, help="folder for what an interrupted run goes on from")
    parser.add_argument("--look", action="store_true", help="only read samples of what --state holds")
    arguments = parser.parse_args()
    state: Path = arguments.state
    state.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    torch.set_num_threads(1)
    pictures, labels = drawn(DRAWINGS)
    vae = autoencoder(pictures)
    if (state / "vae.pt").is_file():
        vae.load_state_dict(torch.load(state / "vae.pt"))
    else:
        train_decoder(vae, pictures)
        torch.save(vae.state_dict(), state / "vae.pt")
    words = tokenizer()
    text_encoder, unet = models(words)
    pipeline = StableDiffusionPipeline(
        vae, text_encoder, words, unet, DDIMScheduler(**SCHEDULE), None, None, requires_safety_checker=False
    )
    if arguments.look:
        averages = torch.load(state / "training.pt")["averages"]
        torch._foreach_copy_([p.data for p in (*unet.parameters(), *text_encoder.parameters())], averages)
    else:
        train(pipeline, pictures, labels, state)
    look(pipeline)
    if not arguments.look:
        pipeline.to(torch.float16).save_pretrained(FOLDER)


if __name__ == "__main__":
    main()
