"""Every frame is reported once, in order, with one outcome, whatever happens in what order."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isthmus.edge_agent.streams.frames import OUTCOMES, Frame, FrameLog

ANSWER = {"answers": {"object": {"label": "cat"}}, "degraded": False, "bytes_up": 9, "why": "because"}


def frame(index: int) -> Frame:
    return Frame("front", index, index / 10)


@given(steps=st.lists(st.sampled_from(["send", "repeat", "filter", "answer", "drop", "fail"]), max_size=30))
def test_the_account_is_whole(steps: list[str]) -> None:
    reported: list[Frame] = []
    log, sent, waiting, read = FrameLog(reported.append, None), list[Frame](), 0, 0
    for step in [*steps, "fail"]:
        if step in ("send", "repeat", "filter"):
            new, read = frame(read), read + 1
            if step == "repeat" and sent:
                log.repeat(new, sent[-1])
            elif step == "filter":
                log.settle(new, "filtered")
            else:
                log.send(new)
                sent.append(new)
                waiting += 1
        elif step == "fail":
            log.fail_all("the end")
            waiting = 0
        elif waiting:
            waiting -= 1
            log.answered(ANSWER) if step == "answer" else log.dropped(1)
    assert [each.index for each in reported] == list(range(read))
    assert all(each.outcome in OUTCOMES for each in reported)


def test_a_repetition_waits_for_its_answer_and_has_not_its_costs() -> None:
    lines: list[dict[str, Any]] = []
    log = FrameLog(lambda each: lines.append(each.as_dict()), None)
    first, second = frame(0), frame(1)
    log.send(first)
    log.repeat(second, first)
    assert lines == []
    log.answered(ANSWER)
    assert [line["outcome"] for line in lines] == ["answered", "reused"]
    assert lines[0]["bytes_up"] == 9 and lines[1]["same_as"] == 0
    assert lines[1]["answers"] == ANSWER["answers"] and not {"bytes_up", "why"} & lines[1].keys()


def test_a_repetition_of_what_was_dropped_is_dropped() -> None:
    reported: list[Frame] = []
    log = FrameLog(reported.append, None)
    first, second = frame(0), frame(1)
    log.send(first)
    log.repeat(second, first)
    log.dropped(1)
    assert [each.outcome for each in reported] == ["dropped", "dropped"]
    assert reported[1].why == "as frame 0, whose answer it was to have"
    assert not first.usable


def test_answers_after_their_time_are_late() -> None:
    reported: list[Frame] = []
    log = FrameLog(reported.append, 0.5)
    for age_s in (0.0, 1.0):
        new = frame(0)
        new.read_s -= age_s
        log.send(new)
        log.answered(ANSWER)
    assert [each.outcome for each in reported] == ["answered", "late"]
    assert [each.fresh for each in reported] == [True, False]


@pytest.mark.parametrize("lack", [{"degraded": True}, {"missing": ["object"]}])
def test_degraded_answers_are_not_taken_by_later_frames(lack: dict[str, Any]) -> None:
    log, new = FrameLog(lambda _: None, None), frame(0)
    log.send(new)
    assert new.usable
    log.answered({**ANSWER, **lack})
    assert not new.usable
