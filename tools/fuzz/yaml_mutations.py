"""Configuration files damaged as text and as values, and the parser of `lightning-oft fit` to read them with, built once."""

from __future__ import annotations

import copy
import random
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from fuzz.mutations import NUMBERS, TEXTS
from jsonargparse import Namespace
from lightning.pytorch.cli import LightningArgumentParser

from lightning_oft import OFTFinetuning
from lightning_oft.cli import config_files
from lightning_oft.cli.application import Application
from lightning_oft.cli.errors import UserError

CONFIG = Path(__file__).parents[2] / "configs" / "vision.yaml"
BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 10)
)
SNIPPETS = [
    BOMB, "oft: &o {r: *o}\n", "x: !!python/object/apply:os.getcwd []\n", "x: !!python/name:os.system\n", "<<: {oft: 3}\n", "---\n", "...\n",
    "\t- x\n", "oft: {r: 1, r: 2}\n", "? [a, b]\n: c\n", "%YAML 9.9\n", "a: " + "[" * 500 + "]" * 500 + "\n", "- a\n", "x: 2001-99-99\n", "x: !!binary x\n",
    "x: !!int y\n", "x: 1e999\n", "\x00", "\ufeff", "key: |\n" + "  long\n" * 2000, "{" * 300, "x: 0o9\n", "x: 0x" + "f" * 5000 + "\n", "trainer:\n",
]  # fmt: skip
KEYS = [
    "oft.oft_block_size", "oft.r", "oft.target_modules", "oft.exclude_modules", "oft.layers_to_transform", "oft.modules_to_save", "oft.bias",
    "oft.coft", "oft.eps", "oft.max_angle", "oft.module_dropout", "oft.use_cayley_neumann", "oft.num_cayley_neumann_terms", "oft.keep_base",
    "oft.enabled", "oft.export_dir", "oft", "model", "model.class_path", "model.init_args", "model.init_args.pretrained", "data", "data.init_args",
    "model.init_args.optimizer", "model.init_args.optimizer.init_args.lr", "model.init_args.lr_scheduler", "data.init_args.batch_size", "trainer",
    "trainer.max_epochs", "trainer.callbacks", "trainer.logger", "trainer.devices", "trainer.precision", "seed_everything", "ckpt_path",
    "optimizer", "lr_scheduler", "test_before_and_after", "config",
]  # fmt: skip


def value(rng: random.Random, depth: int = 0) -> Any:
    """A YAML value of any kind; shallow, since each level multiplies the alternatives that a parser tries."""
    kind = rng.randrange(7 if depth < 2 else 4)
    if kind == 0:
        return rng.choice([None, True, False])
    if kind == 1:
        return rng.choice(NUMBERS)
    if kind in (2, 3):
        return rng.choice(TEXTS)[:2000]
    if kind == 4:
        return [value(rng, depth + 1) for _ in range(rng.randrange(4))]
    if kind == 5:
        return {rng.choice(TEXTS)[:50]: value(rng, depth + 1) for _ in range(rng.randrange(4))}
    return {"class_path": value(rng, 2), "init_args": value(rng, 2)}


def _change(config: dict[str, Any], rng: random.Random) -> str:
    key = rng.choice(KEYS)
    what = rng.choice(["set", "set", "set", "add", "delete", "mistype"])
    *parents, last = key.split(".")
    place: Any = config
    for parent in parents:
        place = place.setdefault(parent, {}) if isinstance(place, dict) else None
    if not isinstance(place, dict):
        return "nothing"
    if what == "delete":
        place.pop(last, None)
    elif what == "mistype":
        place[last[:-1] + rng.choice("sxd_.")] = place.pop(last, 1)
    elif what == "add":
        place[rng.choice(TEXTS)[:200]] = value(rng)
    else:
        place[last] = value(rng)
    return f"{what} {key}"


def _damaged(text: str, rng: random.Random) -> bytes:
    content = text.encode("utf-8", "surrogatepass")
    at = rng.randrange(len(content) + 1)
    what = rng.randrange(4)
    if what == 0:
        return content[:at]
    if what == 1:
        return content[:at] + rng.randbytes(rng.choice([1, 2, 20])) + content[at:]
    if what == 2:
        return content[:at] + content[at + rng.choice([1, 3, 50]) :]
    line = content.rfind(b"\n", 0, at) + 1
    return content[:line] + rng.choice(SNIPPETS).encode() + content[line:]


def mutated(config: dict[str, Any], rng: random.Random) -> tuple[bytes, list[str]]:
    """A damaged configuration file, and what was done to it."""
    damaged = copy.deepcopy(config)
    done = [_change(damaged, rng) for _ in range(rng.choice([0, 1, 1, 2, 4]))]
    text = yaml.safe_dump(damaged, allow_unicode=rng.random() < 0.5)
    if not done or rng.random() < 0.2:
        return _damaged(text, rng), [*done, "text"]
    return text.encode("utf-8", "surrogatepass"), done


class _Built(Exception):
    """Carries the parser out of LightningCLI, which would go on and run."""


class _Stopped(Application):
    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        raise _Built(parser)


@cache
def parser() -> LightningArgumentParser:
    """The parser of `lightning-oft fit`: half a second to build, so once."""
    try:
        _Stopped(["fit"])
    except _Built as built:
        found: LightningArgumentParser = built.args[0]
        return found
    raise AssertionError("LightningCLI parsed nothing")


def read(file: Path) -> None:
    """What `lightning-oft fit --config FILE` does before it builds a model. Raises UserError for what it refuses."""
    arguments = ["fit", "--config", str(file)]
    config_files.check(arguments)
    config = parser().parse_args(arguments)
    try:
        if isinstance(config.fit.oft, Namespace):
            OFTFinetuning(**config.fit.oft.as_dict())
    except (ValueError, TypeError) as error:
        raise UserError(str(error)) from error
