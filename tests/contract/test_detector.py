"""A detector between two real processes: whole images and a split give the boxes that the photo was painted with."""

from __future__ import annotations

import io
from collections.abc import Iterator

import numpy as np
import pytest
from PIL import Image

from isthmus.edge_agent import Detections, EdgeAgent, EdgeConfig
from isthmus.models.vision.bundle import Bundle
from isthmus.models.vision.images import ORIENTATION
from tests.bench.processes import CloudProcess
from tests.tiny_detector import write_tiny_detector

WIDE = (256, 128)  # of the photo: a letterbox shows it at an eighth, 8 pixels above its middle
RED, GREEN = (192, 64, 256, 128), (0, 0, 64, 64)  # cells of the grid


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return write_tiny_detector(tmp_path_factory.mktemp("zoo") / "tiny-detector")


@pytest.fixture(scope="module")
def cloud(bundle: Bundle) -> Iterator[CloudProcess]:
    with CloudProcess(bundle.folder, arguments=("--threads", "1")) as process:
        yield process


def painted() -> Image.Image:
    """White, with a red and a paler green square."""
    photo = Image.new("RGB", WIDE, (255, 255, 255))
    photo.paste((230, 20, 20), RED)
    photo.paste((60, 190, 60), GREEN)
    return photo


def turned() -> bytes:
    """The same, as a phone held upright stores it."""
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    buffer = io.BytesIO()
    painted().transpose(Image.Transpose.ROTATE_90).save(buffer, "PNG", exif=exif)
    return buffer.getvalue()


def check(found: Detections) -> None:
    assert found.names == ["red", "green"] and (np.diff(found.scores) < 0).all()
    np.testing.assert_allclose(found.boxes, [RED, GREEN], atol=1e-3)


@pytest.mark.parametrize("mode", ["offload", "split"])
def test_boxes_are_in_pixels_of_the_photo_given(bundle: Bundle, cloud: CloudProcess, mode: str) -> None:
    with EdgeAgent(EdgeConfig(bundle.folder, (cloud.target,), mode=mode, threads=1, connect_s=10.0)) as agent:  # type: ignore[arg-type]
        for photo in (painted(), turned()):
            answer = agent.infer(photo, 10.0)
            assert (answer.route, answer.degraded, answer.missing) == (mode, False, ()), answer.why
            assert (answer.label, answer.index, answer.probabilities) == (None, None, None)
            found = answer.answers["things"]
            assert isinstance(found, Detections)
            check(found)
        assert len(agent.infer(Image.new("RGB", WIDE, (255, 255, 255)), 10.0).answers["things"]) == 0  # type: ignore[arg-type]


def test_without_a_cloud_a_detector_without_exits_says_what_is_missing(bundle: Bundle) -> None:
    with EdgeAgent(EdgeConfig(bundle.folder, threads=1)) as agent:
        answer = agent.infer(painted())
    assert (answer.answers, answer.missing, answer.degraded) == ({}, ("things",), False)
    assert answer.as_dict()["answers"] == {}
