"""APGR, CPT and their intervals, on routers whose figures are known."""

from __future__ import annotations

import numpy as np
import pytest

from isthmus.models.language.architecture import LlamaConfig
from isthmus.models.language.flops import decoder_flops
from tests.bench.routing import CloudCost, Routed, bounds, order, resampled

GENERATOR = np.random.default_rng(0)


def test_an_oracle_gives_all_that_is_wrong_first() -> None:
    routed = Routed(np.array([False, False, True, True, True, True, True, True]))
    np.testing.assert_allclose(routed.quality, [0.75, 0.875, 1, 1, 1, 1, 1, 1, 1])
    assert routed.figures() == {
        "apgr": pytest.approx((0 + 0.5 + 6) / 8),
        "cpt50": 1 / 8,
        "cpt80": 2 / 8,
        "saved_at_no_loss": 6 / 8,
    }


def test_the_worst_router_gives_it_last() -> None:
    routed = Routed(np.array([True] * 6 + [False] * 2))
    assert routed.apgr == pytest.approx(0.5 / 8)
    assert routed.calls(1.0) == 1 and routed.figures()["saved_at_no_loss"] == 0


def test_chance_recovers_half_of_the_gap() -> None:
    right_N = GENERATOR.random(20_000) < 0.8
    figures = order(GENERATOR.random(20_000), right_N, GENERATOR).figures()
    assert figures["apgr"] == pytest.approx(0.5, abs=0.01)
    assert figures["cpt50"] == pytest.approx(0.5, abs=0.02) and figures["cpt80"] == pytest.approx(0.8, abs=0.02)


def test_a_device_that_is_always_right_has_no_gap() -> None:
    routed = Routed(np.ones(5, bool))
    assert routed.figures() == {"apgr": 1.0, "cpt50": 0.0, "cpt80": 0.0, "saved_at_no_loss": 1.0}


def test_equals_are_ordered_by_chance_and_not_by_place() -> None:
    right_N = np.arange(10_000) >= 5000  # the wrong ones come first
    assert order(np.zeros(10_000), right_N, GENERATOR).apgr == pytest.approx(0.5, abs=0.02)


def test_intervals_hold_the_figure_and_shrink_with_more_answers() -> None:
    def interval(answers: int) -> tuple[float, float, float]:
        confidence_N = GENERATOR.random(answers * 20)
        right_N = GENERATOR.random(answers * 20) < 0.5 + confidence_N / 2
        low, high = bounds(resampled(confidence_N, right_N, np.arange(answers) * 20, 100)["apgr"])
        return low, order(confidence_N, right_N, GENERATOR).apgr, high

    few, many = interval(10), interval(200)
    assert few[0] < few[1] < few[2] and many[0] < many[1] < many[2]
    assert many[2] - many[0] < 0.5 * (few[2] - few[0])


def test_routers_are_held_against_each_other_on_the_same_draws() -> None:
    """A little better every time: the intervals overlap, that of the difference does not reach 0."""
    right_N = GENERATOR.random(4000) < 0.8
    better_N = right_N + 3 * GENERATOR.random(4000)
    worse_N = better_N + 1.0 * GENERATOR.random(4000)
    starts_S = np.arange(200) * 20
    better, worse = (
        np.array(resampled(confidence_N, right_N, starts_S, 200)["apgr"]) for confidence_N in (better_N, worse_N)
    )
    assert bounds(worse)[1] > bounds(better)[0] and bounds(better - worse)[0] > 0


def test_a_cloud_reads_up_to_the_last_token_it_is_asked_for() -> None:
    """Two answers of 4 tokens after prompts of 3 and 5; alone, the cloud runs 6 and 8 tokens and decodes 8."""
    config = LlamaConfig(2, 8, 2, 1, 4, 16, 10, 64, 1e4, 1e-5, tied=True)

    def flops(tokens: int, decided: int) -> int:
        return decoder_flops(config, 0, tokens, layers=2, decided=decided)

    reading = CloudCost(config, np.array([3, 5]), np.array([0, 4]))
    asked_N = np.zeros(8, bool)
    assert reading.share(asked_N) == 0, "it is opened at the first doubt"
    asked_N[[1, 2]] = True
    assert reading.share(asked_N) == pytest.approx(flops(5, 2) / (flops(6, 4) + flops(8, 4)))
    assert reading.share(np.ones(8, bool)) == 1
