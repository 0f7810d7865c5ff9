"""DreamBoothDataModule: a few pictures of a subject, beside pictures of its class that the pipeline itself has made."""

import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_info
from torch.utils.data import Dataset
from typing_extensions import override

from lightning_oft.data.diffusion.pictures import PictureDataModule, Pictures
from lightning_oft.data.diffusion.sources import METADATA, Captioned, pictures_in
from lightning_oft.formats.atomic import write_directory


class Pairs(Dataset[Any]):
    """Each picture of a subject with one of its class under "prior"; the shorter of the two lists is repeated."""

    def __init__(self, subject: Pictures, prior: Pictures) -> None:
        self.subject, self.prior = subject, prior

    def __len__(self) -> int:
        return max(len(self.subject), len(self.prior))

    def __getitem__(self, index: int) -> dict[str, Any]:
        prior = self.prior[index % len(self.prior)]
        return {**self.subject[index % len(self.subject)], "prior": prior}


class DreamBoothDataModule(PictureDataModule):
    """DreamBooth (Ruiz et al. 2023): a few pictures of a subject, and what its class looks like to the pipeline.

    Batches are PictureDataModule's, with a second one under "prior" where there is a class. Validation shows the
    subject's pictures again.

    Args:
        data: Folder of the subject's pictures; those without a prompt of their own need `prompt`.
        prompt: A prompt with a word that means nothing, such as "a photo of sks dog".
        class_data: Folder of the class's pictures. Where it has fewer than `class_pictures`, the pipeline makes the rest
            before the fit, and they stay there.
        class_prompt: What those pictures are made of, such as "a photo of a dog"; one prompt, or several in turn.
        class_pictures: How many pictures of the class there are to be.
        subject: The word for the subject in prompts, such as "sks". A test scores samples of prompts that have it by the
            subject's pictures, and of the others how they changed; without it all are scored by the pictures.
        pictures: Arguments of PictureDataModule.

    Raises:
        ValueError: When class_data and class_prompt are not both given; on setup, when no picture's prompt names the
            subject; else as PictureDataModule.
        OSError: As PictureDataModule, and when class_data cannot be written.
    """

    cache_arguments = (*PictureDataModule.cache_arguments, "class_data", "class_prompts", "class_pictures")

    def __init__(
        self,
        data: str,
        prompt: str | None = None,
        class_data: str | None = None,
        class_prompt: str | list[str] | None = None,
        class_pictures: int = 200,
        subject: str | None = None,
        **pictures: Any,
    ) -> None:
        super().__init__(data, prompt, **pictures)
        if (class_data is None) != (not class_prompt) or class_pictures < 1:
            raise ValueError(
                f"class_data={class_data}, class_prompt={class_prompt}, class_pictures={class_pictures}: the first two go "
                "together, and of the pictures there is at least one"
            )
        if self.side_step is not None and class_data is not None:
            raise ValueError(
                "side_step: pictures of the class are square, and so must be those beside them; set it to null"
            )
        self.class_data, self.class_pictures, self.subject = class_data, class_pictures, subject
        self.class_prompts = [class_prompt] if isinstance(class_prompt, str) else class_prompt or []

    def names_subject(self, prompt: str) -> bool:
        """Whether a prompt has the subject's word, in upper or lower case; without one every prompt is taken to."""
        return self.subject is None or bool(
            re.search(rf"(?<!\w){re.escape(self.subject)}(?!\w)", prompt, re.IGNORECASE)
        )

    @override
    def prepare_data(self) -> None:
        """Called before the model is adapted: what is missing of the class's pictures is sampled from it."""
        if self.class_data is None or self.trainer is None:
            return
        folder = Path(self.class_data).expanduser()
        there = len(pictures_in(folder)) if folder.is_dir() else 0
        if there >= self.class_pictures:
            return
        rank_zero_info(f"{folder}: the pipeline makes {self.class_pictures - there} pictures of the class")
        model: Any = self.trainer.lightning_module
        device = model.device
        model.to(self.trainer.strategy.root_device)
        write_directory(folder, lambda place: self._complete(place, folder, model))
        model.to(device)

    def _complete(self, place: Path, folder: Path, model: Any) -> None:
        """Write into `place` what is in `folder`, and the pictures that are missing there."""
        rows = []
        if folder.is_dir():
            shutil.copytree(folder, place, dirs_exist_ok=True)
            kept = self.find(str(folder), self.class_prompts[0]) if pictures_in(folder) else []
            names = [Path(one.cell["path"]).relative_to(folder).as_posix() for one in kept]
            rows = [(name, one.prompt) for name, one in zip(names, kept, strict=True)]
        numbers = range(len(rows), self.class_pictures)
        for chunk in (numbers[i : i + self.batch_size] for i in range(0, len(numbers), self.batch_size)):
            prompts = [self.class_prompts[number % len(self.class_prompts)] for number in chunk]
            for number, prompt, picture in zip(chunk, prompts, model.sample(prompts, chunk), strict=True):
                picture.save(place / f"made-{number:05}.png")
                rows.append((f"made-{number:05}.png", prompt))
        lines = [json.dumps({"file_name": name, self.prompt_column: prompt}) + "\n" for name, prompt in rows]
        (place / METADATA).write_text("".join(lines), encoding="utf-8")

    @override
    def pictures(self, found: list[Captioned]) -> dict[str, Dataset[Any]]:
        if not any(self.names_subject(one.prompt) for one in found):
            raise ValueError(
                f"subject={self.subject!r}: is in no prompt of the pictures, such as {found[0].prompt!r}; give its word there"
            )
        subject = Pictures(found, self.size, self.horizontal_flip, self.side_step)
        splits: dict[str, Dataset[Any]] = {"train": subject, "val": Pictures(found, self.size, 0.0, self.side_step)}
        if self.class_data is not None:
            prior: Sequence[Captioned] = self.find(self.class_data, self.class_prompts[0])
            splits["train"] = Pairs(subject, Pictures(prior, self.size, self.horizontal_flip))
        return splits
