"""FSDP2 for the tasks: which submodules of a model are gathered and freed one at a time."""

from collections import Counter
from collections.abc import Sequence

from torch import nn
from torch.distributed.device_mesh import DeviceMesh


def shard_blocks(model: nn.Module, mesh: DeviceMesh, units: Sequence[nn.Module] | None = None) -> None:
    """Shard a model over the processes of ModelParallelStrategy (FSDP2), in place: each unit by itself, then the rest.

    Units that are sharded already stay as they are, so that it can be called in every `configure_model`.

    Args:
        model: transformers' or any other model; not the LightningModule, whose own forward is not called.
        mesh: the strategy's, with the dimensions `data_parallel` and `tensor_parallel`.
        units: submodules that are gathered one at a time; None means `blocks(model)`.

    Raises:
        ValueError: tensor parallelism is asked for, which would compute the same thing several times.
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
    """The repeated blocks of a model: members of one class in a ModuleList or Sequential, the outermost of them.

    A block that shares a parameter with the rest of the model is not one: each unit would get a copy of its own.
    """
    found: list[nn.Module] = []
    for module in model.children():
        repeated = _repeated(module)
        found += repeated or blocks(module)
        if repeated:
            found += [block for member in module.children() if member not in repeated for block in blocks(member)]
    uses = _uses(model)
    return [block for block in found if all(uses[key] == count for key, count in _uses(block).items())]


def _repeated(module: nn.Module) -> list[nn.Module]:
    """The members that are made of several modules and not the only one of their class."""
    if not isinstance(module, nn.ModuleList | nn.Sequential):
        return []
    members = [member for member in module.children() if any(True for _ in member.children())]
    classes = Counter(type(member) for member in members)
    return [member for member in members if classes[type(member)] > 1]


def _uses(module: nn.Module) -> Counter[int]:
    """How often each parameter is in a module."""
    return Counter(id(parameter) for _, parameter in module.named_parameters(remove_duplicate=False))
