"""Encoders: what is kept of pictures and prompts is what would be computed again, and is made anew when that changes."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import diffusion_models as tiny
import pytest
import torch
from diffusion_models import FAMILIES, SIZE
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import LambdaCallback
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_oft import OFTConfig, OFTFinetuning, inject
from lightning_oft.tasks import TextToImage
from lightning_oft.tasks.diffusion import encoded_rows, pipelines
from lightning_oft.tasks.diffusion.encoded_rows import EncodedRows

PROMPTS = ["a cat", "two dogs", "a cat"]


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return {family: tiny.save(family, tmp_path_factory.mktemp(family)) for family in FAMILIES}


def batch(size: int = SIZE) -> dict[str, Any]:
    pixels = torch.rand(3, 3, size, size, generator=torch.Generator().manual_seed(3)) * 2 - 1
    return {"pixel_values": pixels, "prompt": PROMPTS}


def errors(task: TextToImage, given: dict[str, Any] | None = None) -> Tensor:
    torch.manual_seed(0)
    return task.denoising_errors(given or batch())[0].detach()


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many pictures and prompts were encoded, call by call: pictures count as they are, prompts negative."""
    counts: list[int] = []
    pictures, prompts = pipelines.encode_pictures, pipelines.encode_prompts

    def count_pictures(vae: Any, pixels: Tensor) -> Tensor:
        counts.append(len(pixels))
        return pictures(vae, pixels)

    def count_prompts(pipeline: Any, family: Any, chosen: list[str], device: Any) -> dict[str, Tensor]:
        counts.append(-len(chosen))
        return prompts(pipeline, family, chosen, device)

    monkeypatch.setattr(pipelines, "encode_pictures", count_pictures)
    monkeypatch.setattr(pipelines, "encode_prompts", count_prompts)
    return counts


@pytest.mark.parametrize("family", FAMILIES)
def test_losses_are_the_same_with_a_cache_and_nothing_is_encoded_twice(
    bases: dict[str, str], tmp_path: Path, encoded: list[int], family: str
) -> None:
    plain = errors(TextToImage(bases[family]).eval())
    encoded.clear()
    kept = errors(TextToImage(bases[family], cache_dir=str(tmp_path)).eval())
    assert encoded == [3, -2]
    again = errors(TextToImage(bases[family], cache_dir=str(tmp_path)).eval())
    assert encoded == [3, -2]
    torch.testing.assert_close(kept, plain, atol=1e-6, rtol=1e-6)
    assert torch.equal(again, kept)


@pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`")
@pytest.mark.filterwarnings(r"ignore:Found \d+ module\(s\) in eval mode at the start of training")
@pytest.mark.parametrize("also", [[], ["text_encoder"]])
def test_a_fit_learns_the_same_with_a_cache(
    bases: dict[str, str], tmp_path: Path, encoded: list[int], also: list[str]
) -> None:
    def fit(**options: Any) -> list[Tensor]:
        losses: list[Tensor] = []
        keep = LambdaCallback(on_train_batch_end=lambda trainer, task, out, *_: losses.append(out["loss"].detach()))
        task = TextToImage(bases["sd"], prompt_dropout=0.3, optimizer=partial(torch.optim.AdamW, lr=0.01), **options)
        callbacks: list[Any] = [
            OFTFinetuning(oft_block_size=4, target_modules="all-linear", module=part, adapter_name=part)
            for part in ["unet", *also]
        ] + [keep]
        quiet: Any = dict.fromkeys(
            ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False
        )
        torch.manual_seed(2)
        rows = [{"pixel_values": one, "prompt": prompt} for one, prompt in zip(*batch().values(), strict=True)]
        loader: Any = DataLoader(rows, 3)  # type: ignore[arg-type]
        Trainer(accelerator="cpu", max_epochs=3, callbacks=callbacks, **quiet).fit(task, loader)
        return losses

    plain = fit()
    encoded.clear()
    kept = fit(cache_dir=str(tmp_path))
    assert sum(count for count in encoded if count > 0) == 3
    assert (sum(count for count in encoded if count < 0) == -9) is bool(also)
    torch.testing.assert_close(kept, plain, atol=1e-6, rtol=1e-6)


def brighter(task: TextToImage) -> dict[str, Any]:
    given = batch()
    given["pixel_values"][1] += 1e-3
    return given


def mirrored(task: TextToImage) -> dict[str, Any]:
    given = batch()
    given["pixel_values"][0] = given["pixel_values"][0].flip(-1)
    return given


def larger(task: TextToImage) -> dict[str, Any]:
    return batch(SIZE + 2)


def renamed(task: TextToImage) -> dict[str, Any]:
    return {**batch(), "prompt": ["a cat", "three dogs", "a cat"]}


def other_vae(task: TextToImage) -> dict[str, Any]:
    with torch.no_grad():  # less than half precision would show
        next(task.vae.parameters()).view(-1)[0] *= 1 + 1e-6
    task.configure_model()
    return batch()


def other_text_encoder(task: TextToImage) -> dict[str, Any]:
    with torch.no_grad():
        task.text_encoder.get_input_embeddings().weight[0, 0] += 1e-3
    task.configure_model()
    return batch()


def other_tokenizer(task: TextToImage) -> dict[str, Any]:
    letters = task.pipeline.tokenizer.get_vocab()
    letters["c"], letters["d"] = letters["d"], letters["c"]
    task.pipeline.tokenizer = type(task.pipeline.tokenizer)(vocab=letters, merges=[], model_max_length=16)
    task.encoders.tokenizers = pipelines.tokenizers(task.pipeline)
    return batch()


def half(task: TextToImage) -> dict[str, Any]:
    task.vae.to(torch.bfloat16)
    task.configure_model()
    return batch()


@pytest.mark.parametrize(
    ("change", "made"),
    [
        (brighter, [1]),
        (mirrored, [1]),
        (larger, [3]),
        (renamed, [-1]),
        (other_vae, [3]),
        (half, [3]),
        (other_text_encoder, [-2]),
        (other_tokenizer, [-2]),
    ],
)
def test_what_changes_is_made_again(
    bases: dict[str, str],
    tmp_path: Path,
    encoded: list[int],
    change: Callable[[TextToImage], dict[str, Any]],
    made: list[int],
) -> None:
    task = TextToImage(bases["sd"], cache_dir=str(tmp_path)).eval()
    errors(task)
    encoded.clear()
    given = change(task)
    changed = errors(task, given)
    assert encoded == made
    task.encoders.rows = None
    torch.testing.assert_close(errors(task, given), changed, atol=1e-6, rtol=1e-6)


def test_autocast_has_files_of_its_own(bases: dict[str, str], tmp_path: Path, encoded: list[int]) -> None:
    task = TextToImage(bases["sd"], cache_dir=str(tmp_path)).eval()
    errors(task)
    with torch.autocast("cpu", torch.bfloat16):
        errors(task)
    assert encoded == [3, -2, 3, -2]


def test_text_encoders_that_train_are_not_kept(bases: dict[str, str], tmp_path: Path, encoded: list[int]) -> None:
    task = TextToImage(bases["sd"], cache_dir=str(tmp_path)).eval()
    inject(task.text_encoder, OFTConfig(oft_block_size=4, target_modules="all-linear"))
    for _ in range(2):
        task.denoising_errors(batch())[0].sum().backward()
    assert encoded == [3, -3, -3]
    assert all(p.grad is not None for name, p in task.text_encoder.named_parameters() if "oft_R" in name)


def truncated(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-3])


def emptied(file: Path) -> None:
    file.write_bytes(b"")


def zeroed(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-8] + bytes(8))


@pytest.mark.parametrize("damage", [truncated, emptied, zeroed])
def test_a_damaged_file_is_named_and_made_again(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    rows, made = EncodedRows(tmp_path), {"words": torch.randn(1, 2, 3)}
    rows.get(["abc"], lambda places: made)
    (file,) = tmp_path.rglob("*.safetensors")
    damage(file)
    with pytest.warns(UserWarning, match=f"{file}: is damaged, and made again"):
        assert torch.equal(rows.get(["abc"], lambda places: made)["words"], made["words"])
    assert torch.equal(rows.get(["abc"], lambda places: pytest.fail("read again"))["words"], made["words"])


def test_a_process_killed_while_it_writes_leaves_nothing_that_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, write = {"words": torch.ones(1, 4)}, encoded_rows.save_file

    def die(row: Any, place: Path, metadata: Any) -> None:
        write(row, place, metadata)
        truncated(place)
        os._exit(9)

    monkeypatch.setattr(encoded_rows, "save_file", die)
    if not (child := os.fork()):
        EncodedRows(tmp_path).get(["abc"], lambda places: made)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    monkeypatch.undo()
    assert list(tmp_path.rglob("*.safetensors"))  # half of one
    calls: list[Any] = []
    for _ in range(2):  # without a warning
        assert (
            EncodedRows(tmp_path)
            .get(["abc"], lambda places: calls.append(places) or made)["words"]
            .equal(made["words"])
        )
    assert calls == [[0]]


def test_several_processes_fill_one_directory(tmp_path: Path) -> None:
    keys, made = [f"{number:02}" for number in range(20)], torch.randn(20, 64)
    children = []
    for _ in range(3):
        if not (child := os.fork()):
            found = EncodedRows(tmp_path).get(keys, lambda places: {"words": made[list(places)]})
            os._exit(0 if found["words"].equal(made) else 1)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0, 0]
    assert EncodedRows(tmp_path).get(keys, lambda places: pytest.fail("read"))["words"].equal(made)


def test_what_is_not_finite_is_not_kept_and_a_full_disk_stops_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, broken = EncodedRows(tmp_path), {"moments": torch.tensor([[1.0], [float("nan")]])}
    rows.get(["one", "two"], lambda places: broken)
    assert len(list(tmp_path.rglob("*.safetensors"))) == 1

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(encoded_rows, "write_file", full)
    with pytest.warns(UserWarning, match=r"not all that is encoded can be kept \(.*No space left.*\)"):
        assert rows.get(["three"], lambda places: {"moments": torch.ones(1, 2)})["moments"].equal(torch.ones(1, 2))
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="file: is a file where a directory is wanted"):
        EncodedRows(tmp_path / "file")


@pytest.mark.parametrize("family", ["sd", "sd3"])
def test_offloaded_parts_are_none_of_the_model_and_compute_the_same(bases: dict[str, str], family: str) -> None:
    plain = TextToImage(bases[family], sampling={"num_inference_steps": 1, "height": SIZE, "width": SIZE}).eval()
    names = ["vae", *plain.encoders.texts]
    task = TextToImage(bases[family], offload=names, sampling=plain.sampling).eval()
    assert torch.equal(errors(task), errors(plain))
    assert {name.split(".")[0] for name in task.state_dict()} == {task.model_attribute}
    assert task.sample(["a"], [0])[0].tobytes() == plain.sample(["a"], [0])[0].tobytes()


def test_a_copy_of_what_is_offloaded_is_on_the_device_for_a_while(
    bases: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    task = TextToImage(bases["sd"], offload=["vae"])
    parts = {name: list(getattr(task.pipeline, name).parameters()) for name in ("vae", "unet")}
    own = {name: [tensor.data_ptr() for tensor in tensors] for name, tensors in parts.items()}
    monkeypatch.setattr(Tensor, "to", lambda tensor, device: tensor.clone())  # as another device would
    with task.encoders.on_device(torch.device("cuda")):
        assert not set(own["vae"]) & {tensor.data_ptr() for tensor in parts["vae"]}
        assert own["unet"] == [tensor.data_ptr() for tensor in parts["unet"]]
    assert own["vae"] == [tensor.data_ptr() for tensor in parts["vae"]]


@pytest.mark.parametrize("name", ["unet", "text_encoder_2", "tokenizer"])
def test_only_encoders_are_offloaded(bases: dict[str, str], name: str) -> None:
    with pytest.raises(ValueError, match=f"offload='{name}': must be among vae, text_encoder;"):
        TextToImage(bases["sd"], offload=[name])


@pytest.mark.parametrize(("family", "limit"), [("sd", 16), ("sdxl", 16), ("sd3", 256), ("flux", 512)])
def test_a_prompt_longer_than_the_pipeline_reads_is_named(bases: dict[str, str], family: str, limit: int) -> None:
    task, pixels = TextToImage(bases[family]), torch.zeros(1, 3, SIZE, SIZE)
    prompt = "long " * (limit // 4)
    with pytest.warns(UserWarning, match=rf"prompt 'long .*': has \d+ tokens, and the pipeline reads {limit}; shorten"):
        task.encoders.conditions([prompt], pixels)
    task.encoders.conditions(["long"], pixels)


@pytest.mark.parametrize(("family", "size", "fits"), [("sd", 17, "16 or 18"), ("flux", 18, "16 or 20"), ("sd", 1, "2")])
def test_pictures_of_a_size_that_the_pipeline_does_not_take_are_refused(
    bases: dict[str, str], family: str, size: int, fits: str
) -> None:
    with pytest.raises(
        ValueError, match=f"pictures of {size} x {size} pixels; .* multiples of .: set the .* to {fits}$"
    ):
        errors(TextToImage(bases[family]), batch(size))


def test_a_loss_that_is_not_finite_names_its_prompt(bases: dict[str, str]) -> None:
    task, given = TextToImage(bases["sd"]), batch()
    given["pixel_values"][1, 0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match="step 0, prompt 'two dogs': the loss is nan; lower the learning rate"):
        task.training_step(given, 0)
