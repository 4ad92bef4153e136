"""The change gate: blind to noise and exposure, not to what is small and local."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from isthmus.edge_agent.streams.gate import SIDE, Bytes, ChangeGate, normalised, thumbnail
from isthmus.edge_agent.streams.gate import change as change_of
from tests.tiny_clip import scenes

SCENE, OTHER = scenes(1, 1, size=(320, 240))


def change(one_HW: Bytes, other_HW: Bytes) -> float:
    return change_of(normalised(one_HW), normalised(other_HW))


def with_noise(image: Image.Image, deviation: float, seed: int = 0) -> Image.Image:
    noise = np.random.default_rng(seed).normal(0, deviation, (image.height, image.width, 3))
    return Image.fromarray((np.asarray(image) + noise).clip(0, 255).astype(np.uint8))


@pytest.mark.parametrize("size", [(1, 1), (7, 3000), (48, 48), (1920, 1080)])
def test_a_thumbnail_has_one_shape(size: tuple[int, int]) -> None:
    small_HW = thumbnail(Image.new("RGB", size, (10, 200, 30)))
    assert small_HW.shape == (SIDE, SIDE) and small_HW.dtype == np.uint8


@given(seed=st.integers(0, 1000), gain=st.floats(0.5, 1.5), offset=st.integers(-20, 20))
def test_exposure_is_no_change(seed: int, gain: float, offset: int) -> None:
    pixels_HW = np.random.default_rng(seed).integers(60, 140, (SIDE, SIDE)).astype(np.uint8)
    exposed_HW = (pixels_HW * gain + offset).clip(0, 255).astype(np.uint8)
    assert change(pixels_HW, exposed_HW) < 0.06  # of rounding to whole grey levels


@given(seed=st.integers(0, 1000))
def test_change_is_symmetric_and_zero_for_equals(seed: int) -> None:
    one_HW, other_HW = np.random.default_rng(seed).integers(0, 256, (2, SIDE, SIDE)).astype(np.uint8)
    assert change(one_HW, other_HW) == change(other_HW, one_HW) > 0
    assert change(one_HW, one_HW) == 0


def test_noise_is_less_than_a_small_object() -> None:
    before_HW = thumbnail(with_noise(SCENE, 8))
    noisy = change(before_HW, thumbnail(with_noise(SCENE, 8, seed=1)))
    entered = SCENE.copy()
    entered.paste((255, 255, 255), (150, 110, 176, 130))  # 1 in 150 of the picture
    assert change(before_HW, thumbnail(with_noise(entered, 8, seed=2))) > 3 * noisy
    assert noisy < 0.1


def test_noise_of_an_even_picture_is_small() -> None:
    grey = Image.new("RGB", (320, 240), (90, 90, 90))
    assert change(thumbnail(with_noise(grey, 5)), thumbnail(with_noise(grey, 5, seed=1))) < 0.2


def test_an_answer_is_reused_below_the_threshold_and_not_for_long() -> None:
    gate, small_HW = ChangeGate(0.5, most_s=2.0), thumbnail(SCENE)
    assert gate.measure(small_HW) is None and not gate.reuses(None, 0.0)
    gate.refer(small_HW, 10.0)
    assert gate.reuses(0.49, 11.9) and not gate.reuses(0.5, 11.0)
    assert not gate.reuses(0.0, 12.0)  # too old
    assert not gate.reuses(0.0, 9.0)  # the source began anew
    assert gate.measure(thumbnail(OTHER)) > 0.5
    gate.forget()
    assert gate.measure(small_HW) is None


def test_without_a_threshold_nothing_is_reused() -> None:
    gate = ChangeGate(None, most_s=2.0)
    gate.refer(thumbnail(SCENE), 0.0)
    assert not gate.reuses(0.0, 0.1)
