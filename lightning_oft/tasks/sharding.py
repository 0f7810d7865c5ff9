"""FSDP2 for the tasks: which submodules of a model are gathered and freed one at a time."""

from collections import Counter
from collections.abc import Sequence

from torch import nn
from torch.distributed.device_mesh import DeviceMesh


def shard_blocks(model: nn.Module, mesh: DeviceMesh, units: Sequence[nn.Module] | None = None) -> None:
    """Shard a model over the processes of ModelParallelStrategy (FSDP2), in place: each unit by itself, then the rest.

    The model is transformers' or any other, not the LightningModule, whose own forward is not called; `units` are gathered
    one at a time, by default `blocks(model)`. Units that are sharded already stay as they are, so that it can be called
    in every `configure_model`. Raises ValueError for tensor parallelism, which would compute the same several times.
    """
    from torch.distributed.fsdp import FSDPModule, fully_shard

    split = mesh["tensor_parallel"].size()
    if split > 1:
        raise ValueError(
            f"tensor_parallel_size={split}: this task shards its model but splits no layer; set tensor_parallel_size: 1 "
            f"and data_parallel_size: {mesh.size()} in ModelParallelStrategy"
        )
    for unit in (*(blocks(model) if units is None else units), model):
        if not isinstance(unit, FSDPModule):
            fully_shard(unit, mesh=mesh["data_parallel"])


def blocks(model: nn.Module) -> list[nn.Module]:
    """The repeated blocks of a model: of the classes that transformers must not split, else the members of
    a ModuleList or Sequential that are made of several modules.

    A block inside another is part of that one. A block that shares a parameter with the rest of the model is none: each
    unit would get a copy of its own.
    """
    modules = list(model.modules())
    declared = getattr(model, "_no_split_modules", None) or ()
    lists = [module for module in modules if isinstance(module, nn.ModuleList | nn.Sequential)]
    made = [
        [one for one in members if not isinstance(one, nn.ModuleList) and any(True for _ in one.children())]
        for members in lists
    ]
    named = [module for module in modules if type(module).__name__ in declared]
    found = [block for group in ([named] if named else made) for block in group if _is_repeated(block, group)]
    inner = {part for block in found for part in block.modules() if part is not block}
    uses = _uses(model)
    outer = [block for block in found if block not in inner]
    return [block for block in outer if all(uses[key] == count for key, count in _uses(block).items())]


def _is_repeated(block: nn.Module, group: Sequence[nn.Module]) -> bool:
    return sum(type(other) is type(block) for other in group) > 1


def _uses(module: nn.Module) -> Counter[int]:
    """How often each parameter is in a module."""
    return Counter(id(parameter) for _, parameter in module.named_parameters(remove_duplicate=False))
