"""What happens after every real optimizer step: projection, and checks that rotations train and stay orthogonal."""

import contextlib
import functools
import operator
import warnings
from collections.abc import Callable
from typing import Any

import torch

from lightning_oft.callback import checks
from lightning_oft.codecs import is_sharded, local_part
from lightning_oft.functional import SERIES_TOLERANCE
from lightning_oft.layers.rotation import Rotation
from lightning_oft.model.traversal import some

_WATCH_EVERY = 100
"""Steps between two looks at the series' error: a look waits for the device."""


class Steps:
    """Acts after every real optimizer step: projects what that optimizer trains, and checks that it trains.

    A post hook of the raw optimizer is the only place that equals real updates under accumulation, manual
    optimization, gradient scalers that skip, and LBFGS (measured). Without optimizers, whoever knows of a step calls
    `stepped`. Generators are whole within `gathered(rotations)`; `project` pulls one rotation back into its ball.
    """

    def __init__(
        self,
        optimizers: list[Any],
        rotations: dict[str, Rotation],
        undo: contextlib.ExitStack,
        project: Callable[[Any], None] = operator.methodcaller("project"),
        gathered: Callable[[list[Any]], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
    ) -> None:
        self._rotations, self._project, self._gathered = rotations, project, gathered
        self._warned, self._count = False, 0
        for optimizer in optimizers:
            held = {id(tensor) for group in optimizer.param_groups for tensor in group["params"]}
            own = {name: rotation for name, rotation in rotations.items() if id(rotation.weight) in held}
            raw = getattr(optimizer, "optimizer", optimizer)
            undo.callback(raw.register_step_post_hook(functools.partial(self._after_step, own, dict(own))).remove)
        self._project_all(rotations)

    def _after_step(self, own: dict[str, Rotation], unchecked: dict[str, Rotation], *_: Any) -> None:
        idle = {name: rotation.weight for name, rotation in unchecked.items() if rotation.weight.grad is None}
        # An FSDP1 process that holds nothing of a rotation gets no gradient for it.
        checks.check_gradients([name for name, weight in idle.items() if weight.requires_grad and weight.numel()])
        unchecked.clear()
        self.stepped(own)

    def _project_all(self, rotations: dict[str, Rotation]) -> None:
        for rotation in rotations.values():
            if rotation.radius is not None:
                with self._gathered([rotation]):
                    self._project(rotation)

    def stepped(self, own: dict[str, Rotation]) -> None:
        """After a real step: pull back what was trained, and look at the series now and then."""
        self._project_all(own)
        self._count += 1
        if self._count % _WATCH_EVERY == 0:
            self.check_series()

    def check_series(self) -> None:
        """Warn once where a truncated series is less orthogonal than float32 is. Raises RuntimeError where generators
        are NaN or infinite, before a checkpoint of them replaces a good one."""
        if not self._rotations:
            return
        with self._gathered(list(self._rotations.values())):
            weights = [rotation.weight.detach() for rotation in self._rotations.values()]
            broken = torch.stack([~local_part(weight).isfinite().all() for weight in weights])
            if any(is_sharded(weight) for weight in weights):  # all processes must know what one of them holds
                broken = broken.to(torch.uint8)
                torch.distributed.all_reduce(broken, torch.distributed.ReduceOp.MAX)
            names = [name for name, is_broken in zip(self._rotations, broken.tolist(), strict=True) if is_broken]
            if names:
                raise RuntimeError(
                    f"the generators of {some(names)} became NaN or infinite in training: lower the learning rate or "
                    "clip gradients (gradient_clip_val), and start again from the last checkpoint"
                )
            errors = {name: one.error_bound() for name, one in self._rotations.items() if not self._warned}
        name = max(errors, key=lambda key: errors[key], default=None)
        if name is not None and errors[name] > SERIES_TOLERANCE:
            self._warned = True
            warnings.warn(
                f"{name}: its rotation has grown so large that a series of {self._rotations[name].terms} terms is off "
                f"orthogonality by {errors[name]:.1e} (above {SERIES_TOLERANCE:.0e}): set use_cayley_neumann=false for "
                "the exact map, more num_cayley_neumann_terms (even), or max_angle",
            )
