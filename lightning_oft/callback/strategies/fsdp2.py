"""FSDP2 and tensor parallel (ModelParallelStrategy): parameters are DTensors, cut by the user in configure_model."""

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FSDPModule, fully_shard
from typing_extensions import override

from lightning_oft.callback.strategies.base import StrategyAdapter, check_cut
from lightning_oft.callback.strategies.steps import Steps
from lightning_oft.codecs import is_sharded, packed_codec
from lightning_oft.formats.checkpoint import frozen_names
from lightning_oft.formats.checkpoint_file import CheckpointError
from lightning_oft.layers.rotation import Rotation
from lightning_oft.layers.state import every_rotation, rotations_of
from lightning_oft.layers.tensor_parallel import cut_inside, divides
from lightning_oft.model.traversal import Modules, adapted, oft_layers, walk


class FSDP2Adapter(StrategyAdapter):
    """FSDP2 (ModelParallelStrategy): a process holds some rows of each parameter, and some blocks of each rotation."""

    _steps: Steps | None = None

    @override
    def injects_early(self) -> bool:
        """torch's parallelize_module splits a layer with all that is below it, and fails on rotations."""
        return bool(self.trainer.strategy.device_mesh["tensor_parallel"].size() == 1)

    @override
    def check_packed(self, modules: Modules) -> None:
        """What does not let itself be cut, and 4-bit codes stored as floating-point numbers that a unit would round: of a
        dtype of the same size that gives other weights without an error."""
        if self.trainer.strategy.device_mesh["data_parallel"].size() == 1:
            return
        check_cut(modules, "ModelParallelStrategy")
        dtypes: dict[nn.Module, torch.dtype | None] = {}
        for unit in (module for module in modules.values() if isinstance(module, FSDPModule)):  # from the outermost
            dtypes |= dict.fromkeys(unit.modules(), unit._get_fsdp_state()._mp_policy.param_dtype)
        for name, module in modules.items():
            codec, dtype = packed_codec(module), dtypes.get(module)
            if codec is not None and dtype is not None and not codec.survives_cast(module, dtype):
                raise ValueError(
                    f"{name}: MixedPrecisionPolicy(param_dtype={dtype}) of its unit would cast its quantized weight, which "
                    "destroys it: load the base with bnb_4bit_quant_storage=uint8"
                )

    @override
    def after_inject(self, root: nn.Module) -> None:
        """Make every rotation a unit of its own, before or after the user shards the layers around it. Plain inside a
        sharded layer, each rank would train its own (5.4e-2 apart, measured); inside the layer's unit, a mixed
        precision policy would round its generators."""
        meshes = self.trainer.strategy.device_mesh
        if meshes["tensor_parallel"].size() > 1:
            _broadcast_rotations(root, meshes["tensor_parallel"])
        if meshes["data_parallel"].size() == 1:
            return
        for rotation in (rotation for layer in oft_layers(root).values() for rotation in every_rotation(layer)):
            # One that the user injected before sharding lies in the unit around it, as sharded as can be.
            if not isinstance(rotation, FSDPModule) and not is_sharded(rotation.weight):
                fully_shard(rotation, mesh=meshes["data_parallel"])

    @override
    def watch_steps(self, rotations: dict[str, Rotation], undo: ExitStack) -> Steps:
        """Raise ValueError where torch cannot clip all gradients together: split in several ways, or not at all."""
        by_value = self.trainer.gradient_clip_algorithm == "value"
        for optimizer in self.trainer.optimizers if self.trainer.gradient_clip_val else ():
            trained = [tensor for group in optimizer.param_groups for tensor in group["params"] if tensor.requires_grad]
            meshes = {getattr(tensor, "device_mesh", None) for tensor in trained}
            if len(meshes) > 1 and (not by_value or None in meshes):
                ways = "" if by_value or None in meshes else "set gradient_clip_algorithm='value', or "
                raise ValueError(
                    f"gradient_clip_val={self.trainer.gradient_clip_val}: torch cannot clip together rotations, biases "
                    f"and modules_to_save that are split in different ways: {ways}set bias='none', or do not clip"
                )
        self._steps = super().watch_steps(rotations, undo)
        return self._steps

    def _set_real(self, is_real: bool) -> None:
        if self._steps is not None:
            self._steps.is_real = is_real

    @override
    def merge_device(self) -> torch.device | None:
        """Every process merges the rows it holds, where they are."""
        return None

    @override
    def prepare(self, pl_module: Any, adapter_only: bool, undo: ExitStack) -> None:
        """FSDP2 loads whatever the module's state_dict names, before any hook: so it names the adapter only."""
        super().prepare(pl_module, adapter_only, undo)
        strategy = self.trainer.strategy

        def load_checkpoint(path: Any, *args: Any, **kwargs: Any) -> Any:
            if self.trainer.state.fn == "fit" and Path(path).is_file():
                _check_optimizer_states(path, self.trainer)
            # torch makes an optimizer's state by a step without a gradient, on parameters that are loaded already.
            self._set_real(False)
            try:
                return type(strategy).load_checkpoint(strategy, path, *args, **kwargs)
            finally:
                self._set_real(True)

        strategy.load_checkpoint = load_checkpoint
        undo.callback(strategy.__dict__.pop, "load_checkpoint", None)
        if adapter_only:
            pl_module.strict_loading = False  # the base is not in the file; `check_loaded` is strict about the rest
            undo.callback(pl_module.register_state_dict_post_hook(_only_trained).remove)

    @override
    def whole_state(self, root: nn.Module) -> dict[str, Tensor] | None:
        """Gathered tensor by tensor, and kept on rank zero's CPU."""
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        state: dict[str, Any] = get_model_state_dict(root, options=options)
        return state


def _only_trained(module: Any, state_dict: dict[str, Any], prefix: str, local_metadata: Any) -> None:
    """Take out of a state dict what an adapter-only checkpoint leaves out."""
    for name in frozen_names(module, walk(module), [name.removeprefix(prefix) for name in state_dict]):
        state_dict.pop(prefix + name, None)


def _check_optimizer_states(path: Any, trainer: Any) -> None:
    """Raise CheckpointError for a checkpoint of another strategy, whose optimizer state numbers the parameters that
    train: Lightning takes them for numbers of all, as this strategy has them, and gives moments to the wrong ones."""
    try:  # mapped, not read: a full checkpoint holds the base too
        theirs = torch.load(path, map_location="cpu", mmap=True, weights_only=True).get("optimizer_states", [])
    except Exception:  # the strategy is about to say what is wrong with the file
        return
    places = {id(p): place for place, p in enumerate(trainer.lightning_module.parameters())}
    for state, optimizer in zip(theirs, trainer.optimizers, strict=False):
        numbers = {key for group in state["param_groups"] for key in group["params"]}
        mine = {places.get(id(p)) for group in optimizer.param_groups for p in group["params"]}
        if all(isinstance(number, int) for number in numbers) and numbers != mine:
            raise CheckpointError(
                f"{path}: was written under another strategy, whose optimizer state Lightning cannot give to "
                "sharded parameters: resume it under that strategy, or start a new run from its adapter: "
                f"lightning-oft export --checkpoint {path} --output DIR, and pretrained_adapter=DIR"
            )


def _broadcast_rotations(root: nn.Module, mesh: Any) -> None:
    """Start all processes of a tensor-parallel group with the same rotations. Raises ValueError where they could not
    stay the same: a cut goes through a block, or blocks drop out at random."""
    for name, layer, state in adapted(walk(root)):
        weights = state.layer_type.rotated_weights(layer)
        for part, rotation in (item for adapter in state.configs for item in rotations_of(layer, adapter).items()):
            weight: Any = layer.get_parameter(weights[part].parameter)
            names, places = (weight.device_mesh.mesh_dim_names, weight.placements) if is_sharded(weight) else ((), ())
            place = dict(zip(names or (), places, strict=False)).get(mesh.mesh_dim_names[0])
            # Replicated, or cut by rows, the fan-in is in one part.
            parts = 1 if getattr(place, "dim", state.layer_type.row_dim) == state.layer_type.row_dim else mesh.size()
            if not divides(rotation.block_size, parts, rotation.fan_in):
                raise ValueError(f"{name}: {cut_inside(rotation.fan_in, parts, rotation.block_size)}")
            if rotation.dropout > 0:
                raise ValueError(
                    f"{name}: module_dropout={rotation.dropout} with tensor_parallel_size={mesh.size()} would drop "
                    "other blocks on every process: set module_dropout=0"
                )
            if not rotation.identity_init and not is_sharded(rotation.weight):
                torch.distributed.broadcast(rotation.weight.detach(), group=mesh.get_group(), group_src=0)
