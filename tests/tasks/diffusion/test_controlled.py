"""ControlledTextToImage: where the hint goes, that it starts at nothing, trains, is saved and draws."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import diffusion_models as tiny
import pytest
import torch
from diffusion_models import SIZE, diffusers
from lightning.pytorch import Trainer
from PIL import Image
from torch.utils.data import DataLoader

from lightning_oft import OFTFinetuning, load_adapter, load_from_checkpoint
from lightning_oft.tasks import ControlledTextToImage, TextToImage
from lightning_oft.tasks.diffusion.controlled import drawn_along

pytestmark = [
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`"),
    pytest.mark.filterwarnings(r"ignore:Found \d+ module\(s\) in eval mode at the start of training"),
    pytest.mark.filterwarnings("ignore:PEFT cannot represent the rotations of"),
]
SAMPLING = {"num_inference_steps": 2, "height": SIZE, "width": SIZE}
CONV: dict[str, Any] = {"target_modules": ["to_q", "to_v", "conv_in", "conv1"], "oft_block_size": 4}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return {family: tiny.save(family, tmp_path_factory.mktemp(family)) for family in ("sd", "sdxl", "sd3")}


def controls(count: int = 4) -> torch.Tensor:
    return torch.rand(count, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(5))


def loader() -> DataLoader[Any]:
    pixels = torch.rand(4, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(3)) * 2 - 1
    rows = zip(pixels, ("a cat", "two dogs", "sks", "a bird"), controls(), strict=True)
    return DataLoader([{"pixel_values": one, "prompt": said, "control": c} for one, said, c in rows], 2)  # type: ignore[arg-type]


def batch() -> dict[str, Any]:
    made: dict[str, Any] = next(iter(loader()))
    return made


def trainer(root: Path, *callbacks: Any) -> Trainer:
    quiet: Any = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing"), False)
    return Trainer(accelerator="cpu", max_epochs=1, default_root_dir=root, callbacks=list(callbacks), **quiet)


def oft(**options: Any) -> OFTFinetuning:
    return OFTFinetuning(module="unet", **CONV, **options)


def adam() -> Any:
    return partial(torch.optim.AdamW, lr=0.01)


def paint(task: Any) -> None:
    """Let the hint encoder, which starts at zero, say something."""
    torch.nn.init.normal_(task.unet.hint.conv_out.weight)


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_it_starts_as_the_pipeline_and_adds_its_hint_after_the_first_convolution(
    family: str, bases: dict[str, str]
) -> None:
    plain, task = TextToImage(bases[family]), ControlledTextToImage(bases[family], sampling=SAMPLING)
    seed = torch.Generator().manual_seed
    errors = task.denoising_errors(batch(), seed(0))[0]
    torch.testing.assert_close(errors, plain.denoising_errors(batch(), seed(0))[0], rtol=0, atol=0)
    paint(task)
    seen: list[torch.Tensor] = []
    handle = task.unet.down_blocks[0].register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["hidden_states"]), with_kwargs=True
    )
    with drawn_along(task.unet, batch()["control"]):
        TextToImage.denoising_errors(task, batch(), seed(0))
    TextToImage.denoising_errors(task, batch(), seed(0))
    handle.remove()
    torch.testing.assert_close(seen[0] - seen[1], task.unet.hint(batch()["control"]), rtol=1e-4, atol=1e-4)
    assert not task.unet.conv_in._forward_hooks


def test_prior_pictures_are_drawn_along_their_own_controls(bases: dict[str, str]) -> None:
    task, (first, second) = ControlledTextToImage(bases["sd"]), list(loader())
    paint(task)
    both = {key: torch.cat([first[key], second[key]]) for key in ("pixel_values", "control")}
    errors = [
        task.denoising_errors(one, torch.Generator().manual_seed(0))[0]
        for one in ({**first, "prior": second}, {**both, "prompt": [*first["prompt"], *second["prompt"]]})
    ]
    torch.testing.assert_close(*errors)


def test_a_sample_depends_on_its_own_control_and_seed_alone(bases: dict[str, str]) -> None:
    task = ControlledTextToImage(bases["sd"], sampling={**SAMPLING, "guidance_scale": 3.0})
    paint(task)
    both = task.sample(["a", "b"], [1, 2], controls(2))
    alone = task.sample(["b"], [2], controls(2)[1:])
    other = task.sample(["b"], [2], controls(2)[:1])
    assert _far(both[1], alone[0]) <= 1
    assert _far(other[0], alone[0]) > 1
    wide = Image.new("RGB", (3 * SIZE, 2 * SIZE))
    assert task.sample(["a"], [0], [wide])[0].size == (SIZE, SIZE)


def _far(one: Any, other: Any) -> int:
    """The largest difference of two pictures, in levels."""
    levels = [torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).int() for image in (one, other)]
    return int((levels[0] - levels[1]).abs().max())


def test_a_fit_trains_saves_and_exports_hint_and_rotations(
    bases: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.new("RGB", (SIZE, SIZE), "white").save(tmp_path / "control.png")
    options: dict[str, Any] = {"prompts": ["a", "a"], "sampling": SAMPLING, "optimizer": adam()}
    task = ControlledTextToImage(bases["sd"], [str(tmp_path / "control.png")] * 2, **options)
    run = trainer(tmp_path, oft(export_dir=str(tmp_path)))
    run.fit(task, loader())
    trained = task.unet.hint.state_dict()
    assert any(bool(value.any()) for name, value in trained.items() if name.startswith("conv_out"))
    shown = task.samples()
    assert [picture.size for picture in shown.values()] == [(2 * SIZE, SIZE)] * 2
    assert list(shown) == ["a (1)", "a (2)"]
    again = ControlledTextToImage(str(tmp_path / "merged"), sampling=SAMPLING)
    assert all(torch.equal(value, trained[name]) for name, value in again.unet.hint.state_dict().items())
    other = ControlledTextToImage(bases["sd"], sampling=SAMPLING)
    names = load_adapter(other.unet, tmp_path / "adapter")
    assert not any(name.startswith("hint") for name in names)
    drawn = [one.eval().sample(["a"], [0], controls(1))[0] for one in (task, again, other)]
    assert max(_far(drawn[0], one) for one in drawn[1:]) <= 1
    plain = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "merged")
    plain.set_progress_bar_config(disable=True)
    assert plain("a", **SAMPLING).images[0].size == (SIZE, SIZE)


def test_a_checkpoint_has_the_hint(bases: dict[str, str], tmp_path: Path) -> None:
    task = ControlledTextToImage(bases["sd"], optimizer=adam())
    run = trainer(tmp_path, oft(merge_on_fit_end=False))
    run.fit(task, loader())
    run.save_checkpoint(tmp_path / "last.ckpt")
    found = load_from_checkpoint(ControlledTextToImage, tmp_path / "last.ckpt")
    seed = torch.Generator().manual_seed
    expected = task.eval().denoising_errors(batch(), seed(0))[0]
    assert torch.equal(found.denoising_errors(batch(), seed(0))[0], expected)


def test_what_cannot_be_controlled_is_said(bases: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has a SD3Transformer2DModel, and control needs a UNet"):
        ControlledTextToImage(bases["sd3"])
    with pytest.raises(ValueError, match=r"controls: has 0 files, prompts 1; give one for each"):
        ControlledTextToImage(bases["sd"], prompts=["a"])
    with pytest.raises(OSError, match=r"controls: .*none\.png is no picture that can be read"):
        ControlledTextToImage(bases["sd"], [str(tmp_path / "none.png")], prompts=["a"])
    task = ControlledTextToImage(bases["sd"], sampling=SAMPLING)
    with pytest.raises(ValueError, match="needs a control image for each prompt"):
        task.sample(["a"], [0])
    with pytest.raises(ValueError, match=r"control: is of 16 x 8 pixels and the picture of 16 x 16; make them alike"):
        task.sample(["a"], [0], controls(1)[..., : SIZE // 2])
    assert not task.unet.conv_in._forward_hooks
