from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from isthmus.edge_agent.vision.task_answers import (
    UNSEEN,
    Classification,
    Detections,
    Embedding,
    Segmentation,
    TaskAnswer,
    task_answer,
)
from isthmus.models.vision.geometry import Geometry, placement
from isthmus.models.vision.manifest import Fit
from isthmus.models.vision.outputs import to_runs
from isthmus.models.vision.tasks import DetectTask, EmbedTask, SegmentTask

SIZE = (8, 8)
DETECT = DetectTask(name="things", labels=("dog", "cat"), max_boxes=5, min_score=0.25, nms_iou=0.5)
SEGMENT = SegmentTask(name="ground", labels=("road", "sky"), shape=(4, 4))
MAP_HW = np.array([[1, 1, 1, 1], [1, 1, 1, 1], [0, 0, 0, 1], [0, 0, 0, 1]])


def back(fit: Fit, width: int = 80, height: int = 40) -> Geometry:
    return Geometry(placement(fit, 8, SIZE, (width, height)), width, height)


def detections(geometry: Geometry) -> Detections:
    boxes_M4 = np.array([[0, 2, 4, 6], [2, 0, 6, 1.5], [4, 0, 8, 4]], np.float32)
    found = task_answer(DETECT, (boxes_M4, np.array([0.75, 0.5, 0.25]), np.array([1, 0, 0])), SIZE, geometry)
    assert isinstance(found, Detections)
    return found


def segmentation(geometry: Geometry) -> Segmentation:
    found = task_answer(SEGMENT, to_runs(MAP_HW), SIZE, geometry)
    assert isinstance(found, Segmentation)
    return found


def test_boxes_are_of_the_photo_and_those_in_the_border_are_gone() -> None:
    found = detections(back("letterbox"))
    np.testing.assert_allclose(found.boxes, [[0, 0, 40, 40], [40, 0, 80, 20]])
    assert (found.names, len(found), str(found)) == (["cat", "dog"], 2, "1 cat, 1 dog")
    assert found.to_json() == {
        "kind": "detect",
        "detections": [
            {"label": "cat", "index": 1, "score": 0.75, "box": [0.0, 0.0, 40.0, 40.0]},
            {"label": "dog", "index": 0, "score": 0.25, "box": [40.0, 0.0, 80.0, 20.0]},
        ],
    }


def test_nothing_found_is_said_so() -> None:
    found = task_answer(DETECT, (np.zeros((0, 4), np.float32), np.zeros(0), np.zeros(0)), SIZE, back("crop"))
    assert str(found) == "nothing" and found.to_json() == {"kind": "detect", "detections": []}


def test_a_mask_covers_what_the_network_saw() -> None:
    stretched, cropped = segmentation(back("stretch")).mask(), segmentation(back("crop")).mask()
    assert stretched.shape == cropped.shape == (40, 80)
    assert (stretched[:20] == 1).all() and (stretched[20:, :60] == 0).all() and (stretched[20:, 60:] == 1).all()
    assert (cropped[:, :20] == UNSEEN).all() and (cropped[:, 60:] == UNSEEN).all()
    assert (cropped[20:, 20:50] == 0).all() and (cropped[:20, 20:60] == 1).all()
    boxed = segmentation(back("letterbox")).mask()
    assert (boxed[:20] == 1).all() and (boxed[20:, :60] == 0).all()


def test_a_map_in_json_says_where_it_lies() -> None:
    shown = segmentation(back("letterbox")).to_json()
    assert shown["area"] == [0, -20, 80, 60] and shown["shape"] == [4, 4]
    assert shown["runs"] == [[1, 8], [0, 3], [1, 1], [0, 3], [1, 1]]
    assert str(segmentation(back("crop"))) == "sky (62.5%), road (37.5%)"


def test_a_vector_is_given_as_it_is() -> None:
    found = task_answer(EmbedTask(name="e", size=2), [np.array([0.6, 0.8], np.float16)], SIZE, back("crop"))
    assert isinstance(found, Embedding) and found.vector.dtype == np.float32
    assert found.to_json()["embedding"] == pytest.approx([0.6, 0.8], abs=1e-3)
    assert str(found) == "a vector of 2 numbers"


@pytest.mark.parametrize("kind", ["classify", "detect", "segment", "embed"])
def test_every_answer_is_json_and_drawn_on_a_copy(kind: str) -> None:
    answers: dict[str, TaskAnswer] = {
        "classify": Classification("bad", 1, (0.25, 0.75)),
        "detect": detections(back("letterbox")),
        "segment": segmentation(back("crop")),
        "embed": Embedding(np.zeros(3, np.float32)),
    }
    photo = Image.new("RGB", (80, 40), "grey")
    before = photo.tobytes()
    drawn = answers[kind].plot(photo)
    assert (drawn.mode, drawn.size) == ("RGB", photo.size) and photo.tobytes() == before
    assert (drawn.tobytes() != before) == (kind != "embed")
    json.dumps(answers[kind].to_json())


def test_boxes_are_drawn_where_they_are() -> None:
    geometry = back("stretch", 400, 400)
    boxes_M4 = np.array([[2, 2, 6, 6]], np.float32)
    found = task_answer(DETECT, (boxes_M4, np.ones(1), np.zeros(1)), SIZE, geometry)
    changed_HW = (np.asarray(found.plot(Image.new("RGB", (400, 400)))) > 0).any(2)
    assert changed_HW[200, 100] and changed_HW[200, 300] and changed_HW[300, 200]
    assert not changed_HW[120:280, 120:280].any() and not changed_HW[:, 310:].any()
