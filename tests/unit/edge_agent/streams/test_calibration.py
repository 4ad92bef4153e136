"""Thresholds of the change gate are certified on blocks of a clip, and kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import binom

from isthmus.edge_agent.streams.calibrate import answered
from isthmus.edge_agent.streams.calibration import (
    DELTA,
    GRID,
    Certificate,
    Seen,
    certify,
    choose,
    least_epsilon,
    load,
    p_value,
    replay,
    save,
)
from isthmus.edge_agent.streams.gate import SIDE, Bytes
from isthmus.edge_agent.streams.sources import Source
from isthmus.models.errors import InvalidInput

SCENES_HW: list[Bytes] = [
    np.random.default_rng(seed).integers(0, 256, (SIDE, SIDE)).astype(np.uint8) for seed in (0, 1)
]


def clip(seconds: int, label_of: Any, scene_of: Any) -> list[Seen]:
    """Ten frames a second."""
    return [
        Seen(index / 10, SCENES_HW[scene_of(index)], {"object": {"index": label_of(index)}})
        for index in range(10 * seconds)
    ]


def test_p_values_are_those_of_hoeffding_and_bentkus() -> None:
    assert p_value(0.0, 100, 0.05) == pytest.approx(0.95**100)  # Hoeffding, exact without a loss
    assert p_value(0.05, 100, 0.05) == 1.0
    for mean, epsilon in ((0.02, 0.1), (0.3, 0.5)):
        assert p_value(mean, 100, epsilon) <= np.e * binom.cdf(np.ceil(100 * mean), 100, epsilon) + 1e-12


@pytest.mark.parametrize("mean", [0.02, 0.2])
def test_a_certificate_fails_as_rarely_as_it_says(mean: float) -> None:
    """The bound is below the true mean in at most DELTA of 100 clips; losses are shares of 5 frames."""
    random = np.random.default_rng(0)
    losses_CN = random.binomial(5, mean, (100, 60)) / 5
    failures = sum(least_epsilon(losses_N.tolist()) < mean for losses_N in losses_CN)
    assert failures <= DELTA * 100


def test_a_still_scene_with_one_answer_is_certified() -> None:
    found = certify(clip(20, lambda _: 0, lambda _: 0), most_s=2.0)
    assert [each.threshold for each in found] == list(GRID)
    assert all((each.blocks, each.frames, each.differing) == (10, 200, 0.0) for each in found)
    assert found[0].reused == pytest.approx(0.95)  # one in 20 frames is answered
    assert found[0].epsilon == pytest.approx(1 - DELTA ** (1 / 10), abs=1e-6)


def test_answers_that_change_in_a_still_scene_are_not_certified() -> None:
    found = certify(clip(20, lambda index: index % 2, lambda _: 0), most_s=2.0)
    assert found[0].differing == pytest.approx(0.5) and found[0].epsilon > 0.5
    assert choose(found, 0.05, 2.0) is None


def test_a_scene_that_changes_with_its_answer_costs_nothing_below_that_change() -> None:
    frames = clip(20, lambda index: index // 7 % 2, lambda index: index // 7 % 2)
    reused_N, differing_N = replay(frames, GRID[0], most_s=2.0)
    assert reused_N.sum() == 200 - 29 and not differing_N.any()
    found = certify(frames, most_s=2.0)
    assert found[-1].differing > 0.1  # above every change, answers stay as they are
    assert [each.epsilon for each in found] == sorted(each.epsilon for each in found)


def test_the_most_permissive_threshold_is_chosen() -> None:
    known = [Certificate(threshold, epsilon, 0.5, 0.0, 50, 500, 2.0) for threshold, epsilon in ((1, 0.04), (2, 0.06))]
    assert choose(known, 0.05, 2.0) == known[0] and choose(known, 0.1, 1.0) == known[1]
    assert choose(known, 0.03, 2.0) is None and choose(known, 0.1, 3.0) is None and choose([], 1.0, 1.0) is None


def test_a_clip_without_frames_is_refused() -> None:
    with pytest.raises(InvalidInput, match="no frames"):
        certify([], 2.0)


@pytest.mark.parametrize("lack", [{"degraded": True}, {"degraded": False, "missing": ["object"]}])
def test_nothing_is_certified_of_what_the_cloud_did_not_answer(lack: dict[str, Any]) -> None:
    source = Source("front", "rtsp", "rtsp://host/x")
    assert answered(source, {"degraded": False, "missing": (), "answers": {"a": 1}}) == {"a": 1}
    with pytest.raises(InvalidInput, match="front: the cloud did not answer"):
        answered(source, {"answers": {}, **lack})


def test_certificates_are_kept_by_bundle_and_camera(tmp_path: Path) -> None:
    path = tmp_path / "state" / "streams.db"
    assert load(path, "b", "front") == []
    found = certify(clip(4, lambda _: 0, lambda _: 0), most_s=2.0)
    save(path, "b", "front", found[:1])
    save(path, "b", "front", found)
    assert load(path, "b", "front") == found
    assert load(path, "b", "back") == load(path, "other", "front") == []


def test_a_broken_file_is_one_error(tmp_path: Path) -> None:
    path = tmp_path / "streams.db"
    path.write_bytes(b"no database" * 100)
    with pytest.raises(InvalidInput, match=r"streams\.db"):
        load(path, "b", "front")
    with pytest.raises(InvalidInput, match=r"streams\.db"):
        save(path, "b", "front", [])
