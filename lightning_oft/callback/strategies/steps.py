"""What happens after every real optimizer step: projection, and checks that rotations train and stay orthogonal."""

import warnings
from contextlib import ExitStack
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
    optimization, gradient scalers that skip, and LBFGS (measured).
    """

    def __init__(self, optimizers: list[Any], rotations: dict[str, Rotation], undo: ExitStack) -> None:
        self._rotations = rotations
        self._warned = False
        self._count = 0
        for optimizer in optimizers:
            held = {id(tensor) for group in optimizer.param_groups for tensor in group["params"]}
            own = {name: rotation for name, rotation in rotations.items() if id(rotation.weight) in held}
            raw = getattr(optimizer, "optimizer", optimizer)
            undo.callback(raw.register_step_post_hook(self._after(own)).remove)
        for rotation in rotations.values():
            self.project(rotation)

    def _after(self, own: dict[str, Rotation]) -> Any:
        unchecked = dict(own)

        def after_step(*_: Any) -> None:
            checks.check_gradients(unchecked)
            unchecked.clear()
            self.stepped(own)

        return after_step

    def stepped(self, own: dict[str, Rotation]) -> None:
        """After a real step: pull back what was trained, and look at the series now and then."""
        for rotation in own.values():
            self.project(rotation)
        self._count += 1
        if self._count % _WATCH_EVERY == 0:
            self.check_series()

    def project(self, rotation: Rotation) -> None:
        """Pull one rotation back into its ball."""
        rotation.project()

    def check_series(self) -> None:
        """Warn once where a truncated series is less orthogonal than float32 is. Raises RuntimeError where generators
        are NaN or infinite, before a checkpoint of them replaces a good one."""
        self._check_finite()
        errors = {name: rotation.error_bound() for name, rotation in self._rotations.items() if not self._warned}
        name = max(errors, key=lambda key: errors[key], default=None)
        if name is None or errors[name] <= SERIES_TOLERANCE:
            return
        self._warned = True
        warnings.warn(
            f"{name}: its rotation has grown so large that a series of {self._rotations[name].terms} terms is off "
            f"orthogonality by {errors[name]:.1e} (above {SERIES_TOLERANCE:.0e}): set use_cayley_neumann=false for the "
            "exact map, more num_cayley_neumann_terms (even), or max_angle",
            stacklevel=2,
        )

    def _check_finite(self) -> None:
        weights = [rotation.weight.detach() for rotation in self._rotations.values()]
        if not weights:
            return
        broken = torch.stack([~local_part(weight).isfinite().all() for weight in weights])
        if any(is_sharded(weight) for weight in weights):  # all processes must know what one of them holds
            broken = broken.to(torch.uint8)
            torch.distributed.all_reduce(broken, torch.distributed.ReduceOp.MAX)
        names = [name for name, is_broken in zip(self._rotations, broken.tolist(), strict=True) if is_broken]
        if names:
            raise RuntimeError(
                f"the generators of {some(names)} became NaN or infinite in training: lower the learning rate or clip "
                "gradients (gradient_clip_val), and start again from the last checkpoint"
            )
