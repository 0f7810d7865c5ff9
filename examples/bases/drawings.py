"""The drawn world of examples/bases/drawn-sd: 8 shapes x 8 colours x 6 scenes, 32 x 32 pixels, and one thing it never saw.

    python examples/bases/drawings.py

writes examples/bases/drawn-subject: five pictures of a mushroom in four of the scenes, with their prompts; and
examples/bases/drawn-prompts: what is asked of a model that has learned it.
"""

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random

from PIL import Image, ImageDraw

SIDE, SCALE = 32, 4
"""Pixels of a side, and how many times larger it is drawn: shrinking makes the edges smooth."""
SHAPES = ("circle", "square", "triangle", "star", "heart", "moon", "cross", "ring")
COLOURS = {
    "red": (220, 40, 40), "orange": (245, 145, 30), "yellow": (245, 220, 50), "green": (40, 165, 70),
    "blue": (50, 95, 225), "purple": (135, 60, 190), "pink": (250, 145, 190), "brown": (125, 75, 40),
}  # fmt: skip
SCENES = {
    "white": "on white", "night": "at night", "grass": "on the grass",
    "beach": "on the beach", "sea": "on the sea", "snow": "in the snow",
}  # fmt: skip
SUBJECT, SUBJECT_SCENES = "mushroom", ("white", "night", "grass", "snow", "white")
"""What the base never saw, and the scenes in which its five pictures show it; the others stay unseen."""

Point = tuple[float, float]


def prompt(scene: str, *words: str) -> str:
    """`a red circle on the beach`."""
    return " ".join(["a", *words, SCENES[scene]])


def picture(
    scene: str, draw: Callable[[ImageDraw.ImageDraw, Random, float, float, float], None], rng: Random
) -> Image.Image:
    """A scene, and in it what `draw` puts at a place and in a size of its own."""
    image = Image.new("RGB", (SIDE * SCALE, SIDE * SCALE))
    canvas = ImageDraw.Draw(image)
    paint_scene(canvas, scene, rng)
    radius = rng.uniform(8.5, 10.5)
    x, y = (SIDE / 2 + rng.uniform(-2, 2) for _ in range(2))
    draw(canvas, rng, x * SCALE, y * SCALE, radius * SCALE)
    return image.resize((SIDE, SIDE), Image.Resampling.BOX)


def paint_scene(canvas: ImageDraw.ImageDraw, scene: str, rng: Random) -> None:
    """Fill the canvas with one of SCENES."""
    size = SIDE * SCALE
    above, below, share = {
        "white": ((246, 246, 244), (246, 246, 244), 1.0),
        "night": ((24, 22, 62), (24, 22, 62), 1.0),
        "grass": ((150, 205, 245), (95, 160, 75), 0.58),
        "beach": ((250, 205, 165), (235, 200, 130), 0.62),
        "sea": ((200, 230, 245), (35, 115, 165), 0.35),
        "snow": ((165, 172, 200), (240, 243, 250), 0.62),
    }[scene]
    horizon = min(size, size * (share + rng.uniform(-0.04, 0.04)))
    canvas.rectangle((0, 0, size, size), fill=above)
    canvas.rectangle((0, horizon, size, size), fill=below)
    if scene in ("night", "snow"):
        for _ in range(10):
            x, y, r = rng.uniform(0, size), rng.uniform(0, size if scene == "night" else horizon), rng.uniform(1.5, 3)
            canvas.ellipse((x - r, y - r, x + r, y + r), fill=(245, 240, 200) if scene == "night" else (250, 250, 255))
    if scene == "sea":
        for line in range(3):
            y, shift = horizon + (line + 0.6) * (size - horizon) / 3, rng.uniform(0, 6)
            wave = [(x, y + 3 * math.sin(x / 7 + shift)) for x in range(0, size + 1, 4)]
            canvas.line(wave, fill=(120, 190, 220), width=4)


def shape(
    name: str, colour: tuple[int, int, int]
) -> Callable[[ImageDraw.ImageDraw, Random, float, float, float], None]:
    """Draws one of SHAPES, slightly turned, in nearly this colour."""

    def draw(canvas: ImageDraw.ImageDraw, rng: Random, x: float, y: float, r: float) -> None:
        fill = (*(max(0, min(255, part + rng.randint(-10, 10))) for part in colour),)
        turn = rng.uniform(-0.2, 0.2)
        if name in ("circle", "ring"):
            width = round(r * 0.42) if name == "ring" else 0
            canvas.ellipse((x - r, y - r, x + r, y + r), None if width else fill, fill if width else None, width)
        else:
            cos, sin = math.cos(turn), math.sin(turn)
            points = [(x + r * (a * cos - b * sin), y + r * (a * sin + b * cos)) for a, b in outline(name)]
            canvas.polygon(points, fill=fill)

    return draw


def outline(name: str) -> Sequence[Point]:
    """Corners of a shape inside the unit circle, y downwards."""

    def on_circle(turns: Sequence[float], radii: Sequence[float]) -> list[Point]:
        return [(q * math.sin(math.tau * t), -q * math.cos(math.tau * t)) for t, q in zip(turns, radii, strict=True)]

    if name == "square":
        return [(-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85)]
    if name == "triangle":
        return on_circle([0, 1 / 3, 2 / 3], [1.1] * 3)
    if name == "star":
        return on_circle([n / 10 for n in range(10)], [1.1, 0.45] * 5)
    if name == "cross":
        a, b = 0.36, 1.0
        return [
            (-a, -b),
            (a, -b),
            (a, -a),
            (b, -a),
            (b, a),
            (a, a),
            (a, b),
            (-a, b),
            (-a, a),
            (-b, a),
            (-b, -a),
            (-a, -a),
        ]
    steps = [math.tau * n / 40 for n in range(40)]
    if name == "heart":
        wave = [13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t) for t in steps]
        return [(math.sin(t) ** 3, -w / 16) for t, w in zip(steps, wave, strict=True)]
    # The moon: the unit circle without that of radius 0.85 around (0.45, 0); they meet at these two angles.
    first, second = 1.0083, 1.4726
    outer = [(math.cos(t), math.sin(t)) for t in (first + (math.tau - 2 * first) * n / 30 for n in range(31))]
    back = (math.tau - second - (math.tau - 2 * second) * n / 30 for n in range(31))
    inner = [(0.45 + 0.85 * math.cos(t), 0.85 * math.sin(t)) for t in back]
    return [*outer, *inner]


def mushroom(canvas: ImageDraw.ImageDraw, rng: Random, x: float, y: float, r: float) -> None:
    """A red cap with white dots on a stem with a face."""
    dark, red, cream, white = (60, 30, 25), (205, 30, 35), (245, 225, 190), (255, 255, 255)
    line = SCALE
    canvas.rounded_rectangle((x - 0.45 * r, y - 0.1 * r, x + 0.45 * r, y + 0.95 * r), 0.25 * r, cream, dark, line)
    canvas.chord((x - 1.1 * r, y - r, x + 1.1 * r, y + 0.95 * r), 180, 360, red, dark, line)
    for a, b, size in ((0, -0.62, 0.26), (-0.62, -0.3, 0.22), (0.62, -0.3, 0.22)):
        q = size * r
        canvas.ellipse((x + a * r - q, y + b * r - q, x + a * r + q, y + b * r + q), white)
    for side in (-0.18, 0.18):
        canvas.ellipse((x + side * r - 3, y + 0.28 * r - 4, x + side * r + 3, y + 0.28 * r + 4), dark)


def other(canvas: ImageDraw.ImageDraw, rng: Random, x: float, y: float, r: float) -> None:
    """What is neither a shape nor the subject: a blob, dotted or not, the subject's cap, its stem, or pieces of it."""
    colour = (205, 30, 35) if rng.random() < 0.5 else rng.choice(list(COLOURS.values()))
    kind = rng.choice(("blob", "dotted", "cap", "stem", "pieces"))
    if kind in ("blob", "dotted", "pieces"):
        turns = [math.tau * n / 12 for n in range(12)]
        corners = [
            (x + r * rng.uniform(0.55, 1.1) * math.cos(t), y + r * rng.uniform(0.55, 1.1) * math.sin(t)) for t in turns
        ]
        canvas.polygon(corners, fill=colour)
    if kind == "cap":
        canvas.chord((x - 1.1 * r, y - r, x + 1.1 * r, y + 0.95 * r), 180, 360, colour)
    if kind in ("stem", "pieces"):
        place = x if kind == "stem" else x + rng.uniform(-0.5, 0.5) * r
        canvas.rounded_rectangle(
            (place - 0.45 * r, y - 0.1 * r, place + 0.45 * r, y + 0.95 * r), 0.25 * r, (245, 225, 190)
        )
    if kind in ("dotted", "pieces"):
        for _ in range(rng.randint(1, 4)):
            a, b, q = (x + rng.uniform(-0.6, 0.6) * r, y + rng.uniform(-0.6, 0.6) * r, rng.uniform(0.12, 0.26) * r)
            canvas.ellipse((a - q, b - q, a + q, b + q), (255, 255, 255))


def write_subject(folder: Path) -> None:
    """Five pictures of the subject and their prompts, as lightning_oft.data.DreamBoothDataModule reads them."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = Random(5)
    for number, scene in enumerate(SUBJECT_SCENES):
        picture(scene, mushroom, rng).save(folder / f"{number}.png")
    rows = [{"file_name": f"{n}.png", "prompt": prompt(scene, "sks")} for n, scene in enumerate(SUBJECT_SCENES)]
    write_rows(folder / "metadata.jsonl", rows)


def write_prompts(folder: Path) -> None:
    """Prompts to sample, with what the classifiers of drawn-judges should read: of the subject in scenes in which it was
    seen and in which it was not, and of what the base knows."""
    folder.mkdir(parents=True, exist_ok=True)
    seen = list(dict.fromkeys(SUBJECT_SCENES))
    for name, scenes in (("seen", seen), ("unseen", [scene for scene in SCENES if scene not in seen])):
        asked = [scenes[number % len(scenes)] for number in range(50)]
        rows = [{"prompt": prompt(scene, "sks"), "shape": SUBJECT, "scene": scene} for scene in asked]
        write_rows(folder / f"{name}.jsonl", rows)
    known = [(scene, colour, shape) for scene in SCENES for colour in COLOURS for shape in SHAPES]
    rows = [
        {"prompt": prompt(scene, colour, shape), "shape": shape, "colour": colour, "scene": scene}
        for scene, colour, shape in Random(3).sample(known, 100)
    ]
    write_rows(folder / "old.jsonl", rows)


def write_rows(path: Path, rows: Sequence[dict[str, str]]) -> None:
    """JSON, a row a line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    write_subject(Path(__file__).parent / "drawn-subject")
    write_prompts(Path(__file__).parent / "drawn-prompts")
