from __future__ import annotations

import json
from dataclasses import replace

import pytest

from isthmus.edge_agent.vision.request import InferenceRequest, RequestState
from isthmus.edge_agent.vision.result import Answer, AnswerRoute, build_answer, format_answer
from isthmus.edge_agent.vision.task_answers import Classification
from isthmus.models.vision.bundle import Bundle

DEFECT, COLOUR = Classification("bad", 1, (0.25, 0.75)), Classification("red", 0, (0.5, 0.125, 0.375))
SPLIT = Answer(
    label="bad",
    index=1,
    probabilities=(0.25, 0.75),
    answers={"defect": DEFECT},
    missing=(),
    route="split",
    exit=None,
    tap="light",
    width=0.5,
    rate=2,
    bytes_up=140,
    bytes_down=25,
    stage_ms={"decode": 1.04, "encode": 2.0, "total": 60.0},
    degraded=False,
    cost_usd=0.0,
    why="the reason",
)
BOTH = replace(SPLIT, answers={"defect": DEFECT, "colour": COLOUR})
HERE = replace(SPLIT, route="exit", exit="exit0", tap=None, width=None, rate=None, bytes_up=0)
LOST = replace(HERE, route="fallback", degraded=True, missing=("colour",))


@pytest.mark.parametrize(
    ("answer", "line"),
    [
        (SPLIT, "a.png: bad (75.0%), by the cloud from 140 B, tap light width 0.5 rate 2, 60.0 ms"),
        (
            BOTH,
            "a.png: defect bad (75.0%), colour red (50.0%),"
            " by the cloud from 140 B, tap light width 0.5 rate 2, 60.0 ms",
        ),
        (
            replace(HERE, route="offload", bytes_up=9000),
            "a.png: bad (75.0%), by the cloud from the whole image, 9000 B, 60.0 ms",
        ),
        (HERE, "a.png: bad (75.0%), on the device at exit0, 60.0 ms"),
        (LOST, "a.png: defect bad (75.0%), colour MISSING, on the device at exit0, DEGRADED, 60.0 ms"),
    ],
    ids=["split", "two tasks", "offload", "exit", "missing"],
)
def test_people_read_every_answer_and_who_gave_it(answer: Answer, line: str) -> None:
    assert format_answer("a.png", answer) == [line, "    why: the reason", "    ms: decode 1.0, encode 2.0"]


def test_a_program_reads_the_same() -> None:
    shown = json.loads(json.dumps(BOTH.as_dict()))
    assert shown["answers"]["colour"] == {"label": "red", "index": 0, "probabilities": [0.5, 0.125, 0.375]}
    assert (shown["tap"], shown["width"], shown["rate"], shown["missing"]) == ("light", 0.5, 2, [])


def built(bundle: Bundle, requested: tuple[int, ...], found: tuple[int, ...], route: AnswerRoute) -> Answer:
    """An answer to `requested` tasks of which `found` were answered."""
    state = RequestState(InferenceRequest(requested, (), forced_split=False, no_exit=None), 1.0)
    state.stage_ms = {"total": 1.23456}
    answers = {0: DEFECT, 1: COLOUR}
    return build_answer(
        state,
        bundle.manifest.tasks,
        {task: answers[task] for task in found},
        route=route,
        exit_name=None,
        point=(None, None, None),
        cost_usd=0.0,
        why="the reason",
    )


def test_answers_come_in_the_order_requested_and_the_first_one_leads(tiny_bundle: Bundle) -> None:
    answer = built(tiny_bundle, (1, 0), (0, 1), "split")
    assert list(answer.answers.items()) == [("colour", COLOUR), ("defect", DEFECT)]
    assert (answer.label, answer.index, answer.probabilities) == ("red", 0, (0.5, 0.125, 0.375))
    assert (answer.missing, answer.degraded, answer.stage_ms) == ((), False, {"total": 1.235})


@pytest.mark.parametrize(("requested", "missing"), [((1,), ("colour",)), ((1, 0), ("colour",)), ((0,), ())])
def test_without_a_cloud_the_first_task_of_the_bundle_answers(
    tiny_bundle: Bundle, requested: tuple[int, ...], missing: tuple[str, ...]
) -> None:
    answer = built(tiny_bundle, requested, (0,), "fallback")
    assert (answer.label, answer.missing, answer.degraded) == ("bad", missing, True)
    assert answer.answers == {"defect": DEFECT}
