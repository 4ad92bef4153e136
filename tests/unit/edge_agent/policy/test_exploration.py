from __future__ import annotations

from isthmus.edge_agent.policy.exploration import (
    EXPLORE_AGE_S,
    EXPLORE_AT_MOST,
    EXPLORE_EVERY,
    HOUR_S,
    PROBE_AGE_S,
    PROBE_GAP_S,
    Exploration,
    ProbeSchedule,
)


def test_exploration_becomes_rarer_without_replies_and_starts_over_with_one() -> None:
    exploration = Exploration(0.0)
    sent = [index for index in range(1, 1000) if exploration.due(0.0)]
    gaps = [after - before for before, after in zip([0, *sent], sent, strict=False)]
    assert gaps[:5] == [EXPLORE_EVERY * 2**k for k in range(4)] + [EXPLORE_AT_MOST]
    assert set(gaps[4:]) == {EXPLORE_AT_MOST}
    exploration.replied()
    assert any([exploration.due(0.0) for _ in range(EXPLORE_EVERY)])


def test_exploration_is_due_after_a_pause() -> None:
    exploration = Exploration(0.0)
    assert not exploration.due(EXPLORE_AGE_S - 1)
    assert exploration.due(EXPLORE_AGE_S)
    assert not exploration.due(EXPLORE_AGE_S + 1)


def test_a_link_is_probed_when_it_has_changed_or_is_planned_with_and_old() -> None:
    schedule = ProbeSchedule(1e6)
    assert not schedule.due(1e9, 0, 0.0)  # nobody plans
    schedule.planned(100.0)
    assert not schedule.due(PROBE_AGE_S - 1, 0, 100.0)
    assert schedule.due(PROBE_AGE_S, 0, 100.0)
    assert not schedule.due(PROBE_AGE_S, 0, 100.0 + PROBE_AGE_S)  # nobody plans any more
    assert schedule.due(0.0, 1, 1000.0)


def test_a_change_is_probed_once_and_no_two_probes_are_close() -> None:
    schedule = ProbeSchedule(1e6)
    assert schedule.due(0.0, 1, 0.0) and schedule.take(100, 1, 0.0)
    assert not schedule.due(0.0, 2, PROBE_GAP_S / 2)
    assert schedule.due(0.0, 2, PROBE_GAP_S) and schedule.take(100, 2, PROBE_GAP_S)
    assert not schedule.due(0.0, 2, 100.0)


def test_probes_cost_at_most_so_many_bytes_an_hour() -> None:
    schedule, spent = ProbeSchedule(100_000), 0
    for second in range(10 * int(HOUR_S)):
        schedule.planned(second)
        if schedule.due(PROBE_AGE_S, second, second) and schedule.take(18_000, second, second):
            spent += 18_000
    assert 900_000 < spent <= 1_025_000


def test_a_ledger_may_refuse_every_probe() -> None:
    asked: list[int] = []
    schedule = ProbeSchedule(1e9, lambda size, share: bool(asked.append(size)))
    assert not any([schedule.take(18_000, 1, float(second)) for second in range(5)])
    assert asked == [18_000] * 5
    assert not ProbeSchedule(0.0).take(1, 1, 0.0)


def test_a_probe_that_was_refused_is_asked_for_again_but_not_at_once() -> None:
    allowed = False
    schedule = ProbeSchedule(1e9, lambda size, share: allowed)
    assert not schedule.take(18_000, 1, 0.0)
    assert not schedule.due(0.0, 1, PROBE_GAP_S / 2)
    allowed = True
    assert schedule.due(0.0, 1, PROBE_GAP_S) and schedule.take(18_000, 1, PROBE_GAP_S)
