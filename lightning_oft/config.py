"""OFTConfig: what an adapter is, with PEFT's field names; validation and nothing else."""

from dataclasses import dataclass
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints


@dataclass(frozen=True)
class OFTConfig:
    """Configuration of an orthogonal finetuning adapter.

    Field names and meanings are PEFT's, so `adapter_config.json` of either library is read by the other. `side`, `max_angle`,
    `magnitude`, `series_guard`, `coft_radius` and `neumann_series` are this library's own.

    Raises:
        ValueError: a field has a wrong type or value; the message names the field, what it got and what it takes.
    """

    oft_block_size: int | None = None
    """Size b of the rotation blocks, 32 unless `r` is given; a layer takes the nearest divisor of its fan-in, with a
    warning."""
    r: int = 0
    """Number of rotation blocks per layer, not their size."""
    target_modules: str | list[str] | None = "all-linear"
    """Layers to adapt: `all-linear` (linear, attention and expert layers, not the output embedding), a list of names (each
    matches a whole name or its end), a regular expression for the whole name, or null for the known architecture's
    own choice."""
    exclude_modules: str | list[str] | None = None
    """Layers to leave alone: a list of names or a regular expression."""
    side: Literal["input", "output"] = "input"
    """Rotate a layer's input, or its output less the bias."""
    layers_to_transform: int | list[int] | None = None
    """Adapt only these layer indices; `target_modules` is a list or null."""
    layers_pattern: str | list[str] | None = None
    """Name of the module list that `layers_to_transform` counts in, where it is not the first number of a name."""
    modules_to_save: list[str] | None = None
    """Modules trained whole and saved with the adapter, such as a new classification head."""
    bias: Literal["none", "all", "oft_only"] = "none"
    """Biases that train: none, all, or of adapted layers."""
    coft: bool = False
    """Constrain each block to the ball of radius `eps` after every optimizer step (COFT)."""
    eps: float = 6e-5
    """Freedom of the constrained rotation, as in the paper: ||Q||_F <= eps * b^2 / sqrt(number of blocks)."""
    max_angle: float | None = None
    """Constrain every plane's rotation to this many degrees, whatever the block size; switches the constraint on and
    takes the place of `eps`."""
    magnitude: Literal["joint", "after"] | None = None
    """Also train a scale per output neuron, W' = diag(m) W R^T: jointly with the rotations, or after them, beside those
    of a pretrained_adapter."""
    block_share: bool = False
    """Share one block among all blocks of a layer."""
    module_dropout: float = 0.0
    """Probability that a training step leaves a block out."""
    use_cayley_neumann: bool = True
    """Compute rotations by the truncated Cayley-Neumann series (fast) rather than the exact Cayley map."""
    num_cayley_neumann_terms: int = 6
    """Terms of the series. Prefer even numbers: 6 costs what 5 does and is a hundred times closer to orthogonal."""
    series_guard: Literal["exact", "project", "warn"] = "exact"
    """Where a layer's series is orthogonal to 1e-6 no longer: go on with the exact map, hold it inside, or only warn."""
    init_weights: bool = True
    """Start from the identity, not from random rotations."""
    fan_in_fan_out: bool = False
    """Kept for PEFT's files; a layer knows its storage."""
    task_type: str | None = None
    """PEFT's task type; SEQ_CLS and TOKEN_CLS add `classifier` and `score` to `modules_to_save`, QUESTION_ANS adds
    `qa_outputs`."""
    coft_radius: Literal["paper", "peft"] = "paper"
    """Which radius `eps` stands for: the paper's eps * b^2 / sqrt(n), or eps / sqrt(n) as PEFT 0.16 and later."""
    neumann_series: Literal["halved", "unhalved"] = "halved"
    """Whether the last term of the series is halved, as by PEFT 0.18 and later."""

    def __post_init__(self) -> None:
        _check_types(self)
        if self.r and self.oft_block_size:
            both = f"r={self.r} and oft_block_size={self.oft_block_size}"
            raise ValueError(f"{both} exclude each other: give one of them")
        if self.oft_block_size is None:
            object.__setattr__(self, "oft_block_size", 0 if self.r else 32)
        if self.r == 0 and self.oft_block_size == 0:
            raise ValueError("r=0 and oft_block_size=0: give one of them a positive value")
        size, terms, angle = self.oft_block_size or 0, self.num_cayley_neumann_terms, self.max_angle
        self._refuse(self.r < 0, "r", "must be positive, or 0 to use oft_block_size")
        self._refuse(size < 0, "oft_block_size", "must be at least 2")
        self._refuse(size == 1, "oft_block_size", "a block of size 1 cannot rotate; use at least 2")
        self._refuse(not 0 <= self.module_dropout < 1, "module_dropout", "must be in [0, 1)")
        self._refuse(not 0 < self.eps < 1e30, "eps", "must be a positive number")
        self._refuse(angle is not None and not 0 < angle < 180, "max_angle", "must be in degrees between 0 and 180")
        both = "'output' rotates what magnitudes would scale: set magnitude=None, or rotate the input"
        self._refuse(self.side == "output" and self.magnitude is not None, "side", both)
        too_few = "fewer than 2 terms never leave the identity; use an even number such as 6"
        self._refuse(self.use_cayley_neumann and terms < 2, "num_cayley_neumann_terms", too_few)
        too_many = "must be at most 1000; for more accuracy than 8 or 10 give, set use_cayley_neumann=false"
        self._refuse(terms > 1000, "num_cayley_neumann_terms", too_many)
        if self.layers_pattern is not None and self.layers_to_transform is None:
            raise ValueError(f"layers_pattern={self.layers_pattern!r} needs layers_to_transform")
        if self.layers_to_transform is not None and isinstance(self.target_modules, str):
            needs = f"needs target_modules as a list of names, or null, got {self.target_modules!r}"
            remedy = "list the names, or put the indices into the regular expression"
            raise ValueError(f"layers_to_transform={self.layers_to_transform!r} {needs}: {remedy}")
        known = f"must be one of PEFT's, {', '.join(TASK_TYPES)}, or null"
        self._refuse(self.task_type not in (None, *TASK_TYPES), "task_type", known)
        if self.target_modules in ("", []):
            raise ValueError("target_modules is empty: name the layers, or use 'all-linear'")

    def _refuse(self, wrong: bool, name: str, why: str) -> None:
        if wrong:
            raise ValueError(f"{name}={getattr(self, name)!r}: {why}")

    @property
    def fan(self) -> str:
        """The name of the size that blocks divide."""
        return "fan-in" if self.side == "input" else "fan-out"

    @property
    def constrained(self) -> bool:
        """Whether rotations are projected after every optimizer step."""
        return self.coft or self.max_angle is not None or (self.series_guard == "project" and self.use_cayley_neumann)


TASK_TYPES = ("SEQ_CLS", "SEQ_2_SEQ_LM", "CAUSAL_LM", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION")
"""What PEFT knows; it reads no adapter of any other."""

_WORDS = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "a string",
    list[str]: "a list of strings",
    list[int]: "a list of whole numbers",
    type(None): "null",
}


def _fits(value: Any, kind: Any) -> bool:
    """Whether a value is of a field's type; a whole number is also a number, and true is neither."""
    if get_origin(kind) is Literal:
        return value in get_args(kind) if isinstance(value, str) else False
    if get_origin(kind) is list:
        return isinstance(value, list) and all(_fits(item, get_args(kind)[0]) for item in value)
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, (int, float) if kind is float else kind)


def _check_types(config: OFTConfig) -> None:
    """Raise ValueError naming the first field whose value is of none of its types; sets and tuples become lists."""
    for name, annotation in get_type_hints(OFTConfig).items():
        value = getattr(config, name)
        if isinstance(value, (set, frozenset, tuple)):
            value = list(value) if isinstance(value, tuple) else sorted(value, key=str)
            object.__setattr__(config, name, value)
        kinds = get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)
        if not any(_fits(value, kind) for kind in kinds):
            takes = " or ".join(_WORDS.get(kind) or " or ".join(map(repr, get_args(kind))) for kind in kinds)
            raise ValueError(f"{name}={value!r}: must be {takes}")
