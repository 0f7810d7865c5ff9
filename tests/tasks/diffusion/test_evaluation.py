"""Scores of samples against computations written here, with tiny random networks in the place of DINO and CLIP."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusion_models as tiny
import numpy as np
import pytest
import torch
import transformers
from diffusion_models import SIZE
from lightning.pytorch import Trainer
from PIL import Image
from scipy.linalg import sqrtm
from torch import Tensor
from torch.nn.functional import normalize

from lightning_oft import OFTConfig, OFTFinetuning, disable_adapters, inject, merge
from lightning_oft.data import DreamBoothDataModule, PictureDataModule
from lightning_oft.tasks import TextToImage
from lightning_oft.tasks.diffusion import distances, evaluation
from lightning_oft.tasks.diffusion.evaluation import Evaluation
from lightning_oft.tasks.diffusion.judges import Embedder, Judge

WIDTH = 8
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def networks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A DINO, a CLIP, a convolutional network, and one that reads no text."""
    torch.manual_seed(0)
    vision = {
        "hidden_size": WIDTH,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": SIZE,
        "patch_size": 8,
    }
    clip = transformers.CLIPConfig(
        text_config=tiny.text_encoder().config.to_dict(),
        vision_config={**vision, "hidden_size": 16, "intermediate_size": 16},
        projection_dim=WIDTH,
    )
    models = {
        "dino": transformers.Dinov2Model(transformers.Dinov2Config(**vision)),
        "clip": transformers.CLIPModel(clip),
        "fid": transformers.ResNetModel(
            transformers.ResNetConfig(embedding_size=4, hidden_sizes=[WIDTH], depths=[1], layer_type="basic")
        ),
    }
    processors: Any = getattr(transformers, "ViTImageProcessorPil", None) or transformers.ViTImageProcessor
    folders = {}
    for name, model in models.items():
        folders[name] = str(tmp_path_factory.mktemp(name))
        for parameter in model.parameters():
            parameter.data.normal_(0, 0.3)
        model.save_pretrained(folders[name])
        processors(size={"height": SIZE, "width": SIZE}).save_pretrained(folders[name])
    tiny.clip_tokenizer().save_pretrained(folders["clip"])
    return folders


def pictures(count: int, seed: int = 0) -> list[Any]:
    pixels = np.random.default_rng(seed).integers(0, 255, (count, SIZE, SIZE, 3), dtype=np.uint8)
    return [Image.fromarray(one) for one in pixels]


def tensors(images: list[Any]) -> Tensor:
    return torch.stack([torch.tensor(np.asarray(one)).permute(2, 0, 1) / 127.5 - 1 for one in images])


@torch.no_grad()
def dino(networks: dict[str, str], images: list[Any]) -> Tensor:
    model = transformers.Dinov2Model.from_pretrained(networks["dino"]).eval()
    return normalize(model(tensors(images)).last_hidden_state[:, 0])


@torch.no_grad()
def clip(networks: dict[str, str], images: list[Any], prompts: list[str]) -> tuple[Tensor, Tensor]:
    model = transformers.CLIPModel.from_pretrained(networks["clip"]).eval()
    words = tiny.clip_tokenizer()(prompts, return_tensors="pt", padding=True)
    both = model(pixel_values=tensors(images), **words)
    return both.image_embeds, both.text_embeds


def frechet(real: Any, made: Any) -> float:
    (one, other), (first, second) = (x.mean(0) for x in (real, made)), (np.cov(x.T) for x in (real, made))
    return float(((one - other) ** 2).sum() + np.trace(first + second - 2 * sqrtm(first @ second).real))


def kernel(real: Any, made: Any) -> float:
    def cubic(a: Any, b: Any) -> Any:
        return (a @ b.T / a.shape[1] + 1) ** 3

    count = len(real)
    inside = sum((k.sum() - np.trace(k)) / (count * (count - 1)) for k in (cubic(real, real), cubic(made, made)))
    return float(inside - 2 * cubic(real, made).mean())


@pytest.fixture
def data(tmp_path: Path) -> Any:
    """Nine pictures of a subject, nine prompts that name it and two that do not."""
    for number, picture in enumerate(pictures(9)):
        picture.save(tmp_path / f"{number}.png")
    asked = {"seen": [f"a SKS, {letter}" for letter in "bcdefghij"], "old": ["a cat", "a sksy dog"]}
    for name, prompts in asked.items():
        (tmp_path / f"{name}.jsonl").write_text("\n".join(json.dumps({"prompt": one}) for one in prompts))
    files = {name: str(tmp_path / f"{name}.jsonl") for name in asked}
    return DreamBoothDataModule(
        str(tmp_path), "a sks", size=SIZE, batch_size=4, test_prompts=files, subject="sks", horizontal_flip=1.0
    )


def adapted(base: str, **options: Any) -> TextToImage:
    task = TextToImage(base, sampling={"num_inference_steps": 2}, **options)
    inject(task.unet, OFTConfig(oft_block_size=4, target_modules="all-linear"))
    for name, parameter in task.unet.named_parameters():
        if "oft_R" in name:
            parameter.data.normal_(0, 0.5)
    return task


def scores_of(task: TextToImage, data: Any, root: Path, *callbacks: Any) -> dict[str, float]:
    quiet: Any = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing"), False)
    trainer = Trainer(accelerator="cpu", default_root_dir=root, callbacks=list(callbacks), **quiet)
    runs = trainer.test(task, datamodule=data, verbose=False)
    return {name.removeprefix("test/"): value for run in runs for name, value in run.items()}


def test_scores_are_those_of_the_papers(
    networks: dict[str, str], data: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    task = adapted(tiny.save("sd", tmp_path / "base"), evaluators={**networks, "fid": networks["clip"]})
    state = torch.get_rng_state()
    with caplog.at_level(logging.INFO):
        scores = scores_of(task, data, tmp_path)
    assert torch.equal(state, torch.get_rng_state())
    assert [one.getMessage() for one in caplog.records if "not scored" in one.getMessage()] == [
        "not scored: LPIPS: its network is no model of transformers"
    ]
    assert not any("evaluat" in name or "clip" in name for name in task.state_dict())
    real = pictures(9)
    prompts = {name: [row["prompt"] for row in data.splits[name]] for name in ("seen", "old")}
    made: dict[str, list[Any]] = {"seen": [], "old": task.sample(prompts["old"], range(2))}
    for start in range(0, 9, 4):  # rounding depends on the batch
        made["seen"] += task.sample(prompts["seen"][start : start + 4], range(start, min(start + 4, 9)))
    with disable_adapters(task):
        before = task.sample(prompts["old"], range(2))
    expected = {}
    for name in prompts:
        images, words = clip(networks, made[name], prompts[name])
        expected[f"{name}/CLIP-T"] = float((images * words).sum(1).mean())
    subject, _ = clip(networks, real, ["a"])
    seen, _ = clip(networks, made["seen"], ["a"])
    expected["seen/CLIP-I"] = float(np.mean([[float(x @ y) for y in subject] for x in seen]))
    others = dino(networks, real)
    expected["seen/DINO"] = float(np.mean([[float(x @ y) for y in others] for x in dino(networks, made["seen"])]))
    expected["old/drift"] = float((1 - (dino(networks, made["old"]) * dino(networks, before)).sum(1)).mean())
    embed = transformers.CLIPModel.from_pretrained(networks["clip"]).eval().get_image_features
    with torch.no_grad():
        vectors = [embed(tensors(images)).pooler_output.double().numpy() for images in (real, made["seen"])]
    expected["seen/FID"], expected["seen/KID"] = frechet(*vectors), kernel(*vectors)
    assert scores == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert scores["old/drift"] > 1e-3


def test_a_network_without_class_token_is_the_mean_over_places(networks: dict[str, str]) -> None:
    model = transformers.ResNetModel.from_pretrained(networks["fid"]).eval()
    with torch.no_grad():
        expected = model(tensors(pictures(2))).pooler_output.flatten(1)
    torch.testing.assert_close(Embedder(networks["fid"]).embed(pictures(2), CPU), expected)


def test_nothing_has_drifted_before_it_is_trained(networks: dict[str, str], data: Any, tmp_path: Path) -> None:
    """And no sample is drawn twice for that."""
    task = TextToImage(tiny.save("sd", tmp_path / "base"), evaluators={"fid": networks["fid"]})
    task.sample_batch = lambda batch: pictures(len(batch["prompt"]), 1)  # type: ignore[method-assign]
    inject(task.unet, OFTConfig(oft_block_size=4, target_modules="all-linear"))
    assert scores_of(task, data, tmp_path)["old/drift"] == pytest.approx(0, abs=1e-6)


def test_a_merge_is_taken_back_to_see_what_has_drifted(networks: dict[str, str], data: Any, tmp_path: Path) -> None:
    task = adapted(tiny.save("sd", tmp_path / "base"), evaluators={"dino": networks["dino"]})
    data.test_prompts.pop("seen")
    expected = scores_of(task, data, tmp_path)["drift"]
    merge(task.unet)
    callback = OFTFinetuning(module="unet", oft_block_size=4, target_modules="all-linear")
    assert scores_of(task, data, tmp_path, callback)["drift"] == pytest.approx(expected, abs=1e-4)
    assert expected > 1e-3


def test_small_sets_of_pictures_are_compared_by_the_same_subsets() -> None:
    real, made = torch.randn(5, 3, generator=torch.manual_seed(0)), torch.randn(9, 3)
    assert distances.kernel_distance(real, made) == distances.kernel_distance(real, made)
    assert distances.kernel_distance(real, real[:4]) < distances.kernel_distance(real, made + 3)
    # torchmetrics 1.0 to 1.2 learn the width from what a picture is made into.
    assert distances._Embedded(3)(torch.zeros(1, 3, 299, 299, dtype=torch.uint8)).shape == (1, 3)


class Subject:
    """A data module of a subject, as far as a test asks it."""

    def __init__(self, subject: str | None = "sks", count: int = 3) -> None:
        self.subject, self.count = subject, count

    def real_pictures(self) -> Iterator[Any]:
        return iter(pictures(self.count))

    names_subject = DreamBoothDataModule.names_subject


NO_PICTURES = "FID, KID: the data has no pictures to compare with"
NO_SUBJECT = "DINO, CLIP-I, drift: the data has no subject; DreamBoothDataModule has"
GIVE = "give model.init_args.evaluators"
NAMED, OTHERS = "no test prompt names the subject", "every test prompt names the subject"


@pytest.mark.parametrize(
    ("given", "data", "prompts", "is_adapted", "reasons"),
    [
        ("", Subject(), ["a sks"], True, f"DINO, drift: {GIVE}.dino; CLIP-I, CLIP-T: {GIVE}.clip; FID, KID: {GIVE}.fid"),
        ("dino clip fid", None, ["a sks"], True, f"{NO_SUBJECT}; {NO_PICTURES}"),
        ("dino clip fid", SimpleNamespace(real_pictures=Subject().real_pictures), ["a", "b"], True, f"{NO_SUBJECT}; "
            f"FID: test has 2 samples and the data 3 pictures, both must be more than the {WIDTH} features of its network"),
        ("fid", Subject(), ["a sks"], True, f"DINO: {GIVE}.dino; CLIP-I, CLIP-T: {GIVE}.clip; drift: {OTHERS}; "
            f"FID: test has 1 samples and the data 3 pictures, both must be more than the {WIDTH} features of its network; "
            "KID: test has 1 samples and the data 3 pictures, both must be more than 1"),
        ("clip", Subject(None), ["a cat"], True, f"DINO: {GIVE}.dino; "
            f"drift: give data.init_args.subject, the word for it in prompts; FID, KID: {GIVE}.fid"),
        ("clip", Subject(), ["a sks", "a cat"], False,
            f"DINO: {GIVE}.dino; drift: there is no adapter to turn off; FID, KID: {GIVE}.fid"),
        ("dino clip fid", Subject(), ["a cat"], True, f"DINO, CLIP-I, FID, KID: {NAMED}"),
        ("dino clip", Subject(), ["a sks"], True, f"drift: {OTHERS}; FID, KID: {GIVE}.fid"),
    ],
)  # fmt: skip
def test_what_is_not_scored_is_named_with_the_reason(
    networks: dict[str, str], caplog: pytest.LogCaptureFixture,
    given: str, data: Any, prompts: list[str], is_adapted: bool, reasons: str,
) -> None:  # fmt: skip
    ours = Evaluation({}, {name: networks[name] for name in given.split()})
    ours.start(["test"], data, is_adapted, CPU)
    made = pictures(len(prompts), 1)
    before = made if ours.compares(prompts) else None
    ours.update("test", {"prompt": prompts, "labels": {}}, made, before, CPU)
    scores = ours.scores()
    with caplog.at_level(logging.INFO):
        ours.report(scores)
        ours.report(scores)
    (said,) = [one.getMessage() for one in caplog.records]
    assert said == f"not scored: {reasons}; LPIPS: its network is no model of transformers"
    assert {name.removeprefix("test/") for name in scores} == {
        one for one in evaluation.COLUMNS if f"{one}," not in said and f"{one}:" not in said
    }


def test_samples_of_all_processes_count(networks: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """This one has drawn nothing that is compared with the subject, the other has."""
    ours = Evaluation({}, {"dino": networks["dino"]})
    ours.start(["a", "b"], Subject(), True, CPU)
    ours.update("a", {"prompt": ["a cat"], "labels": {}}, pictures(1), pictures(1), CPU)
    others = {"a": {"DINO": [torch.tensor([0.25, 0.75])]}, "b": {"drift": [torch.tensor([0.5])]}}

    def gather(shares: list[Any], mine: Any) -> None:
        shares[:] = [mine, others]

    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    assert ours.scores() == pytest.approx({"a/DINO": 0.5, "a/drift": 0.0, "b/drift": 0.5}, abs=1e-6)


@pytest.mark.parametrize(
    ("evaluators", "error", "message"),
    [
        ({"lpips": "x"}, ValueError, "evaluators: 'lpips' is no evaluator; there are dino, clip, fid"),
        ({"dino": "./none"}, FileNotFoundError, "./none: no such folder"),
        ({"clip": "dino"}, OSError, "a Dinov2Model embeds no text; give a CLIP"),
        ({"dino": str(Path(__file__).parent)}, OSError, "AutoModel could not load a model"),
    ],
)
def test_what_is_no_such_network_is_refused(
    networks: dict[str, str], evaluators: dict[str, str], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message) as raised:
        Evaluation({}, {name: networks.get(path, path) for name, path in evaluators.items()})
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("name", "what"), [("preprocessor_config.json", "no image processor"), ("tokenizer*", "no tokenizer")]
)
def test_a_network_without_its_files_is_refused(networks: dict[str, str], tmp_path: Path, name: str, what: str) -> None:
    for file in Path(networks["clip"]).iterdir():
        if not file.match(name):
            (tmp_path / file.name).symlink_to(file)
    with pytest.raises(OSError, match=what) as raised:
        Evaluation({}, {"clip": str(tmp_path)})
    assert "\n" not in str(raised.value)


def test_a_judge_without_a_trained_head_is_refused(networks: dict[str, str]) -> None:
    with pytest.raises(OSError, match=r"has no ResNetForImageClassification; of its weights classifier.* is not there"):
        Judge(networks["fid"])


def test_a_subject_that_no_picture_shows_is_refused(data: Any) -> None:
    data.subject = "zwx"
    with pytest.raises(ValueError, match="subject='zwx': is in no prompt of the pictures, such as 'a sks'"):
        data.setup("test")


def test_pictures_of_no_subject_are_shown_as_they_are(tmp_path: Path) -> None:
    real = pictures(2)
    for number, picture in enumerate(real):
        picture.save(tmp_path / f"{number}.png")
    module = PictureDataModule(str(tmp_path), "a", size=SIZE)
    module.setup("test")
    assert [one.tobytes() for one in module.real_pictures()] == [one.tobytes() for one in real]
    assert len(module.shown(1)) == 1
