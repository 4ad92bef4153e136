from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from isthmus.edge_agent.policy.speculation import (
    MAX_DRAFTS,
    MAX_ROUNDS,
    MIN_DRAFTS,
    PREDICTED_TOKENS,
    RETRY_ANSWERS,
    Acceptance,
    LatencyModel,
    MeasuredLatency,
    SpeculationStats,
    next_action,
)
from isthmus.models.messages import Committed

PAYS = LatencyModel(rtt_s=0.05, step_s=0.03, draft_s=0.005, acceptance=0.95)

seconds = st.floats(0, 2, allow_subnormal=False)
shares = st.floats(0, 1, allow_subnormal=False)
paces = st.builds(LatencyModel, seconds, seconds, seconds, shares, st.none() | seconds)
confidences = st.lists(st.floats(0.01, 0.99), max_size=40)


@given(paces, seconds, shares)
def test_drafting_takes_longer_on_a_slow_link_and_with_drafts_that_are_often_wrong(
    latency: LatencyModel, more_s: float, share: float
) -> None:
    assert replace(latency, rtt_s=latency.rtt_s + more_s).verify_s >= latency.verify_s
    worse = replace(latency, acceptance=latency.acceptance * share)
    assert worse.verify_s >= latency.verify_s * (1 - 1e-9)


def test_by_how_much() -> None:
    assert replace(PAYS, rtt_s=1.05).verify_s == pytest.approx(PAYS.verify_s + 0.05)  # one in 20 costs a round trip
    assert replace(PAYS, acceptance=1.0).verify_s == 0.005  # only the drafting itself
    assert replace(PAYS, acceptance=0.0).verify_s == pytest.approx(0.005 + 0.05 + 0.03 + 9 * 0.005 * 1.5)


@given(paces)
def test_a_slow_draft_never_pays(latency: LatencyModel) -> None:
    assume(latency.draft_s > latency.stream_s)
    assert latency.prefers_streaming


def test_when_drafting_pays() -> None:
    assert not PAYS.prefers_streaming
    assert replace(PAYS, rtt_s=2.0).prefers_streaming
    assert replace(PAYS, acceptance=0.5).prefers_streaming
    assert replace(PAYS, draft_s=0.029).prefers_streaming
    assert replace(PAYS, measured_s=0.06, measured_tokens=50).prefers_streaming  # it looked good, and was not
    assert not replace(PAYS, measured_s=0.001, measured_tokens=50).prefers_streaming


def test_what_is_measured_counts_as_much_as_is_known_of_it() -> None:
    assert PAYS.drafting_s == replace(PAYS, measured_s=1.0).drafting_s == PAYS.verify_s
    half = replace(PAYS, measured_s=1.0, measured_tokens=PREDICTED_TOKENS)
    assert half.drafting_s == pytest.approx((1.0 + PAYS.verify_s) / 2)
    assert replace(half, measured_tokens=1e9).drafting_s == pytest.approx(1.0)


@given(paces)
def test_a_round_is_of_bounded_size(latency: LatencyModel) -> None:
    assert MIN_DRAFTS <= latency.drafts <= MAX_DRAFTS


@given(paces, confidences, st.data(), st.integers(0, MAX_ROUNDS + 2), st.booleans())
def test_a_step_never_waits_for_nothing_and_never_drafts_too_much(
    latency: LatencyModel, confidences: list[float], data: st.DataObject, under_way: int, exhausted: bool
) -> None:
    sent = data.draw(st.integers(0, len(confidences)))
    step = next_action(latency, confidences, sent, under_way, exhausted)
    full = len(confidences) - sent >= latency.drafts
    assert step != "wait" or under_way > 0
    assert step != "draft" or not (full or exhausted)
    assert step != "send" or under_way == 0 or (full and under_way < MAX_ROUNDS)


@pytest.mark.parametrize(
    ("drafted", "sent", "under_way", "exhausted", "step"),
    [
        (0, 0, 1, False, "draft"),  # while the prompt is read
        (8, 0, 1, False, "draft"),
        (9, 0, 1, False, "send"),
        (9, 9, 2, False, "draft"),
        (18, 9, 2, False, "send"),
        (27, 18, MAX_ROUNDS, False, "wait"),
        (3, 0, 1, True, "wait"),
        (3, 0, 0, True, "send"),
        (0, 0, 0, True, "send"),
    ],
)
def test_steps(drafted: int, sent: int, under_way: int, exhausted: bool, step: str) -> None:
    assert PAYS.drafts == 9
    assert next_action(PAYS, [0.99] * drafted, sent, under_way, exhausted) == step


def test_drafts_that_are_hardly_all_right_are_not_added_to() -> None:
    assert next_action(PAYS, [0.5, 0.4], 0, 1, False) == "draft"  # 0.2 * 30 ms saved, 5 ms spent
    assert next_action(PAYS, [0.5, 0.3], 0, 1, False) == "wait"
    assert next_action(PAYS, [0.5, 0.3], 0, 0, False) == "send"


def test_acceptance_learns_what_a_confidence_is_worth() -> None:
    acceptance = Acceptance()
    before = acceptance.calibrated(0.75)
    for _ in range(200):
        acceptance.observe(0.75, False)
        acceptance.observe(0.15, True)
    assert acceptance.calibrated(0.75) < 0.1 < before
    assert acceptance.calibrated(0.15) > 0.95
    assert acceptance.calibrated(0.45) == Acceptance().calibrated(0.45)  # nothing was seen of it


def test_acceptance_remembers_the_last_two_hundred_or_so() -> None:
    acceptance = Acceptance(0.9)
    for _ in range(600):
        acceptance.observe(0.5, False)
    assert acceptance.overall < 0.01
    for _ in range(200):
        acceptance.observe(0.5, True)
    assert 0.8 < acceptance.overall < 0.9
    for _ in range(600):
        acceptance.expect(0.6)
    assert acceptance.overall == pytest.approx(0.6, abs=0.01), "what is expected counts as what was seen"


@given(st.lists(st.tuples(st.floats(-0.5, 1.5), st.booleans())), st.floats(-0.5, 1.5))
def test_what_is_learnt_is_a_share(seen: list[tuple[float, bool]], confidence: float) -> None:
    acceptance = Acceptance()
    for one, right in seen:
        acceptance.observe(one, right)
    assert 0 < acceptance.calibrated(confidence) < 1
    assert 0 < acceptance.overall < 1


def test_a_prior_rises_with_confidence() -> None:
    values = [Acceptance(0.7).calibrated(tenth / 10) for tenth in range(10)]
    assert values == sorted(values) and values[0] < 0.7 < values[-1] < 1


def test_measured_says_nothing_before_it_saw_enough_and_then_follows() -> None:
    measured = MeasuredLatency()
    measured.observe(0.5, 5)
    assert measured.value is None
    measured.observe(1.0, 10)
    assert measured.value == pytest.approx(0.1, rel=0.02)
    for _ in range(100):
        measured.observe(0.04, 2)
    assert measured.value == pytest.approx(0.02, rel=0.05)
    before = measured.tokens
    measured.fade()
    assert measured.value == pytest.approx(0.02, rel=0.05) and measured.tokens == before / 2


def test_what_was_learnt_of_drafts_fades() -> None:
    acceptance = Acceptance(0.9)
    for _ in range(60):
        acceptance.expect(0.2)
    low = acceptance.overall
    acceptance.fade()
    assert low < 0.6 < acceptance.overall < 0.9, "another text is as texts usually are"
    for _ in range(5000):
        acceptance.expect(0.2)
    acceptance.fade()
    assert acceptance.overall < 0.25, "and they usually are bad"
    for _ in range(3 * RETRY_ANSWERS):
        acceptance.fade()
    assert acceptance.overall > 0.8, "but not for ever"


def test_only_a_reply_of_one_forward_pass_says_what_a_step_takes() -> None:
    stats = SpeculationStats()
    unknown_s = stats.step_s.value
    stats.observe_reply(Committed(5, passes=3, queue_s=1.0, compute_s=9.0))
    assert stats.step_s.value == unknown_s
    stats.observe_reply(Committed(5, passes=1, queue_s=0.01, compute_s=0.02))
    assert stats.step_s.value == pytest.approx(0.03)
