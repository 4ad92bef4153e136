from __future__ import annotations

from dataclasses import dataclass

import pytest

from isthmus.edge_agent.cli.clouds import describe_clouds, warn_of
from isthmus.edge_agent.policy.breaker import STATES, State


@dataclass
class StubLink:
    target: str
    state: State
    refusal: str | None = None


@pytest.mark.parametrize("state", STATES)
def test_people_read_whether_a_cloud_answers_and_nothing_about_a_breaker(state: State) -> None:
    words = describe_clouds([StubLink("cloud:1", state)])
    assert words.startswith("cloud cloud:1 ") and not words.endswith(("open", "closed"))


def test_clouds_are_listed() -> None:
    links = [StubLink("a:1", "closed"), StubLink("b:2", "open")]
    assert describe_clouds(links) == "cloud a:1 connected, cloud b:2 unreachable"
    assert describe_clouds([]) == "no cloud"


def test_a_cloud_that_cannot_be_used_is_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    reason = "the cloud does not hold elpv"
    warn_of([StubLink("a:1", "half_open"), StubLink("b:2", "open", reason), StubLink("c:3", "open")])
    assert capsys.readouterr() == ("", f"warning: cloud b:2: {reason}\n")


def test_at_the_start_a_cloud_answers_for_the_first_time() -> None:
    assert describe_clouds([StubLink("a:1", "half_open")]) == "cloud a:1 answering"
