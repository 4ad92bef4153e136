"""The betting test, what it draws, its alarm, and new thresholds from pairs."""

import json
import random
from typing import Any

import pytest

from isthmus.edge_agent.policy.audit import ALPHA, RAISED, Audit, Bets, Level, Pair, pairs_needed
from isthmus.edge_agent.policy.recalibration import binomial_cdf, certify, recalibrated, upper_bound

LEVELS = (Level((0.7, 0.7)), Level((0.9, 0.9)))
RIGHT, WRONG, SENT = Pair((0.8, 0.9), (1, 1), 1), Pair((0.8, 0.95), (0, 1), 1), Pair((0.1, 0.2), (0, 0), 1)


def test_a_bet_never_gains_on_average_where_the_rate_is_kept() -> None:
    bets = Bets(0.02)
    for less, more in bets._gains:
        assert 0.98 * less + 0.02 * more == pytest.approx(1)
        assert less < 1 < more


def test_a_level_answers_at_its_first_exit_that_is_sure_enough() -> None:
    assert [LEVELS[0].exit(pair.scores) for pair in (RIGHT, SENT)] == [0, None]
    assert LEVELS[1].exit(WRONG.scores) == 1
    assert [level.differs(WRONG) for level in LEVELS] == [True, False]
    assert not LEVELS[0].differs(SENT)


def test_disagreement_raises_the_alarm_and_the_next_level_that_keeps_the_promise_is_used() -> None:
    audit = Audit(0.01, LEVELS, 0.01)
    count = 0
    while not audit.alarm and count < 50:
        count += 1
        audit.add(WRONG)
    assert count <= 4 and audit.in_force == LEVELS[1]
    assert audit.bets[0].capital >= 1 / ALPHA and audit.share == RAISED, "pairs for a recalibration are due"
    worse = Pair((0.95, 0.95), (0, 0), 1)
    for _ in range(6):
        audit.add(worse)
    assert audit.in_force is None and audit.level == 2, "no exit answers any more"


def test_a_promise_that_is_kept_gives_no_alarm() -> None:
    audit, draw = Audit(0.02, LEVELS, 0.01), random.Random(0)
    for _ in range(3000):
        audit.add(WRONG if draw.random() < 0.015 else RIGHT)
    assert not audit.alarm


def test_what_is_drawn_is_seeded_and_no_more_than_the_share() -> None:
    drawn = [[Audit(0.01, LEVELS, 0.01, seed).draw() for _ in range(1)] for seed in (1, 1)]
    assert drawn[0] == drawn[1]
    audit = Audit(0.01, LEVELS, 0.01)
    assert 70 <= sum(audit.draw() for _ in range(10_000)) <= 130
    assert not any(Audit(0.01, LEVELS, 0.0).draw() for _ in range(100))


def test_inputs_unlike_those_before_are_an_alarm_until_enough_of_them_keep_the_promise() -> None:
    audit = Audit(0.01, LEVELS, 0.01)
    audit.doubt()
    assert audit.alarm and audit.share == RAISED and audit.in_force == LEVELS[0], "exits go on"
    for count in range(audit.pairs_due):
        assert audit.alarm
        audit.add(WRONG if count == 5 else RIGHT)
    assert not audit.alarm and audit.share < RAISED


def test_a_strict_audit_lets_no_exit_answer_inputs_unlike_those_before() -> None:
    audit = Audit(0.01, LEVELS, 0.01, strict=True)
    audit.doubt()
    assert audit.in_force is None
    changed = [audit.add(RIGHT) for _ in range(audit.pairs_due)]
    assert changed == [False] * (audit.pairs_due - 1) + [True] and audit.in_force == LEVELS[0]


def test_a_doubt_lasts_while_exits_differ_more_often_than_promised() -> None:
    audit = Audit(0.05, LEVELS, 0.01)
    audit.doubt()
    for count in range(2 * audit.pairs_due):
        audit.add(WRONG if count % 15 == 0 else RIGHT)
    assert audit.doubted
    loaded = Audit(0.05, LEVELS, 0.01)
    assert loaded.load(json.loads(json.dumps(audit.dump()))) and loaded.dump() == audit.dump() and loaded.doubted
    audit.renew([LEVELS[1]])
    assert not audit.alarm


def test_a_single_difference_raises_the_share_for_a_while() -> None:
    audit = Audit(0.01, LEVELS, 0.01)
    audit.add(WRONG)
    assert audit.share > 0.05 and not audit.alarm
    for _ in range(200):
        audit.add(RIGHT)
    assert audit.share == pytest.approx(0.01, rel=0.2)


def test_an_audit_goes_on_from_its_dump_and_ends_its_alarm_with_other_levels() -> None:
    audit, other = Audit(0.01, LEVELS, 0.01), Audit(0.01, LEVELS, 0.01)
    for _ in range(6):
        audit.add(WRONG)
    assert other.load(json.loads(json.dumps(audit.dump()))) and other.dump() == audit.dump() and other.alarm
    assert not Audit(0.02, LEVELS, 0.01).load(audit.dump())
    assert not Audit(0.01, LEVELS[:1], 0.01).load(audit.dump()), "of another promise's thresholds"
    other.renew([LEVELS[1]])
    assert not other.alarm and other.in_force == LEVELS[1]


@pytest.mark.parametrize(
    "change",
    [
        {"levels": [[0.7], [0.9]]},
        {"levels": [["a", "b"], [0.9, 0.9]]},
        {"bets": []},
        {"bets": [[[1.0], [1.0]]] * 2},
        {"in_alarm": None},
    ],
)
def test_what_no_audit_has_dumped_changes_nothing(change: dict[str, Any]) -> None:
    audit = Audit(0.01, LEVELS, 0.01)
    before = audit.dump()
    with pytest.raises((KeyError, TypeError, ValueError)):
        audit.load({**before, **change})
    assert audit.dump() == before


def test_the_fewest_pairs_are_those_that_certify_without_a_difference() -> None:
    needed = pairs_needed(0.01)
    assert needed == 230
    assert certify([RIGHT] * needed, 0.01) is not None
    assert certify([RIGHT] * (needed - 1), 0.01) is None


def test_thresholds_are_certified_from_pairs_strictest_last() -> None:
    pairs = [RIGHT, Pair((0.99, 0.99), (1, 1), 1)] * 500 + [Pair((0.6, 0.6), (0, 0), 1)] * 100
    found = recalibrated(pairs, 0.02)
    assert [each.epsilon for each in found] == [0.02, 0.01, 0.005]
    assert 0.6 < found[0].level.confidences[0] <= 0.8 and found[0].coverage == pytest.approx(1000 / 1100)
    assert recalibrated([Pair((0.99,), (0,), 1)] * 1000, 0.02) == [], "the surest answers differ"


def test_an_unknown_answer_of_the_cloud_counts_as_a_difference() -> None:
    assert LEVELS[0].differs(Pair((0.8, 0.9), (1, 1)))


def test_binomials() -> None:
    assert binomial_cdf(1, 3, 0.5) == pytest.approx(0.5)
    assert (binomial_cdf(3, 3, 0.5), binomial_cdf(0, 3, 0.0), binomial_cdf(0, 3, 1.0)) == (1, 1, 0)
    assert upper_bound(0, 230) == pytest.approx(0.00996, abs=1e-4)
