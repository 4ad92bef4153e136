"""What the exits and the cloud model of a bundle answer to test photos as they are, and under each corruption.

Computed once and stored as a NumPy file, so that streams of any length are drawn from it without a model.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from rich.console import Console
from rich.progress import track

from isthmus.models.recipes.vision import fashion
from isthmus.models.recipes.vision.elpv_data import load as load_elpv
from isthmus.models.vision.bundle import Bundle
from isthmus.models.vision.head import Head
from isthmus.models.vision.images import open_image, preprocess
from isthmus.models.vision.tail import open_tail
from tests.bench.corruptions import CORRUPTIONS

AS_IS = "none"
STRENGTHS = (3, 5)
BATCH = 16


@dataclass(frozen=True)
class Recorded:
    """Scores and answers of each exit, and the cloud model's answer, for each photo of one corruption."""

    scores_NE: NDArray[np.float32]
    answers_NE: NDArray[np.int64]
    cloud_N: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.cloud_N)

    def part(self, rows: NDArray[np.int64]) -> Recorded:
        """These photos."""
        return Recorded(self.scores_NE[rows], self.answers_NE[rows], self.cloud_N[rows])


def kinds() -> list[str]:
    """Names of what is recorded: photos as they are, and each corruption at each strength."""
    return [AS_IS, *(f"{name} {strength}" for name in CORRUPTIONS for strength in STRENGTHS)]


def corrupted(photo: Image.Image, kind: str, random: np.random.Generator) -> Image.Image:
    """One photo of a kind."""
    if kind == AS_IS:
        return photo
    name, strength = kind.split()
    return CORRUPTIONS[name](photo, int(strength), random)


def answer(bundle: Bundle, photos: list[Image.Image], kind: str) -> Recorded:
    """Run both halves on every photo."""
    head, tail, spec = Head(bundle, 1), open_tail(bundle), bundle.manifest.preprocessing
    random = np.random.default_rng(0)
    scores, answers, cloud = [], [], []
    for first in track(range(0, len(photos), BATCH), kind, console=Console(stderr=True), transient=True):
        batch = [preprocess(corrupted(photo, kind, random), spec) for photo in photos[first : first + BATCH]]
        cloud += tail.answer_images(batch).argmax(1).tolist()
        for x_CHW in batch:
            rows = []
            for index in range(head.exits):
                x_CHW, probabilities_K = head.segment(index, x_CHW)
                rows.append(probabilities_K)
            scores.append([row.max() for row in rows])
            answers.append([row.argmax() for row in rows])
    return Recorded(np.array(scores, np.float32), np.array(answers), np.array(cloud))


def photos_for(bundle: Bundle, data: Path, count: int) -> list[Image.Image]:
    """Photos of a bundle's test part, which no training and no certificate used."""
    if bundle.manifest.tasks[0].name == "garment":
        part = fashion.load(data)["test"]
        return [Image.fromarray(image.transpose(1, 2, 0)) for image in part.images_N3HW[:count]]
    return [open_image(path.read_bytes()) for path in load_elpv("test").paths[:count]]


def recorded(bundle: Bundle, file: Path, data: Path, count: int) -> dict[str, Recorded]:
    """Every kind, from `file` where it is there; else computed and kept there."""
    if not file.exists():
        photos = photos_for(bundle, data, count)
        found = {kind: answer(bundle, photos, kind) for kind in kinds()}
        save(file, found)
    return load(file)


def save(file: Path, found: dict[str, Recorded]) -> None:
    """As a compressed NumPy file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    arrays = {
        f"{kind}/{name}": getattr(each, name)
        for kind, each in found.items()
        for name in ("scores_NE", "answers_NE", "cloud_N")
    }
    np.savez_compressed(file, **arrays)  # type: ignore[arg-type]


def load(file: Path) -> dict[str, Recorded]:
    """What `save` wrote."""
    with np.load(file, allow_pickle=False) as arrays:
        names = dict.fromkeys(key.rpartition("/")[0] for key in arrays.files)
        return {
            kind: Recorded(*(arrays[f"{kind}/{name}"] for name in ("scores_NE", "answers_NE", "cloud_N")))
            for kind in names
        }
