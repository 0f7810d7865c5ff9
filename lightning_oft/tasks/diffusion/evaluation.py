"""Evaluation: what a test scores samples by: judges, and the columns of the papers on learning a subject."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

from lightning_oft.tasks.diffusion.distances import frechet_distance, kernel_distance
from lightning_oft.tasks.diffusion.judges import Embedder, Judge

COLUMNS = {"DINO": "dino", "CLIP-I": "clip", "CLIP-T": "clip", "drift": "dino", "FID": "fid", "KID": "fid"}
"""By column, the network that it is computed with."""
CHUNK = 16
"""Pictures of the data that are embedded at once."""


class Evaluation:
    """Scores of test sets, each a mean over samples: `<what>_accuracy`, the share in which a judge of `judges` reads what
    the labels say, and what the networks of `evaluators`, {dino, clip, fid: path}, compare (Ruiz et al. 2023, section 4):

    - DINO, CLIP-I: mean cosine of each sample with every picture of the subject.
    - CLIP-T: mean cosine of each sample with its prompt.
    - drift: mean of 1 - cosine of a sample with what the pipeline drew before training, of the same prompt and seed, by
      dino, else clip, else fid.
    - FID, KID: distance of all samples from the pictures of the data.

    CLIP-T is of all prompts, drift of those that do not name the subject, the others of those that do; where the data has
    no subject, of all. Raises OSError where there is no such network, and ValueError where an evaluator is none of these.
    """

    def __init__(self, judges: Mapping[str, Judge], evaluators: Mapping[str, str]) -> None:
        names = list(dict.fromkeys(COLUMNS.values()))
        if wrong := [name for name in evaluators if name not in names]:
            raise ValueError(f"evaluators: {wrong[0]!r} is no evaluator; there are {', '.join(names)}")
        self.judges = judges
        self.networks = {name: Embedder(evaluators[name], name == "clip") for name in names if name in evaluators}
        self.data: Any = None
        self.real: dict[str, Tensor] = {}
        """By network, what it makes of the data's pictures, (n, D)."""
        self.rows: dict[str, dict[str, list[Tensor]]] = {}
        """By test set and column, what each sample scores, (B,), or its embedding, (B, D), on the CPU."""
        self.reasons: dict[str, str] = {}
        """By column, why it is not scored."""
        self.said = ""
        """What an earlier test reported."""

    def start(self, splits: Sequence[str], data: Any, is_adapted: bool, device: torch.device) -> None:
        """Begin a test of these sets, of a data module or None; nothing drifts that is not adapted."""
        self.data, self.rows = data, {split: defaultdict(list) for split in splits}
        self.reasons = {"LPIPS": "its network is no model of transformers"}
        for column, wants in COLUMNS.items():
            if wants not in self.networks and not (column == "drift" and self.networks):
                self._lacks(f"give model.init_args.evaluators.{wants}", column)
        if not hasattr(data, "names_subject"):
            self._lacks("the data has no subject; DreamBoothDataModule has", "DINO", "CLIP-I", "drift")
        elif data.subject is None:
            self._lacks("give data.init_args.subject, the word for it in prompts", "drift")
        elif not is_adapted:
            self._lacks("there is no adapter to turn off", "drift")
        if not hasattr(data, "real_pictures"):
            self._lacks("the data has no pictures to compare with", "FID", "KID")
        wanted = [COLUMNS[column] for column in ("DINO", "CLIP-I", "FID") if column not in self.reasons]
        networks = {name: self.networks[name] for name in wanted}
        found: dict[str, list[Tensor]] = {name: [] for name in wanted}
        for pictures in _chunks(data.real_pictures() if networks else []):
            for name, network in networks.items():
                found[name].append(network.embed(pictures, device))
        self.real = {name: torch.cat(parts) for name, parts in found.items()}

    def _lacks(self, why: str, *columns: str) -> None:
        for column in columns:
            self.reasons.setdefault(column, why)

    def compares(self, prompts: Sequence[str]) -> bool:
        """Whether `update` wants to know what was drawn of these prompts before training."""
        return "drift" not in self.reasons and not all(map(self._names_subject, prompts))

    def _names_subject(self, prompt: str) -> bool:
        return not hasattr(self.data, "names_subject") or self.data.names_subject(prompt)

    def update(
        self, split: str, batch: Mapping[str, Any], made: Sequence[Any], before: Sequence[Any] | None, device: torch.device
    ) -> None:  # fmt: skip
        """Score the samples of a batch, Pillow images; `before` are those before training."""
        found, prompts = self.rows[split], batch["prompt"]
        for what in (what for what in batch["labels"] if what in self.judges):
            read = self.judges[what].read(made, device)
            right = [one == asked for one, asked in zip(read, batch["labels"][what], strict=True)]
            found[f"{what}_accuracy"].append(torch.tensor(right).float())
        embedded = {name: network.embed(made, device) for name, network in self.networks.items()}
        told = torch.tensor([self._names_subject(prompt) for prompt in prompts], device=device)
        for column in ("DINO", "CLIP-I"):
            if (name := COLUMNS[column]) in self.real:
                alike = normalize(embedded[name][told]) @ normalize(self.real[name]).T
                found[column].append(alike.mean(1).cpu())
        if "clip" in embedded:
            asked = self.networks["clip"].embed_text(prompts, device)
            found["CLIP-T"].append(cosine_similarity(embedded["clip"], asked).cpu())
        if "fid" in self.real:
            found["FID"].append(embedded["fid"][told].cpu())
        if before is not None:
            name, network = next(iter(self.networks.items()))
            moved = 1 - cosine_similarity(embedded[name], network.embed(before, device))
            found["drift"].append(moved[~told].cpu())

    def scores(self) -> dict[str, float]:
        """By test set and column, over the samples of all processes, each of which calls this."""
        found: dict[str, float] = {}
        for split, columns in _everyone(self.rows).items():
            for column, parts in columns.items():
                rows = torch.cat(parts)
                if column == "FID" and len(rows):
                    found |= {f"{split}/{name}": value for name, value in self._distances(split, rows).items()}
                elif len(rows):
                    found[f"{split}/{column}"] = float(rows.mean())
        return found

    def _distances(self, split: str, made: Tensor) -> dict[str, float]:
        """FID and KID, or in `reasons` why there is none."""
        real, width, found = self.real["fid"].cpu(), made.shape[1], {}
        said = f"{split.removeprefix('test/')} has {len(made)} samples and the data {len(real)} pictures, both must be"
        # With fewer than that the covariances are singular: https://github.com/bioinf-jku/TTUR
        if min(len(made), len(real)) > width:
            found["FID"] = frechet_distance(real, made)
        else:
            self._lacks(f"{said} more than the {width} features of its network", "FID")
        if min(len(made), len(real)) > 1:
            found["KID"] = kernel_distance(real, made)
        else:
            self._lacks(f"{said} more than 1", "KID")
        return found

    def report(self, scores: Mapping[str, float]) -> None:
        """Say in one line which columns no test set has, and why, unless an earlier test has said it."""
        there = {name.rpartition("/")[2] for name in scores}
        columns: dict[str, list[str]] = defaultdict(list)
        for column in [*COLUMNS, "LPIPS"]:
            which = "every" if column == "drift" else "no"
            if column not in there:
                columns[self.reasons.get(column, f"{which} test prompt names the subject")].append(column)
        said = "; ".join(f"{', '.join(names)}: {why}" for why, names in columns.items())
        if said != self.said:
            self.said = said
            rank_zero_info(f"not scored: {said}")

    def stop(self) -> None:
        """Free the device of networks."""
        for network in (*self.judges.values(), *self.networks.values()):
            network.to_memory()
        self.data, self.rows, self.real = None, {}, {}


def _chunks(pictures: Iterable[Any]) -> Iterator[list[Any]]:
    rest = iter(pictures)
    while chunk := list(islice(rest, CHUNK)):
        yield chunk


def _everyone(rows: dict[str, dict[str, list[Tensor]]]) -> dict[str, dict[str, list[Tensor]]]:
    """The rows of all processes, in the order of these."""
    shares: list[Any] = [rows]
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        shares = shares * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(shares, rows)
    joined: dict[str, dict[str, list[Tensor]]] = {split: defaultdict(list) for split in rows}
    for share in shares:
        for split, columns in share.items():
            for column, parts in columns.items():
                joined[split][column] += parts
    return joined
