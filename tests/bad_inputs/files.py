"""Adapter directories and checkpoints that are wrong, damaged, or of another model."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from bad_inputs.table import CONFIG, TENSORS, Bench, Mistake, fields, tensors
from lightning.pytorch.callbacks import ModelCheckpoint
from safetensors.torch import save_file
from small import Small, loader, oft, trainer
from torch import Tensor

from lightning_oft import load_adapter, load_from_checkpoint, save_adapter
from lightning_oft.formats import AdapterFileError, save_patch
from lightning_oft.formats.checkpoint import CheckpointError


def _load(damage: Any = None, **sizes: int) -> Any:
    return lambda bench: load_adapter(bench.net(**sizes), bench.adapter(damage))


def _file(name: str, make: Any, where: str, what: str, remedy: str, varies: bool = False) -> Mistake:
    return Mistake(name, "file", make, AdapterFileError, where, what, remedy, varies)


def _checkpoint(
    name: str, make: Any, where: str, what: str, remedy: str, varies: bool = False, error: Any = CheckpointError
) -> Mistake:
    return Mistake(name, "checkpoint", make, error, where, what, remedy, varies)


def _renamed(old: str, new: str) -> Any:
    return tensors(lambda found: {key.replace(old, new): value for key, value in found.items()})


def _generator(tensor: Tensor) -> Any:
    return tensors(lambda found: {"base_model.model.body.oft_R.weight": tensor})


def _cut(place: Path) -> None:
    (place / TENSORS).write_bytes((place / TENSORS).read_bytes()[:-10])


def _pickled(place: Path) -> None:
    (place / TENSORS).unlink()
    torch.save({}, place / "adapter_model.bin")


def _nested(bench: Bench) -> None:
    for name in ("a", "b"):
        save_adapter(bench.adapted(), bench.directory / name)
    load_adapter(bench.net(), bench.directory)


def _offline(bench: Bench) -> None:
    with patch("huggingface_hub.snapshot_download", side_effect=ConnectionError("no network")):
        load_adapter(bench.net(), "nobody/adapter")


def _blocks_file(bench: Bench, layer: str, beside: dict[str, Tensor]) -> Path:
    blocks = {"oft_blocks": torch.zeros(2, 4, 4), **beside}
    save_file({f"lycoris_{layer}.{kind}": one for kind, one in blocks.items()}, bench.directory / "x.safetensors")
    return bench.directory / "x.safetensors"


def _scaled(bench: Bench) -> Path:
    tensors = {"unet.body.oft_R.weight": torch.zeros(2, 6), "unet.body.oft_R.scaled_oft": torch.ones(())}
    save_file(tensors, bench.directory / "x.safetensors")
    return bench.directory / "x.safetensors"


def _blocks(**beside: Tensor) -> Any:
    return lambda bench: load_adapter(bench.net(), _blocks_file(bench, "body", beside))


class _Runs:
    """Unpickling this would run a command."""

    def __reduce__(self) -> Any:
        return os.system, ("touch pwned",)


def _entry(**changes: Any) -> dict[str, Any]:
    adapter = {"config": {"r": 2}, "layers": {"net.0": {"": 4}}, "fingerprints": {}, "owned": []}
    adapters = {"default": {**adapter, **changes}}
    return {"version": 1, "adapters": adapters, "active": ["default"], "merged": False, "adapter_only": True}


def _from(*, state: dict[str, Any] | None = None, **entries: Any) -> Any:
    return lambda bench: load_from_checkpoint(Small, bench.checkpoint(state_dict=state or {}, **entries))


def _rotation(value: float, layer: str = "net.0") -> dict[str, Tensor]:
    return {f"{layer}.oft_R.default.weight": torch.full((2, 6), value)}


def _bare(bench: Bench) -> Path:
    torch.save({"net.0.weight": torch.zeros(2)}, bench.directory / "bare.ckpt")
    return bench.directory / "bare.ckpt"


FILES = [
    _file("a directory that is not there", lambda b: load_adapter(b.net(), b.directory / "adaptor"),
        "adaptor", "no such file or directory", "give an adapter directory or a checkpoint"),
    _file("oft_blocks that stretch outputs too", _blocks(rescale=torch.full((8, 1), 2.0)),
        "x.safetensors: body", "its rescale stretches outputs, which no rotation does", "train it without `rescaled`"),
    _file("oft_blocks of another model", lambda b: load_adapter(b.net(), _blocks_file(b, "down", {})),
        "x.safetensors", "the model has no down to rotate", "load it into the model it was trained on"),
    _file("OneTrainer's scaled generators without their scale", lambda b: load_adapter(b.net(), _scaled(b)),
        "x.safetensors: body", "is scaled, by 2 sqrt(b-1) or, from a branch", "give read_onetrainer its scale"),
    _file("a full-weight patch", lambda b: load_adapter(b.net(), save_patch(b.adapted(), b.directory / "x.safetensors", "lora_unet_")),
        "x.safetensors", "is a full-weight patch: its rotations are in the changes of the weights", "give the adapter that it was written from"),
    _file("an adapter on a hub that does not answer", _offline,
        "nobody/adapter", "not here, and the hub does not give it", "give an adapter directory, a checkpoint or a hub id", True),
    _file("the directory above two adapters", _nested,
        CONFIG, "there are adapters in a, b", "give one of these directories"),
    _file("no tensors", _load(lambda place: (place / TENSORS).unlink()),
        TENSORS, "no such file", "copy it from where the adapter was saved"),
    _file("tensors as a pickle", _load(_pickled),
        TENSORS, "adapter_model.bin is a pickle, which may run code", "convert it to safetensors with PEFT"),
    _file("a configuration that is no JSON", _load(lambda place: (place / CONFIG).write_text("{'r': 4}")),
        CONFIG, "not a readable JSON file", "copy it again", True),
    _file("an adapter of LoRA's", _load(fields(peft_type="LORA")),
        CONFIG, "peft_type is 'LORA', not 'OFT'", "only OFT adapters are read"),
    _file("an adapter from before PEFT 0.14", _load(fields(oft_block_size=...)),
        CONFIG, "written before PEFT 0.14", "train the adapter again"),
    _file("a field of a wrong type", _load(fields(eps="small")),
        CONFIG, "eps='small': must be", "a number"),
    _file("a version that is none", _load(fields(peft_version="latest")),
        CONFIG, "peft_version='latest' is no version", "write that of the PEFT it was saved with"),
    _file("a file cut short", _load(_cut),
        TENSORS, "an interrupted write, or damaged since", "save or copy the adapter again"),
    _file("a file of git-lfs's", _load(lambda p: ((p / TENSORS).write_text("version https://git-lfs"), fields()(p))),
        TENSORS, "not a whole safetensors file", "copy it again", True),
    _file("generators that are NaN", _load(_generator(torch.full((2, 6), float("nan")))),
        TENSORS, "is NaN or infinite", "train it again"),
    _file("a wider model", _load(width=12),
        "body has fan-in 12", "the file's 2 blocks of 4 turn 8", "load the adapter into the model it was trained on"),
    _file("another model", _load(_renamed("body", "trunk")),
        "the model", "has no trunk", "load the adapter into the model it was trained on"),
    _file("a head of other classes",
        lambda b: load_adapter(b.net(classes=4), b.adapter(modules_to_save=["head"])),
        "head.bias", "has shape (4,) in the model and (3,) in the file", "build the model with the sizes it was trained with"),
    _file("an adapter of that name is there already",
        lambda b: load_adapter(b.adapted(target_modules=["layers.0"]), b.adapter()),
        "the model has another adapter 'default' already", "only one of them adapts", "or load it under another adapter_name"),
    _file("saving where a file is", lambda b: save_adapter(b.adapted(), b.text("taken", "") / "adapter"),
        "taken/adapter", "the adapter cannot be written", "or give another directory"),
]  # fmt: skip


def _without_oft(bench: Bench) -> None:
    keeper = ModelCheckpoint(bench.directory, save_last=True, save_top_k=0)
    trainer(bench.directory, oft(), keeper).fit(Small(), loader(), loader())
    place = str(bench.directory / "last.ckpt")
    trainer(bench.directory, oft(enabled=False)).fit(bench.watch(Small()), loader(), loader(), ckpt_path=place)


CHECKPOINTS = [
    _checkpoint("a file that is not there", lambda b: load_from_checkpoint(Small, b.directory / "best.ckpt"),
        "best.ckpt", "no such checkpoint file", "give one that ModelCheckpoint wrote", error=FileNotFoundError),
    _checkpoint("a file that is no checkpoint", lambda b: load_from_checkpoint(Small, b.text("x.ckpt", "epoch 3")),
        "x.ckpt", "is damaged", "copy it again", True),
    _checkpoint("a checkpoint that would run code", _from(callbacks=_Runs()),
        "model.ckpt", "holds more than tensors and plain values", "copy it again", True),
    _checkpoint("a bare state dict", lambda b: load_from_checkpoint(Small, _bare(b)),
        "bare.ckpt", "has no state_dict", "give a file that Lightning's ModelCheckpoint wrote"),
    _checkpoint("a checkpoint of a newer version", _from(lightning_oft={"version": 2}),
        "model.ckpt", "written by a newer lightning_oft", "upgrade it to read this checkpoint"),
    _checkpoint("a checkpoint whose entry is damaged", _from(lightning_oft=_entry(layers={"net.0": 4})),
        "model.ckpt", "its adapters are damaged", "copy it again"),
    _checkpoint("rotations that are not there", _from(lightning_oft=_entry(), state=_rotation(0.1, "net.3")),
        "model.ckpt", "lacks generators of net.0", "copy it again"),
    _checkpoint("generators that are NaN", _from(lightning_oft=_entry(), state=_rotation(float("nan"))),
        "net.0.oft_R.default.weight", "is NaN or infinite", "use an earlier state"),
    _checkpoint("another base", _from(lightning_oft=_entry(fingerprints={"net.0": "float32:0123456789abcdef"}), state=_rotation(0.1)),
        "net.0 differ", "the checkpoint was trained on another base", "load the base it was trained on"),
    _checkpoint("resumed with OFT switched off", _without_oft,
        "the checkpoint holds an adapter (default)", "OFTFinetuning(enabled=False) makes no place", "set enabled=True"),
    _checkpoint("a plain checkpoint of another model", _from(state={"net.weight": torch.zeros(2)}),
        "model.ckpt", "has net.weight, which the model lacks", "build the model that the checkpoint was written from"),
]  # fmt: skip
