"""The test photos of the shipped bundles, which are not used in training, with their classes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from isthmus.models.errors import InvalidInput
from isthmus.models.recipes.vision import fashion, photos_data
from isthmus.models.recipes.vision.elpv_data import load
from isthmus.models.vision.images import open_image

FASHION = Path("runs/fashion/data")

labelled_option = click.option(
    "--labelled",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="Photos to test the bundle `photos` on, each name starting with its class.",
)


@dataclass(frozen=True)
class Photos:
    """RGB photos, opened on access, and the class of each in the bundle's first task."""

    image: Callable[[int], Image.Image]
    labels_N: NDArray[np.int64]


def photos_of(task: str, labelled: Path | None) -> Photos:
    """The test part of a bundle's data, by its first task; `labelled`: folder of ImageNet's. Raises InvalidInput."""
    if task == "object":
        if labelled is None:
            raise InvalidInput("--labelled is missing: a folder of photos whose names start with their class")
        found = photos_data.labelled(labelled, "test")
        return Photos(lambda index: square(open_image(found.paths[index].read_bytes())), found.labels_N)
    if task == "garment":
        part = fashion.load(FASHION)["test"]
        assert part.labels_N is not None
        return Photos(lambda index: Image.fromarray(part.images_N3HW[index].transpose(1, 2, 0)), part.labels_N)
    if task != "defect":
        raise InvalidInput(f"there are no test photos for the task {task!r}, but for defect, object and garment")
    cells = load("test")
    return Photos(lambda index: open_image(cells.paths[index].read_bytes()), cells.labels_N)


def square(image: Image.Image) -> Image.Image:
    """The centre square, which is the network's input, so that an image codec spends no bytes on the rest."""
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.crop((left, top, left + side, top + side))
