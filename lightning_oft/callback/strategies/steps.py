"""What happens after every real optimizer step: projection, and checks that rotations train and stay orthogonal."""

import contextlib
import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from lightning_oft import functional
from lightning_oft.callback import checks
from lightning_oft.codecs import is_sharded, local_part
from lightning_oft.functional import SERIES_TOLERANCE
from lightning_oft.layers.rotation import Rotation
from lightning_oft.model.activation import beyond_reach, largest_norms, left_message
from lightning_oft.model.traversal import has_compiled_code, some

_WATCH_EVERY = 100
"""Steps between two looks at rotations that nothing guards: a look waits for the device."""


class Steps:
    """Acts after every real optimizer step: projects what that optimizer trains, and checks that it trains.

    A rotation with series_guard="exact" leaves its series before a forward uses it beyond its reach. On a CPU it does
    so at once. An accelerator is not waited for: there the rotation is held at its reach for one step, at the end of
    which its process knows.

    A post hook of the raw optimizer is the only place that equals real updates under accumulation, manual
    optimization, gradient scalers that skip, and LBFGS (measured). Without optimizers, whoever knows of a step calls
    `stepped`, and who knows of one that is not real says so by `is_real`. Generators are whole within
    `gathered(rotations)`; `change` lets a function change rotations in place.
    """

    def __init__(
        self,
        optimizers: list[Any],
        rotations: dict[str, Rotation],
        undo: contextlib.ExitStack,
        change: Callable[[list[Any], Callable[[list[Any]], None]], None] = lambda rotations, act: act(rotations),
        gathered: Callable[[list[Any]], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
    ) -> None:
        self._rotations, self._change, self._gathered = rotations, change, gathered
        self._warned, self._count, self.is_real = False, 0, True
        self._unread: dict[int, Callable[[], dict[str, float]]] = {}  # norms on their way from an accelerator
        groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        self._optimized = [tensor for group in groups for tensor in group["params"]]
        trained = []
        for optimizer in optimizers:
            held = {id(tensor) for group in optimizer.param_groups for tensor in group["params"]}
            own = {
                name: rotation
                for name, rotation in rotations.items()
                if not held.isdisjoint(map(id, rotation.parameters()))
            }
            raw = getattr(optimizer, "optimizer", optimizer)
            undo.callback(raw.register_step_post_hook(functools.partial(self._after_step, own, dict(own))).remove)
            trained.append(own)
        for own in trained or [rotations]:
            self._hold(own)

    def _after_step(self, own: dict[str, Rotation], unchecked: dict[str, Rotation], *_: Any) -> None:
        if not self.is_real:
            return
        idle = {name: next((p for p in one.trained() if p.grad is None), None) for name, one in unchecked.items()}
        # Where training_step returns None, to skip a batch, Lightning steps without a backward: the next step is asked.
        if not any(p is not None for p in idle.values()) or any(tensor.grad is not None for tensor in self._optimized):
            # An FSDP1 process that holds nothing of a rotation gets no gradient for it.
            checks.check_gradients([name for name, p in idle.items() if p is not None and p.numel()])
            unchecked.clear()
        self.stepped(own)

    def stepped(self, own: dict[str, Rotation]) -> None:
        """After a real step: hold what was trained, and look at all of it now and then."""
        self._hold(own)
        self._count += 1
        if self._count % _WATCH_EVERY == 0:
            self.check_series()

    @torch.no_grad()
    def _hold(self, own: dict[str, Rotation]) -> None:
        """Project into the constraint's ball, and have what is beyond the reach of its series leave it."""
        held = {name: one for name, one in own.items() if one.reach is not None or one.ball is not None}
        if not held:
            return
        is_late = not all(_is_on_host(rotation) for rotation in held.values())
        with self._gathered(list(held.values())):
            norms = self._read(id(own), held, is_late)
            if not all(norm < torch.inf for norm in norms.values()):
                self.check_series()
            if left := beyond_reach(held, norms.items()):
                # Compiled code is made anew for each layer that goes another way: once for all of them is enough.
                left = [name for name, one in held.items() if one.reach is not None] if has_compiled_code() else left
                self._change([held[name] for name in left], _leave_series)
                rank_zero_info(left_message(left))
            within: dict[float, list[Rotation]] = {}
            for name, rotation in held.items():
                radius = min(rotation.ball or torch.inf, rotation.reach or torch.inf)
                if radius < torch.inf and (is_late or norms[name] > radius):
                    within.setdefault(radius, []).append(rotation)
            for radius, found in within.items():
                self._change(found, functools.partial(_project, radius))

    def _read(self, key: int, held: dict[str, Rotation], is_late: bool) -> dict[str, float]:
        """The largest norm of each rotation; those of the step before where these are still on an accelerator."""
        read: Callable[[], dict[str, float]] = functools.partial(
            _named, list(held), _begin_reading(largest_norms(held.values()))
        )
        if is_late:
            read, self._unread[key] = self._unread.get(key, dict), read
        return {name: norm for name, norm in read().items() if name in held}

    def check_series(self) -> None:
        """Warn once where a truncated series is less orthogonal than float32 is. Raises RuntimeError where generators
        are NaN or infinite, before a checkpoint of them replaces a good one."""
        if not self._rotations:
            return
        with self._gathered(list(self._rotations.values())):
            weights = [rotation.weight.detach() for rotation in self._rotations.values()]
            parts = [
                [local_part(one.detach()) for one in rotation.parameters()] for rotation in self._rotations.values()
            ]
            broken = torch.stack([~torch.stack([one.isfinite().all() for one in own]).all() for own in parts])
            if any(is_sharded(weight) for weight in weights):  # all processes must know what one of them holds
                broken = broken.to(torch.uint8)
                torch.distributed.all_reduce(broken, torch.distributed.ReduceOp.MAX)
            names = [name for name, is_broken in zip(self._rotations, broken.tolist(), strict=True) if is_broken]
            if names:
                raise RuntimeError(_not_finite(names))
            errors = {name: one.error_bound() for name, one in self._rotations.items() if not self._warned}
        name = max(errors, key=lambda key: errors[key], default=None)
        if name is not None and errors[name] > SERIES_TOLERANCE:
            self._warned = True
            warnings.warn(
                f"{name}: its rotation has grown so large that a series of {self._rotations[name].terms} terms is off "
                f"orthogonality by {errors[name]:.1e} (above {SERIES_TOLERANCE:.0e}): set series_guard='exact' or "
                "use_cayley_neumann=false for the exact map, more num_cayley_neumann_terms (even), or max_angle; an "
                "adapter that was loaded like this keeps its series",
            )


def _begin_reading(norms: Tensor) -> Callable[[], list[float]]:
    """A function that gives the numbers, and waits for no more than has been asked of the device by now."""
    if norms.device.type == "cpu":
        return norms.tolist
    copy, event = norms.to("cpu", non_blocking=True), torch.Event(norms.device)
    event.record()

    def read() -> list[float]:
        event.synchronize()
        numbers: list[float] = copy.tolist()
        return numbers

    return read


def _leave_series(rotations: list[Rotation]) -> None:
    for rotation in rotations:
        rotation.leave_series()


def _project(radius: float, rotations: list[Rotation]) -> None:
    functional.project_all([local_part(rotation.weight.detach()) for rotation in rotations], radius)


def _named(names: list[str], read: Callable[[], list[float]]) -> dict[str, float]:
    return dict(zip(names, read(), strict=True))


def _not_finite(names: list[str]) -> str:
    return (
        f"the generators of {some(names)} became NaN or infinite in training, since the loss or a gradient did: look for "
        "NaN in the data, lower the learning rate, clip gradients (gradient_clip_val), or keep rotations orthogonal by "
        "use_cayley_neumann=false (the exact map) or small by max_angle=20; start again from the last checkpoint"
    )


def _is_on_host(rotation: Rotation) -> bool:
    """Whether reading its generators waits for no device."""
    return rotation.weight.device.type == "cpu"
