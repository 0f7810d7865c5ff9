"""Task: what a task declares so that it can be loaded, sharded, optimized, scored and exported."""

from typing import Any, ClassVar, Literal

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import nn
from typing_extensions import override

from lightning_oft.formats.pretrained import Companions
from lightning_oft.tasks.loading import load_pretrained
from lightning_oft.tasks.optimization import configure
from lightning_oft.tasks.sharding import blocks, shard_blocks

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
LRInterval = Literal["auto", "step", "epoch"]

IGNORED = -100
"""The label of a token that is neither learned nor scored, as in transformers."""


class Task(LightningModule):
    """Base of the tasks: a LightningModule around one library model. It works with and without OFT.

    A subclass loads its model in `__init__` with `load_model`, or assigns one to the attribute that `model_attribute`
    names, and writes `training_step`. It calls `self.save_hyperparameters(ignore=["optimizer", "lr_scheduler"])`
    itself: callables cannot travel in a checkpoint that is read with weights_only.

    Args:
        pretrained: The model to start from: a folder written by save_pretrained, or a hub id. None for neither.
        dtype: Data type that the weights are loaded in; "auto" for the checkpoint's.
        quantization_config: transformers' description of a quantized base.
        optimizer: Makes the optimizer from what is trainable when the run starts; rotations are not decayed.
        lr_scheduler: Makes the schedule from the optimizer. None keeps the learning rate.
        lr_interval: When the schedule advances; auto is every step for OneCycleLR and CyclicLR, else every epoch.
    """

    model_attribute: str = "model"
    """The attribute that holds the library model: "model", "unet", ..."""

    pipeline: Any = None
    """The diffusers pipeline that the library model is a part of, and as which it is exported; None for none."""

    loader: str = ""
    """What an export is given to so that all of it is loaded, where the library's own loader loses a part."""

    shown_scores: ClassVar[tuple[str, ...]] = ("acc",)
    """Parts of the names of the scores in a table of before and after."""

    def __init__(
        self,
        pretrained: str | None = None,
        dtype: Dtype = "float32",
        quantization_config: Any = None,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        lr_scheduler: LRSchedulerCallable | None = None,
        lr_interval: LRInterval = "auto",
    ) -> None:
        super().__init__()
        self.pretrained, self.load_dtype, self.quantization_config = pretrained, dtype, quantization_config
        self.optimizer, self.lr_scheduler, self.lr_interval = optimizer, lr_scheduler, lr_interval
        self.processor: Any = None if pretrained is None else Companions(pretrained)
        """The processor or tokenizer written beside an export; by default the files beside `pretrained`."""
        self.new_head: list[str] = []
        """Names of the modules of the head, where that is new and untrained; OFT trains them whole by default."""

    def load_model(self, auto_class: Any, **config_overrides: Any) -> list[str]:
        """Load the library model into `model_attribute`. Returns the modules of a new head; raises as `load_pretrained`,
        and ValueError when `pretrained` is None."""
        if self.pretrained is None:
            raise ValueError(f"{type(self).__name__}: pretrained is not given; give a folder or a hub id")
        options = {"dtype": self.load_dtype, "quantization_config": self.quantization_config}
        model, new_head = load_pretrained(auto_class, self.pretrained, **options, **config_overrides)
        setattr(self, self.model_attribute, model)
        self.new_head = new_head
        return new_head

    @property
    def library_model(self) -> nn.Module:
        """The model that is adapted, sharded and exported. Raises ValueError when `model_attribute` holds no module."""
        model = self._modules.get(self.model_attribute)
        if model is None:
            name = type(self).__name__
            raise ValueError(f"{name}: no module {self.model_attribute!r}; assign one, or name it in model_attribute")
        return model

    def companions(self) -> list[Any]:
        """Objects whose `save_pretrained` writes beside an export what plain libraries need: by default `processor`."""
        return [] if self.processor is None else [self.processor]

    def samples(self) -> dict[str, Any]:
        """By prompt, what the model makes of it now, text or a Pillow image; for a person to see. By default nothing."""
        return {}

    def sharded_units(self) -> list[nn.Module]:
        """The modules that FSDP2 gathers one at a time: by default the repeated blocks of the library model."""
        return blocks(self.library_model)

    def test_splits(self) -> list[str]:
        """The prefix under which each test set is logged, in the order of the loaders; known once testing starts.

        "test" for a single test set; "test/<name>" for several, by the data module's `test_names`, else by number.
        """
        count = len(self.trainer.num_test_batches)
        names = getattr(getattr(self.trainer, "datamodule", None), "test_names", None) or []
        names = names if len(names) == count else range(count)
        return ["test"] if count == 1 else [f"test/{name}" for name in names]

    @override
    def configure_model(self) -> None:
        """Called for every run: under ModelParallelStrategy (FSDP2) the library model is sharded."""
        if self.device_mesh is not None:
            shard_blocks(self.library_model, self.device_mesh, self.sharded_units())

    @override
    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Called when the run starts: optimize what is trainable by now, rotations without weight decay."""
        return configure(self, self.optimizer, self.lr_scheduler, self.lr_interval)
