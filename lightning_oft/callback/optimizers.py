"""What the optimizers of a fit hold: rotations that are missing, parameters that OFT froze, weight decay."""

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from itertools import accumulate
from typing import Any

from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from lightning_oft.layers.rotation import Rotation
from lightning_oft.model.freezing import frozen_parameters
from lightning_oft.model.saved_modules import BASE, saved_tensors
from lightning_oft.model.traversal import Modules, adapted, is_inside, joined, some, walk


def check_rotations(optimized: Iterable[Tensor], rotations: Mapping[str, Rotation], pl_module: nn.Module) -> None:
    """Raise RuntimeError where a rotation is not among what optimizers hold: a list of parameters was taken before
    injection, and the rotation would never train."""
    ids = {id(tensor) for tensor in optimized}
    idle = [name for name, rotation in rotations.items() if not all(id(one) in ids for one in rotation.trained())]
    if not idle:
        return
    remedy = "build the optimizer in configure_optimizers from self.parameters(), not from a list made before the Trainer ran"
    if "configure_optimizers" in pl_module.__dict__:  # LightningCLI puts one there, with an optimizer that is made
        remedy = (
            "LightningCLI makes that of its `optimizer:` block before the Trainer runs: let the module take an "
            "OptimizerCallable and call it in configure_optimizers, or run lightning-oft fit with an oft: block"
        )
    raise RuntimeError(f"the rotations of {some(idle)} are in no optimizer and would never train: {remedy}")


def check_frozen(optimizers: list[Any], pl_module: nn.Module, module: str | None) -> None:
    """Raise RuntimeError for an optimizer in which nothing trains since OFT froze it, such as a discriminator's."""
    frozen = {id(parameter): name for name, parameter in frozen_parameters(walk(pl_module))}
    for number, optimizer in enumerate(optimizers, 1):
        held = [tensor for group in optimizer.param_groups for tensor in group["params"]]
        names = [frozen[id(tensor)] for tensor in held if id(tensor) in frozen]
        if names and not any(tensor.requires_grad for tensor in held):
            kind = type(getattr(optimizer, "optimizer", optimizer)).__name__
            is_ours = all(is_inside(name, module or "") for name in names)
            raise RuntimeError(
                f"optimizer {number} of {len(optimizers)} ({kind}) holds nothing that trains, OFT has frozen "
                f"{some(names)}: call requires_grad_(True) on what is to train in configure_optimizers"
                f"{', or name their modules in modules_to_save' if is_ours else ''}"
            )


def report(optimizers: list[Any], rotations: Mapping[str, Rotation], pl_module: nn.Module) -> None:
    """Log what nobody has asked for and an optimizer's owner may not expect, in one line each."""
    modules = walk(pl_module)
    if frozen := frozen_parts(modules):
        rank_zero_info(f"OFT: frozen beside the rotations: {some(frozen)}; modules_to_save trains what it names")
    if resting := thawed_layers(modules):
        rank_zero_info(
            f"OFT: {some(resting)} did not train before and turn now, other layers did: exclude_modules leaves what it "
            "names as it is"
        )
    decays = {
        id(tensor): f"weight_decay={group['weight_decay']} of {type(getattr(one, 'optimizer', one)).__name__}"
        for one in optimizers
        for group in one.param_groups
        if group.get("weight_decay")
        for tensor in group["params"]
    }
    decayed = {name: decays[id(one)] for name, own in rotations.items() for one in own.trained() if id(one) in decays}
    if decayed:
        rank_zero_info(
            f"OFT: {next(iter(decayed.values()))} pulls the rotations of {some(decayed)} back to the identity: "
            "lightning_oft.tasks.optimization.parameter_groups(self) gives them a group without"
        )


def frozen_parts(modules: Modules) -> list[str]:
    """The parts of a model that OFT has frozen whole, the outermost first: what holds no rotation and nothing else that
    an adapter trains. Parts that are alike but for the number of a layer are one: `layers.*.norm`."""
    layers = {name for name, _, _ in adapted(modules)}
    busy = layers | {saved.name.rpartition(".")[0] for saved in saved_tensors(modules) if saved.slot.live != BASE}
    above = {part for name in busy for part in ("", *accumulate(name.split("."), joined))}
    found = defaultdict[str, dict[str, None]](dict)
    for name, parameter in frozen_parameters(modules):
        owner = name.rpartition(".")[0]
        path = ("", *accumulate(owner.split("."), joined)) if owner else ("",)
        if parameter.requires_grad or not layers.isdisjoint(path):
            continue
        whole = next((part for part in path if part not in above), name)
        found[re.sub(r"(?<![^.])\d+(?=\.)", "*", whole)][whole] = None
    names = (like if len(parts) > 1 else next(iter(parts)) for like, parts in found.items())
    return sorted(names, key=lambda name: name.count("."))


def thawed_layers(modules: Modules) -> list[str]:
    """The adapted layers that somebody else had frozen whole, where others trained: a perceptual loss or a teacher
    below the same module is no less adapted for being frozen."""
    trained = {id(parameter) for _, parameter in frozen_parameters(modules)}  # a tied one is named in one of its places
    layers = {name: any(id(own) in trained for own in layer.parameters()) for name, layer, _ in adapted(modules)}
    return [name for name, did in layers.items() if not did] if any(layers.values()) else []
