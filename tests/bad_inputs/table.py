"""What a row of the table is, and what the mistakes are made with."""

from __future__ import annotations

import contextlib
import copy
import io
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lightning_oft import OFTConfig, inject, oft_layers, save_adapter
from lightning_oft.cli import main
from lightning_oft.layers import state_of

ROOT = Path(__file__).parents[2]
CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
Category = Literal["call", "config", "file", "checkpoint", "YAML", "command", "data", "reward", "picture"]


@dataclass(frozen=True)
class Mistake:
    """One wrong thing to do: how, which error it is (an exception's type or an exit code), and what the message says.

    `where`, `what` and `remedy` are parts of the message. `varies` marks one that repeats in brackets what another
    library said, which differs between its versions.
    """

    name: str
    category: Category
    make: Callable[[Bench], Any]
    error: type[Exception] | int
    where: str
    what: str
    remedy: str
    varies: bool = False


class Exit(Exception):
    """The command line ended with an exit code and these lines on standard error."""

    def __init__(self, code: int, said: str) -> None:
        super().__init__(said)
        self.code = code


class Net(nn.Module):
    """Two layers to adapt, one of a prime width, a norm, an attention and a head."""

    def __init__(self, width: int = 8, classes: int = 3) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Linear(width, 8)
        self.odd = nn.Linear(7, 7)
        self.layers = nn.ModuleList([nn.Linear(8, 8) for _ in range(2)])
        self.norm = nn.LayerNorm(8)
        self.attention = nn.MultiheadAttention(8, 2)
        self.head = nn.Linear(8, classes)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.norm(self.body(x)))
        return logits


def config(**options: Any) -> OFTConfig:
    """Turns `body`."""
    return OFTConfig(**{"oft_block_size": 4, "target_modules": ["body"], **options})


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Everything of a model that a refused call must leave alone."""
    states = {name: state for name, layer in oft_layers(model).items() if (state := state_of(layer))}
    return {
        "keys": list(model.state_dict()),
        "values": {name: value.clone() for name, value in model.state_dict().items() if not _is_lazy(value)},
        "trainable": [name for name, parameter in model.named_parameters() if parameter.requires_grad],
        "classes": [type(module) for module in model.modules()],
        "adapters": {name: (dict(state.configs), list(state.active), state.merged) for name, state in states.items()},
    }


def _is_lazy(value: Tensor) -> bool:
    return value.is_meta or isinstance(value, nn.parameter.UninitializedTensorMixin)


def is_same(before: dict[str, Any], after: dict[str, Any]) -> bool:
    """Whether two snapshots are of one state."""
    values, others = before["values"], after["values"]
    plain = all(before[key] == after[key] for key in before if key != "values")
    return plain and all(torch.equal(values[name].nan_to_num(), others[name].nan_to_num()) for name in values)


@dataclass
class Bench:
    """A temporary directory, and the things that mistakes are made with."""

    directory: Path
    watched: list[tuple[nn.Module, dict[str, Any]]] = field(default_factory=list)

    def watch(self, model: nn.Module) -> Any:
        """The model, which must be as it is now when the mistake has been made."""
        self.watched.append((model, snapshot(model)))
        return model

    def net(self, **sizes: int) -> Any:
        """A model without adapters."""
        return self.watch(Net(**sizes))

    def adapted(self, then: Callable[[Any], Any] | None = None, **options: Any) -> Any:
        """A model whose `body` is adapted, with something more done to it."""
        model = Net()
        inject(model, config(**options))
        if then is not None:
            then(model)
        return self.watch(model)

    def adapter(self, damage: Callable[[Path], Any] | None = None, **options: Any) -> Path:
        """An adapter directory for `body`, damaged."""
        model, place = Net(), self.directory / "adapter"
        inject(model, config(**options))
        save_adapter(model, place)
        if damage is not None:
            damage(place)
        return place

    def checkpoint(self, **entries: Any) -> Path:
        """A file as torch.save writes it."""
        place = self.directory / "model.ckpt"
        torch.save({"state_dict": {}, **entries}, place)
        return place

    def text(self, name: str, content: str | bytes) -> Path:
        """A file with this content."""
        file = self.directory / name
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
        return file

    def yaml(self, changes: dict[str, Any] | None = None) -> str:
        """The shipped vision configuration with some dotted keys set to other values."""
        content = copy.deepcopy(_VISION)
        for path, value in (changes or {}).items():
            *parents, last = path.split(".")
            place = content
            for key in parents:
                place = place.setdefault(key, {})
            place[last] = value
        return str(self.text("config.yaml", yaml.safe_dump(content)))

    def command(self, *arguments: str | Path) -> None:
        """Run the command line; raises Exit."""
        said = io.StringIO()
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
            code = main([str(argument) for argument in arguments])
        if code:
            raise Exit(code, said.getvalue().rstrip("\n"))


def _vision() -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load((ROOT / "configs" / "vision.yaml").read_text(encoding="utf-8"))
    content["model"]["init_args"]["pretrained"] = str(ROOT / "examples" / "bases" / "digits-vit")
    content["trainer"].update(max_epochs=1, accelerator="cpu", enable_progress_bar=False, enable_model_summary=False)
    content["oft"].pop("export_dir")
    return {**content, "test_before_and_after": False}


_VISION = _vision()


def fields(**changes: Any) -> Callable[[Path], None]:
    """Change fields of the configuration in an adapter directory; `...` takes one away. Our own key goes too."""

    def damage(place: Path) -> None:
        raw = {**json.loads((place / CONFIG).read_text()), "lightning_oft": ..., **changes}
        (place / CONFIG).write_text(json.dumps({key: value for key, value in raw.items() if value is not ...}))

    return damage


def tensors(change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> Callable[[Path], None]:
    """Change the tensors in an adapter directory."""

    def damage(place: Path) -> None:
        save_file(change(load_file(place / TENSORS)), place / TENSORS, {"format": "pt"})
        fields()(place)

    return damage
