"""Exits of a detector on the device, without a cloud."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from isthmus.edge_agent import Detections, EdgeAgent, EdgeConfig
from isthmus.models.errors import BundleError
from isthmus.models.vision.bundle import Bundle
from tests.tiny_detector import TASK, content, write_tiny_detector

SQUARE = (64, 0, 128, 64)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return write_tiny_detector(tmp_path_factory.mktemp("zoo") / "tiny-detector", exits=True, fit="stretch")


def painted() -> Image.Image:
    photo = Image.new("RGB", (256, 256), (255, 255, 255))
    photo.paste((230, 20, 20), SQUARE)
    return photo


def test_an_exit_answers_with_boxes(bundle: Bundle) -> None:
    with EdgeAgent(EdgeConfig(bundle.folder, threads=1)) as agent:
        answer = agent.infer(painted())
    found = answer.answers["things"]
    assert isinstance(found, Detections) and (answer.route, answer.exit) == ("exit", "exit0")
    np.testing.assert_allclose(found.boxes, [SQUARE], atol=1e-3)
    shown = json.loads(json.dumps(answer.as_dict()))
    wanted = {"label": "red", "index": 0, "score": round(float(found.scores[0]), 4), "box": [64.0, 0.0, 128.0, 64.0]}
    assert shown["answers"] == {"things": {"kind": "detect", "detections": [wanted]}}
    assert (shown["kind"], shown["detections"]) == ("detect", [wanted])
    assert "label" not in shown and shown["exit"] == "exit0"


def test_where_nothing_may_be_the_exit_is_sure(bundle: Bundle, tmp_path: Path) -> None:
    with EdgeAgent(EdgeConfig(bundle.folder, threads=1)) as agent:
        nothing, something = (agent._head.segment(0, image_CHW)[1] for image_CHW in images())
        assert agent.exit_rule.score([nothing]) > 0.95 > 0.1 > agent.exit_rule.score([something])


def images() -> list[np.ndarray]:
    """Nothing, and all red."""
    red_CHW = np.full((3, 32, 32), -1, np.float32)
    red_CHW[0] = 1
    return [np.full((3, 32, 32), 1, np.float32), red_CHW]


def test_graphs_without_their_names_are_refused(tmp_path: Path) -> None:
    from isthmus.models.vision.graph_tail import GraphTail

    other = write_tiny_detector(tmp_path / "b", tasks=[{**TASK, "name": "else"}])
    with pytest.raises(BundleError, match=r"outputs are named \['things.boxes', 'things.scores'\], expected \['else"):
        GraphTail(other, 1)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"tasks": [{**TASK, "labels": ["red", "green", "blue"]}]}, "architecture.classes"),
        ({"weights": "image.onnx", "graphs": None}, "needs graphs"),
    ],
)
def test_a_detector_that_cannot_be_is_refused(tmp_path: Path, change: dict[str, object], words: str) -> None:
    with pytest.raises(BundleError, match=words):
        write_tiny_detector(tmp_path / "b", **change)


def test_an_exit_that_answers_nothing_may_not_be_certified(tmp_path: Path) -> None:
    heads = content(exits=False, fit="crop")["heads"]
    heads["fp32"]["thresholds"][0]["confidences"] = [0.9]
    with pytest.raises(BundleError, match="exit0 of fp32 answers nothing"):
        write_tiny_detector(tmp_path / "b", heads=heads)
