from __future__ import annotations

from isthmus.edge_agent.http.openai.state import LARGE_BODY_BYTES, ApiState, Limits
from tests.unit.edge_agent.language.scripted import ScriptedBackend


def test_answers_with_a_cloud_leave_the_running_slots_of_the_device_alone() -> None:
    state = ApiState(ScriptedBackend(), Limits(running=1))
    assert state.running("auto") is state.running("cloud") is not state.running("edge")


def test_large_bodies_are_parsed_one_at_a_time() -> None:
    state = ApiState(ScriptedBackend(), Limits())
    sizes = (10, LARGE_BODY_BYTES, LARGE_BODY_BYTES + 1)
    assert [int(state.parsing(size).total_tokens) for size in sizes] == [4, 4, 1]
