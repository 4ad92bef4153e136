from __future__ import annotations

import importlib.util

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from isthmus.models.recipes.vision.nanodet import CLASSES, SIDE
from tests.bench import detection, frame_codecs
from tests.bench.detection import Setting

needs_av = pytest.mark.skipif(importlib.util.find_spec("av") is None, reason="PyAV is not installed")

BOX = np.array([[10, 10, 110, 110]], np.float32)


class Bright:
    """Sees one box in a photo, of a class that depends on its brightness; a rate of 0 sees another one."""

    rates = 2

    def whole(self, pixels_HW3: NDArray[np.uint8]) -> detection.objects.Candidates:
        return self.answer(self.latent(pixels_HW3), 1)

    def latent(self, pixels_HW3: NDArray[np.uint8]) -> NDArray[np.float32]:
        return np.full((3, 32, 32), pixels_HW3.mean() / 255, np.float32)

    def answer(self, latent_CHW: NDArray[np.float32], rate: int) -> detection.objects.Candidates:
        scores = np.zeros((1, CLASSES), np.float32)
        scores[0, int(latent_CHW.mean() * 4) + (rate == 0)] = 0.9
        return BOX, scores

    def sent(self, latent_CHW: NDArray[np.float32], rate: int) -> tuple[bytes, detection.objects.Candidates]:
        return bytes(10 * (rate + 1)), self.answer(latent_CHW, rate)


def photos() -> list[detection.Callable[[], Image.Image]]:
    return [lambda grey=grey: Image.new("RGB", (SIDE, 64), (grey,) * 3) for grey in (40, 200)]  # type: ignore[misc]


def test_every_way_is_measured_against_the_whole_network() -> None:
    ways = detection.measure(Bright(), photos(), {"jpeg": (75,), "avif": (60,)})
    assert ways["bottleneck"] == [Setting("rate 0", 10.0, 0.0), Setting("rate 1", 20.0, 1.0)]
    assert [way.precision for way in ways["jpeg"] + ways["avif"]] == [1.0, 1.0]


@needs_av
def test_frames_are_measured_too() -> None:
    ways = detection.measure(Bright(), photos(), {"x265": (30,), "features x265": (10,)})
    assert all(way.precision == 1 and way.mean_bytes > 10 for name in ("x265", "features x265") for way in ways[name])


@needs_av
def test_a_picture_comes_back_nearly_as_it_was() -> None:
    pixels_HW3 = np.tile(np.linspace(0, 255, 65).astype(np.uint8)[:, None, None], (1, 71, 3))
    size, back_HW3 = frame_codecs.picture(pixels_HW3, 10)
    assert back_HW3.shape == pixels_HW3.shape
    assert 0 < size < pixels_HW3.size
    assert np.abs(back_HW3.astype(int) - pixels_HW3).mean() < 4


def test_tiles_come_back_in_their_order() -> None:
    latent_CHW = np.random.default_rng(0).normal(size=(5, 3, 3)).astype(np.float32)
    grid_HW = frame_codecs.tiled(latent_CHW)
    assert grid_HW.shape == (6, 10)
    np.testing.assert_array_equal(frame_codecs.untiled(grid_HW, (5, 3, 3)), latent_CHW)


def test_bytes_at_a_precision_are_between_the_settings_around_it() -> None:
    settings = [Setting("a", 100, 0.5), Setting("b", 400, 0.9), Setting("c", 300, 0.4)]
    assert detection.bytes_at(settings, 0.7) == pytest.approx(200)
    assert detection.bytes_at(settings, 0.4) == 100  # the least that there is
    assert detection.bytes_at(settings, 0.95) is None


def test_the_report_says_what_the_bottleneck_saves() -> None:
    ways = {"bottleneck": [Setting("rate 0", 100, 0.9)], "jpeg": [Setting("q5", 400, 0.9)]}
    found = detection.report(ways, 2)
    assert found["saved_by_bottleneck"]["jpeg"] == {"0.7": 0.75, "0.8": 0.75, "0.9": 0.75, "0.95": None}
