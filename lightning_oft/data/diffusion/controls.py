"""ControlDataModule: pictures with prompts and control images, such as outlines, depth or poses."""

from pathlib import Path
from typing import Any

from torch.utils.data import Dataset
from typing_extensions import override

from lightning_oft.data.diffusion.pictures import PictureDataModule, to_control
from lightning_oft.data.diffusion.sources import Captioned, cell_of, find_pictures, read_prompts
from lightning_oft.data.vision.pixels import decode


class Asked(Dataset[Any]):
    """Prompts to sample, each with its control image: {"prompt", "seed", "labels", "control": (3, S, S) in [0, 1]}."""

    def __init__(self, rows: list[dict[str, Any]], size: int) -> None:
        self.rows, self.size = rows, size

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self.rows[index]
        return {**row, "control": to_control(row["control"], self.size)}


class ControlDataModule(PictureDataModule):
    """Pictures with prompts and control images, for ControlledTextToImage.

    Batches are PictureDataModule's with "control", (B, 3, H, W) float32 in [0, 1]: the same part of the control image as
    of the picture, mirrored with it. So are those of a test, each row of whose file names a control image too, relative
    to the file. A picture or control image that cannot be read is named in one warning, and left out with its other one.

    Args:
        data: Folder with a metadata.jsonl, rows of file_name, control and prompt; or a data set with these columns: a
            folder written by save_to_disk, or a hub id.
        prompt: The prompt of pictures that have none of their own.
        control_column: Column of a data set, of metadata.jsonl and of test files that holds the control images.
        pictures: Arguments of PictureDataModule.

    Raises:
        ValueError: On setup, when a row lacks one of the three, or names a file that is not there; else as
            PictureDataModule.
        OSError: As PictureDataModule.
    """

    columns = ("pixel_values", "prompt", "control")
    cache_arguments = (*PictureDataModule.cache_arguments, "control_column")

    def __init__(self, data: str, prompt: str | None = None, control_column: str = "control", **pictures: Any) -> None:
        super().__init__(data, prompt, **pictures)
        self.control_column = control_column

    @override
    def find(self, data: str, prompt: str | None) -> list[Captioned]:
        return find_pictures(data, prompt, self.image_column, self.prompt_column, self.control_column)

    @override
    def asked(self, path: str) -> Any:
        """A test set; raises ValueError that names the line where a control image is not there or cannot be read."""
        rows = read_prompts(path)
        for number, row in enumerate(rows, 1):
            where = f"{path}, line {number}"
            if (name := row["labels"].pop(self.control_column, None)) is None:
                raise ValueError(f"{where}: names no {self.control_column} image; add its path, relative to the file")
            row["control"] = cell_of(Path(path).expanduser().parent / name, where, self.control_column)
            if decode(row["control"]) is None:
                raise ValueError(f"{where}: its {self.control_column}, {name}, cannot be read; write it again")
        return Asked(rows, self.size)
