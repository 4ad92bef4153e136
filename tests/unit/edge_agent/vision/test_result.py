from __future__ import annotations

import json
from dataclasses import replace

import pytest

from isthmus.edge_agent.vision.result import Answer, TaskAnswer, page

DEFECT, COLOUR = TaskAnswer("bad", 1, (0.25, 0.75)), TaskAnswer("red", 0, (0.5, 0.125, 0.375))
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
    why="as it had to be",
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
def test_a_person_reads_every_answer_and_where_it_came_from(answer: Answer, line: str) -> None:
    assert page("a.png", answer) == [line, "    why: as it had to be", "    ms: decode 1.0, encode 2.0"]


def test_a_program_reads_the_same() -> None:
    shown = json.loads(json.dumps(BOTH.as_dict()))
    assert shown["answers"]["colour"] == {"label": "red", "index": 0, "probabilities": [0.5, 0.125, 0.375]}
    assert (shown["tap"], shown["width"], shown["rate"], shown["missing"]) == ("light", 0.5, 2, [])
