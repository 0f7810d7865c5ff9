"""Rotation: the generators of one fan-in as a module. Shapes: n blocks of size b, fan-in i = n*b."""

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Self, override

from lightning_oft import functional
from lightning_oft.config import OFTConfig
from lightning_oft.layers.reuse import Cached, SharedMap, is_plain, recorded_matrix
from lightning_oft.layers.tensor_parallel import Cut, gathered, local_part, rotate_spread, spread_like

Turn = Callable[[Tensor, Tensor], Tensor]


class Rotation(nn.Module):
    """A learned block-diagonal rotation of a fan-in; the identity until it is trained.

    `weight` holds the generators, (n, b(b-1)/2) float32 whatever the precision of the model, or (1, b(b-1)/2) where
    one block is shared. Calling the module rotates the last dimension of its input, of size `fan_in`.

    `magnitude`, (neurons,) float32 where the configuration has magnitudes fitted, are logarithms of one scale m per
    output neuron, which start at 0. So no scale reaches 0 or changes its sign, a merge can be undone, weight decay pulls
    to m = 1, and in bfloat16 a scale near 1 keeps its digits.
    """

    weight: nn.Parameter
    magnitude: nn.Parameter | None

    def __init__(
        self, fan_in: int, block_size: int, config: OFTConfig, device: Any = None, neurons: int | None = None
    ) -> None:
        super().__init__()
        self.fan_in = fan_in
        self.block_size = block_size
        self.blocks = fan_in // block_size
        self.dropout = config.module_dropout
        self.series_terms = config.num_cayley_neumann_terms if config.use_cayley_neumann else None
        self.terms = self.series_terms  # of the map in use; None is the exact one
        self.halve_last = config.neumann_series == "halved"
        self.guard = config.series_guard
        self.identity_init = config.init_weights
        shape = (1 if config.block_share else self.blocks, functional.generator_size(block_size))
        self.radius: float | None = None
        if config.max_angle is not None:
            self.radius = functional.angle_radius(config.max_angle)
        elif config.coft:
            size = block_size if config.coft_radius == "paper" else 1
            self.radius = functional.eps_radius(config.eps, size, shape[0])
        if self.terms is not None and self.guard == "project":
            reach = functional.reach_radius(self.terms, self.halve_last)
            self.radius = reach if self.radius is None else min(self.radius, reach)
        self.turns = config.magnitude != "after"  # whether the generators train
        self.weight = nn.Parameter(torch.empty(shape, dtype=torch.float32, device=device))
        self.magnitude = None
        if config.magnitude is not None and neurons is not None:
            self.magnitude = nn.Parameter(torch.empty(neurons, dtype=torch.float32, device=device))
        self.cached: Cached | None = None  # R of the last forward that records no gradients
        self.shared: SharedMap | None = None  # what computes R together with those of the layers beside
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Back to the identity, or to small random generators where the configuration asks for them."""
        if self.magnitude is not None:
            nn.init.zeros_(self.magnitude)
        if self.identity_init:
            nn.init.zeros_(self.weight)
        else:
            nn.init.normal_(self.weight, std=0.1)
            self.project()  # a constraint holds from the start

    def matrix(self, cut: Cut | None = None) -> Tensor:
        """The rotation R, (n, b, b) float32, or (1, b, b) where one block is shared; differentiable. With `cut`, the
        blocks of this process. Raises RuntimeError where the generators were rounded to half precision on the way."""
        generator = gathered(self.weight)
        if generator.dtype in (torch.bfloat16, torch.float16):
            rounded = (
                "rounded by the mixed precision of an FSDP unit, or by a trainer that casts what trains (TRL's do)"
            )
            remedy = "OFTFinetuning gives every rotation a unit of its own, OFTTrainerCallback keeps them float32"
            raise RuntimeError(f"the generators of a rotation arrive as {generator.dtype}, {rounded}: {remedy}")
        if cut is not None:
            generator = cut.generators(generator)
        with functional.constant_in_onnx():
            return functional.rotation_of(generator.float(), self.block_size, self.terms, self.halve_last)

    def forward(self, x: Tensor, transpose: bool = False, by: Turn | None = None, output_of: Any = None) -> Tensor:
        """x . blockdiag(R), (..., n*b) -> the same, as x in dtype, device and placements. With `transpose` of a weight,
        (neurons, n*b): diag(m) x . blockdiag(R)^T.
        With `by` another function of x and R than `functional.rotate`, for a caller who knows who reads the result.
        With `output_of` a layer, its output x but for the layer's bias, rotated; where there are magnitudes, scaled instead."""
        if output_of is not None and self.magnitude is not None:
            return _scaled(x, self.magnitude, output_of.bias)
        if type(x) is not Tensor and hasattr(x, "to_local"):
            kept = self._kept(x.device)  # once: a bias is turned as the output that it is in

            def rotated(local: Tensor, cut: Cut) -> Tensor:
                r_nbb = self._matrix_in(x.dtype, cut, kept)
                return functional.rotate(local, r_nbb.mT if transpose else r_nbb)

            turn: Any = functools.partial(rotate_spread, self.fan_in, self.block_size, rotated)
        else:
            r_nbb = self._matrix_in(x.dtype)
            if by is not None:
                return by(x, r_nbb)
            r_nbb = r_nbb.transpose(1, 2) if transpose else r_nbb  # no .mT: ONNX lacks it
            turn = functools.partial(functional.rotate, rotation=r_nbb)
        turned: Tensor = turn(x)
        if (bias := getattr(output_of, "bias", None)) is not None:  # in this order it is x to the bit where R is I
            turned = turned + (bias.to(x.dtype) - turn(bias.to(x.dtype)))
        if transpose and self.magnitude is not None:
            turned = turned * spread_like(gathered(self.magnitude).exp().to(x.dtype), x)[:, None]
        return turned

    def _kept(self, device: torch.device) -> Tensor | None:
        """Which blocks a training step does not leave out, drawn; None where it leaves none out."""
        is_full = not self.training or self.dropout == 0
        return None if is_full else torch.rand(self.blocks, 1, 1, dtype=torch.float32, device=device) >= self.dropout

    def _matrix_in(self, dtype: torch.dtype, cut: Cut | None = None, kept: Tensor | None = None) -> Tensor:
        is_traced, is_recorded = functional.is_traced(), functional.is_recorded()
        if not (self.training or is_recorded or is_traced):
            return self._fixed(dtype) if cut is None else cut.of(self._fixed(dtype))
        is_whole = cut is None and type(self) is Rotation  # a unit of FSDP gathers its own
        if is_whole and not is_traced and is_recorded and is_plain(self):
            r_nbb = recorded_matrix(self, dtype)
        else:
            r_nbb = self.matrix(cut).to(dtype)
        if (kept := self._kept(r_nbb.device) if kept is None else kept) is not None:
            r_nbb = torch.where(kept if cut is None else cut.of(kept), r_nbb, r_nbb.new_ones(self.block_size).diag())
        return r_nbb

    def _fixed(self, dtype: torch.dtype) -> Tensor:
        """The last rotation if nothing changed since, else a fresh one."""
        cached, weight = self.cached, self.weight  # once: another thread may put its own there
        if cached is not None and (found := cached.matrix) is not None and cached.serves(weight, dtype):
            return found
        matrix = self.matrix().to(dtype)
        if type(weight) is nn.Parameter and weight.is_contiguous() and not weight.is_meta:
            self.cached = Cached(self, matrix)
        return matrix

    def forget(self) -> None:
        """Compute R afresh when it is asked for next."""
        if self.cached is not None:
            self.cached.forget()
        self.cached = None

    @override
    def train(self, mode: bool = True) -> Self:
        self.forget()
        return super().train(mode)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Follow a move to a device and never a cast: half-precision generators and moments do not train."""
        self.forget()
        probe = fn(torch.zeros(1, dtype=torch.float32, device=self.weight.device))
        if probe.dtype != torch.float32:
            fn = functools.partial(torch.Tensor.to, device=probe.device)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def trained(self) -> list[nn.Parameter]:
        """What of it trains now."""
        return [parameter for parameter in self.parameters() if parameter.requires_grad]

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        """Say which map it is in the metadata that torch keeps with a state dict: as a tensor it would be a new key."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if prefix[:-1] in (metadata := getattr(destination, "_metadata", {})):
            metadata[prefix[:-1]]["exact"] = self.terms is None

    def _load_from_state_dict(self, state_dict: Any, prefix: str, local_metadata: Any, *args: Any) -> None:
        if f"{prefix}weight" in state_dict:
            self.use_map(local_metadata.get("exact", self.terms is None))
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "cached": None, "shared": None}

    def project(self, radius: float | None = None) -> None:
        """Pull every block into the ball ||Q_i||_F <= radius, in place: by default its own, where it has one."""
        weight, radius = local_part(self.weight), self.ball if radius is None else radius
        if radius is not None and weight.numel():  # blocks are rows: each shard has its own
            functional.project(weight, radius)

    @property
    def ball(self) -> float | None:
        """The radius in ||Q_i||_F that every block is held in after a step: the constraint's, and that of the exact map
        where the series was left; None where there is neither."""
        has_left = self.terms is None and self.series_terms is not None
        return min(self.radius or math.inf, functional.EXACT_RADIUS) if has_left else self.radius

    @property
    def reach(self) -> float | None:
        """The radius in ||Q_i||_F at which the series is left for the exact map; None where it is not to be, or where a
        constraint brings every step that goes so far back before it is used."""
        if self.terms is None or self.guard != "exact":
            return None
        reach = functional.reach_radius(self.terms, self.halve_last)
        return reach if self.radius is None or self.radius >= reach else None

    def leave_series(self) -> None:
        """Go on with the exact map, without a jump: the generators become those by which it turns as the series did."""
        weight = local_part(self.weight)
        if self.terms is not None and weight.numel():
            weight.copy_(functional.exact_generator(weight, self.block_size, self.terms, self.halve_last))
        self.use_map(exact=True)

    def use_map(self, exact: bool) -> None:
        """Compute R by the exact Cayley map from now on, or by the configuration's map again; the generators stay."""
        self.terms = None if exact else self.series_terms
        self.forget()

    def error_bound(self) -> float:
        """Upper bound of ||R^T R - I||_2 over the blocks here; 0 for the exact Cayley map. Waits for the device."""
        return functional.error_bound(local_part(self.weight), self.block_size, self.terms, self.halve_last)

    @override
    def extra_repr(self) -> str:
        series = "exact" if self.terms is None else f"{self.terms} terms"
        shared = ", shared" if self.weight.shape[0] < self.blocks else ""
        scaled = "" if self.magnitude is None else f", {len(self.magnitude)} magnitudes"
        return f"{self.fan_in}, {self.blocks} blocks of {self.block_size}, {series}{shared}{scaled}"


def _scaled(y: Tensor, magnitude: Tensor, bias: Tensor | None) -> Tensor:
    """m (y - bias) + bias as y + (m - 1) (y - bias), which is y to the bit where m is 1."""
    growth = spread_like(torch.expm1(gathered(magnitude)).to(y.dtype), y)
    return torch.addcmul(y, y if bias is None else y - bias.to(y.dtype), growth)
