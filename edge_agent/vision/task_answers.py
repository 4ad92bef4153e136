"""What is answered to one task, by its kind: as arrays, as JSON, and drawn on the photo."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from isthmus.edge_agent.vision import plot
from isthmus.edge_agent.vision.image_input import Photo, as_image
from isthmus.models.vision.geometry import Geometry
from isthmus.models.vision.images import given_size
from isthmus.models.vision.outputs import from_runs, to_runs
from isthmus.models.vision.tasks import AnyTask, DetectTask, EmbedTask, SegmentTask

UNSEEN = np.iinfo(np.uint16).max  # of a mask, where the network saw nothing of the photo


@dataclass(frozen=True, slots=True)
class Classification:
    """The most likely label, the index of that label, and the probabilities of all labels."""

    label: str
    index: int
    probabilities: tuple[float, ...]

    def to_json(self) -> dict[str, Any]:
        """As JSON has it."""
        return {"label": self.label, "index": self.index, "probabilities": list(self.probabilities)}

    def plot(self, photo: Photo) -> Image.Image:
        """A copy of the photo with the label and its probability on it."""
        return self.draw(as_image(photo))

    def draw(self, image: Image.Image) -> Image.Image:
        """As `plot`, of a photo that `as_image` has read."""
        return plot.caption(image, str(self))

    def __str__(self) -> str:
        return f"{self.label} ({max(self.probabilities):.1%})"


@dataclass(frozen=True, slots=True, eq=False)
class Detections:
    """M boxes, the highest score first.

    boxes: (M, 4) float32, corners x1, y1, x2, y2 in pixels of the photo given, as it is shown upright. scores: (M,)
    float32. classes: (M,) uint16, indices into `labels`, which are all labels of the task.
    """

    boxes: NDArray[np.float32]
    scores: NDArray[np.float32]
    classes: NDArray[np.uint16]
    labels: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.scores)

    @property
    def names(self) -> list[str]:
        """The label of each box."""
        return [self.labels[index] for index in self.classes]

    def to_json(self) -> dict[str, Any]:
        """As JSON has it: each box with its label, index, score and corners."""
        found = [
            {"label": label, "index": int(index), "score": round(float(score), 4), "box": np.round(box_4, 2).tolist()}
            for label, index, score, box_4 in zip(
                self.names, self.classes, self.scores, self.boxes.astype(np.float64), strict=True
            )
        ]
        return {"kind": "detect", "detections": found}

    def plot(self, photo: Photo) -> Image.Image:
        """A copy of the photo with the boxes, their labels and scores on it."""
        return self.draw(as_image(photo))

    def draw(self, image: Image.Image) -> Image.Image:
        """As `plot`, of a photo that `as_image` has read, perhaps at a smaller scale."""
        words = [f"{name} {score:.0%}" for name, score in zip(self.names, self.scores, strict=True)]
        width, height = given_size(image)
        scale_4 = np.array([image.width / width, image.height / height] * 2, np.float32)
        return plot.boxes(image, self.boxes * scale_4, words, self.classes)

    def __str__(self) -> str:
        counts = {name: self.names.count(name) for name in dict.fromkeys(self.names)}
        return ", ".join(f"{count} {name}" for name, count in counts.items()) or "nothing"


@dataclass(frozen=True, slots=True, eq=False)
class Segmentation:
    """A label for each cell of a map (H, W) uint16 over what the network saw: indices into `labels`."""

    map: NDArray[np.uint16]
    labels: tuple[str, ...]
    input_size: tuple[int, int]
    geometry: Geometry

    @property
    def area(self) -> tuple[float, float, float, float]:
        """Corners of the map in pixels of the photo given; beyond it where the photo was letterboxed."""
        height, width = self.input_size
        corners_22 = self.geometry.points(np.array([[0.0, 0.0], [width, height]]))
        (left, top), (right, bottom) = corners_22.tolist()
        return left, top, right, bottom

    def mask(self) -> NDArray[np.uint16]:
        """The label of each pixel of the photo given, (H, W) uint16; UNSEEN where the network saw nothing of it."""
        left, top, right, bottom = self.area
        rows, columns = self.map.shape
        at_y = cells(self.geometry.height, top, bottom, rows)
        at_x = cells(self.geometry.width, left, right, columns)
        found_HW: NDArray[np.uint16] = self.map[np.ix_(at_y.clip(0, rows - 1), at_x.clip(0, columns - 1))]
        found_HW[(at_y < 0) | (at_y >= rows)] = UNSEEN
        found_HW[:, (at_x < 0) | (at_x >= columns)] = UNSEEN
        return found_HW

    def to_json(self) -> dict[str, Any]:
        """As JSON has it: runs of the row-major map as pairs of index and length, and where the map lies."""
        classes_R, lengths_R = to_runs(self.map)
        runs = np.stack([classes_R, lengths_R], 1).tolist()
        area = [round(side, 2) for side in self.area]
        return {"kind": "segment", "labels": list(self.labels), "shape": [*self.map.shape], "area": area, "runs": runs}

    def plot(self, photo: Photo) -> Image.Image:
        """A copy of the photo with every label's pixels tinted."""
        return self.draw(as_image(photo))

    def draw(self, image: Image.Image) -> Image.Image:
        """As `plot`, of a photo that `as_image` has read."""
        return plot.mask(image, self.mask(), len(self.labels))

    def __str__(self) -> str:
        shares_K = np.bincount(self.map.reshape(-1), minlength=len(self.labels)) / self.map.size
        order = [int(index) for index in np.argsort(-shares_K, kind="stable") if shares_K[index] > 0]
        return ", ".join(f"{self.labels[index]} ({shares_K[index]:.1%})" for index in order)


@dataclass(frozen=True, slots=True, eq=False)
class Embedding:
    """A vector (D,) float32."""

    vector: NDArray[np.float32]

    def to_json(self) -> dict[str, Any]:
        """As JSON has it."""
        return {"kind": "embed", "embedding": [round(float(value), 6) for value in self.vector]}

    def plot(self, photo: Photo) -> Image.Image:
        """A copy of the photo: a vector has no place on it."""
        return self.draw(as_image(photo))

    def draw(self, image: Image.Image) -> Image.Image:
        """As `plot`, of a photo that `as_image` has read."""
        return image

    def __str__(self) -> str:
        return f"a vector of {len(self.vector)} numbers"


TaskAnswer: TypeAlias = Classification | Detections | Segmentation | Embedding


def task_answer(
    task: AnyTask, found: NDArray[Any] | Sequence[NDArray[Any]], input_size: tuple[int, int], geometry: Geometry
) -> TaskAnswer:
    """The answer to `task` from its probabilities, or from the tensors that `outputs.finish` gives.

    `input_size`: (height, width) of the network's input, which `geometry` leads back to the photo.
    """
    match task:
        case DetectTask():
            boxes_M4, scores_M, classes_M = found
            boxes_M4 = geometry.boxes(boxes_M4)
            seen_M = (boxes_M4[:, :2] < boxes_M4[:, 2:]).all(1)  # others lie in a letterbox's border
            scores_M, classes_M = scores_M.astype(np.float32), classes_M.astype(np.uint16)
            return Detections(boxes_M4[seen_M], scores_M[seen_M], classes_M[seen_M], task.labels)
        case SegmentTask():
            classes_R, lengths_R = found
            return Segmentation(from_runs(classes_R, lengths_R, task.shape), task.labels, input_size, geometry)
        case EmbedTask():
            (vector_D,) = found
            return Embedding(vector_D.astype(np.float32))
    probabilities_K = np.asarray(found)
    index = int(probabilities_K.argmax())
    return Classification(task.labels[index], index, tuple(float(p) for p in probabilities_K))


def cells(pixels: int, first: float, last: float, count: int) -> NDArray[np.intp]:
    """The cell of each of `pixels` photo pixels along one side of a map of `count` cells from `first` to `last`."""
    found: NDArray[np.intp] = np.floor((np.arange(pixels) + 0.5 - first) / (last - first) * count).astype(np.intp)
    return found
