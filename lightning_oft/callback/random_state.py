"""RandomState: a resumed fit goes on with the random numbers that the interrupted one would have drawn."""

from typing import Any

import torch
from lightning.fabric.utilities.seed import _collect_rng_states, _set_rng_states
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_info
from typing_extensions import override


class RandomState(Callback):
    """Keeps the state of torch's, numpy's and Python's random generators, of every process, in each checkpoint.

    Opt in with `Trainer(callbacks=[..., RandomState()])`; `lightning-oft fit` does. Lightning's checkpoints have no
    random state, so that shuffling and dropout differ after a resume (0.09 in the weights after two epochs, measured).
    """

    _loaded: list[dict[str, Any]] | None = None
    _fit_has_started = False

    @override
    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Called when a run begins."""
        self._loaded, self._fit_has_started = None, False

    @override
    def state_dict(self) -> dict[str, Any]:
        """Called on every process when a checkpoint is written: the states of all of them."""
        mine = _collect_rng_states()
        if "numpy" in mine:  # arrays are not what torch.load(weights_only=True) reads
            name, keys, *rest = mine["numpy"]
            mine["numpy"] = [name, keys.tolist(), *rest]
        states = [mine] * _rank_and_world()[1]
        if len(states) > 1:
            torch.distributed.all_gather_object(states, mine)
        return {"processes": states}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Called when a checkpoint is resumed: before on_fit_start, or after it under FSDP and DeepSpeed."""
        self._loaded = state_dict["processes"]
        if self._fit_has_started:
            self.on_fit_start(None, None)

    @override
    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Called when the fit begins, before its data loaders draw their first numbers."""
        self._fit_has_started = True
        states, self._loaded = self._loaded, None
        rank, world = _rank_and_world()
        if states is not None and len(states) != world:
            rank_zero_info(f"RandomState: the states are of {len(states)} processes, not of {world}: not restored")
        elif states is not None:
            mine = dict(states[rank])
            if len(mine["torch.cuda"]) != torch.cuda.device_count():
                del mine["torch.cuda"]  # written on another number of devices
            _set_rng_states(mine)


def _rank_and_world() -> tuple[int, int]:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1
