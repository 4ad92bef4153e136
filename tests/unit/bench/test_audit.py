"""The benchmark of the audit: its runs in arrays are the policy's, one by one; its figures of a made-up bundle."""

from __future__ import annotations

import numpy as np
import pytest

from isthmus.edge_agent.policy.audit import Audit, Level, Pair
from tests.bench.audit import Case, measure, table
from tests.bench.audit_recording import AS_IS, Recorded
from tests.bench.audit_runs import Runs, Stream

EPSILON, LEVEL = 0.02, Level((0.7, 0.6))


def answers(wrong: float, reached: float, count: int = 2000) -> Recorded:
    """Two exits; the first reaches LEVEL so often, and what exits is wrong so often."""
    random = np.random.default_rng(0)
    scores_NE = np.where(random.random((count, 2)) < reached, 0.9, 0.3).astype(np.float32)
    cloud_N = np.zeros(count, int)
    answers_NE = np.repeat((random.random(count) < wrong)[:, None], 2, axis=1).astype(int)
    return Recorded(scores_NE, answers_NE, cloud_N)


@pytest.mark.parametrize(("wrong", "reached", "alarms"), [(0.005, 0.5, 0), (0.005, 0.8, 0), (0.15, 0.5, 4)])
def test_runs_in_arrays_are_the_policys(wrong: float, reached: float, alarms: int) -> None:
    count, inputs, found = 4, 1500, answers(wrong, reached)
    stream, random = Stream.of(found, LEVEL), np.random.default_rng(1)
    photos, uniform = random.integers(len(stream), size=(inputs, count)), random.random((inputs, count))
    runs, audits = Runs(EPSILON, 0.05, count), [Audit(EPSILON, [LEVEL], 0.05) for _ in range(count)]
    ended = 0
    for index_R, uniform_R in zip(photos, uniform, strict=True):
        drawn_R = runs.draw(uniform_R)
        rows = np.array([row for row in np.flatnonzero(drawn_R) if not audits[row].alarm], int)
        alarmed = runs.add(rows, stream.differs_N[index_R[rows]])
        for row, audit in enumerate(audits):
            if not audit.alarm:
                audit.draw()
                assert (uniform_R[row] < audit.share) == drawn_R[row]
        for row, alarm in zip(rows, alarmed, strict=True):
            photo = index_R[row]
            pair = Pair(*(tuple(each[photo].tolist()) for each in (found.scores_NE, found.answers_NE)), cloud=0)
            assert audits[row].add(pair) == alarm
            assert runs.capitals_RB[row] == pytest.approx(audits[row].bets[0].capitals)
            ended += alarm
    assert ended == alarms


def test_figures_of_a_made_up_bundle() -> None:
    found = {AS_IS: answers(0.005, 0.5), "noise 5": answers(0.3, 0.5)}
    row = measure(found, Case("made up", EPSILON, LEVEL), share=0.05, runs=20, inputs=300)
    assert row["unshifted"]["false_alarms"]["value"] == 0 and row["unshifted"]["uploads_per_input"] < 0.1
    shift = row["shifts"]["noise 5"]
    assert shift["reason"] and shift["alarmed"]["value"] == shift["ceiling"]["value"] == 1
    assert "| noise 5 | 2" in table(row)
