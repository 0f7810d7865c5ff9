"""Makes examples/bases/drawn-judges: three small classifiers that read a drawing's shape, colour and scene.

    python examples/bases/make_drawn_judges.py

A shape is one of drawings.SHAPES, the subject, or "other": blobs and halves of the subject, so that not everything that
is red and dotted counts as a mushroom. They train on drawings blurred and made noisy as samples are, on one CPU core.
"""

from pathlib import Path
from random import Random

import torch
from drawings import COLOURS, SCENES, SHAPES, SUBJECT, mushroom, other, picture, shape
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import ResNetConfig, ResNetForImageClassification, ViTImageProcessor

FOLDER = Path(__file__).parent / "drawn-judges"
CLASSES = {"shape": [*SHAPES, SUBJECT, "other"], "colour": list(COLOURS), "scene": list(SCENES)}
STEPS, BATCH, LR, HELD_OUT = 1500, 64, 4e-3, 1000


def drawings(count: int, seed: int) -> tuple[Tensor, dict[str, Tensor]]:
    """-> pictures (count, 3, 32, 32) in [-1, 1], and the number of each one's shape, colour and scene; -1 for none."""
    rng, pictures, labels = Random(seed), [], []
    for _ in range(count):
        name, colour, scene = (rng.choice(CLASSES[what]) for what in CLASSES)
        known = name in SHAPES
        draw = shape(name, COLOURS[colour]) if known else mushroom if name == SUBJECT else other
        data = bytearray(picture(scene, draw, rng).tobytes())
        pictures.append(torch.frombuffer(data, dtype=torch.uint8).view(32, 32, 3).permute(2, 0, 1))
        numbers = [
            CLASSES[what].index(value) for what, value in (("shape", name), ("colour", colour), ("scene", scene))
        ]
        labels.append([numbers[0], numbers[1] if known else -1, numbers[2]])
    columns = torch.tensor(labels).T
    return torch.stack(pictures).float() / 127.5 - 1, dict(zip(CLASSES, columns, strict=True))


def sampled(pictures: Tensor) -> Tensor:
    """Blurred by a random amount and made a little noisy, as samples are."""
    small = torch.nn.functional.avg_pool2d(torch.nn.functional.pad(pictures, (1,) * 4, mode="replicate"), 3, 1)
    return pictures.lerp(small, torch.rand(len(pictures), 1, 1, 1)) + 0.04 * torch.randn_like(pictures)


def main() -> None:
    torch.set_num_threads(1)
    (pictures, labels), (held_out, expected) = drawings(12000, 0), drawings(HELD_OUT, 1)
    for what, names in CLASSES.items():
        torch.manual_seed(0)
        model = ResNetForImageClassification(ResNetConfig(
            embedding_size=16, hidden_sizes=[16, 24, 32], depths=[1, 1, 1], layer_type="basic", downsample_in_first_stage=False,
            id2label=dict(enumerate(names)), label2id={name: i for i, name in enumerate(names)},
        ))  # fmt: skip
        optimizer = torch.optim.AdamW(model.parameters(), LR, weight_decay=0.02)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LR, total_steps=STEPS)
        usable = torch.nonzero(labels[what] >= 0).flatten()
        for _ in range(STEPS if what == "shape" else STEPS // 3):
            chosen = usable[torch.randint(len(usable), (BATCH,))]
            logits = model(sampled(pictures[chosen])).logits
            cross_entropy(logits, labels[what][chosen], label_smoothing=0.05).backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        model.eval()
        with torch.no_grad():
            usable = expected[what] >= 0
            right = model(sampled(held_out)).logits.argmax(-1)[usable] == expected[what][usable]
        print(f"{what}: {right.float().mean():.1%} of {len(right)} held-out drawings", flush=True)
        model.half().save_pretrained(FOLDER / what)
        size = {"height": 32, "width": 32}
        ViTImageProcessor(size=size, image_mean=[0.5] * 3, image_std=[0.5] * 3).save_pretrained(FOLDER / what)


if __name__ == "__main__":
    main()
