from __future__ import annotations

import pytest

from isthmus.edge_agent.http.openai.errors import ApiError
from isthmus.edge_agent.http.openai.state import ApiState, Limits
from tests.unit.edge_agent.language.scripted import ScriptedBackend


def test_admission_is_limited_and_slots_are_released() -> None:
    state = ApiState(ScriptedBackend(), Limits(admitted=2))
    with state.admit():
        with state.admit(), pytest.raises(ApiError, match="limit of 2") as caught, state.admit():
            raise AssertionError("a third request was admitted")
        with state.admit():
            pass
    assert (caught.value.status, caught.value.error["code"]) == (503, "overloaded")


def test_a_slot_is_released_after_an_error() -> None:
    state = ApiState(ScriptedBackend(), Limits(admitted=1))
    for _ in range(2):
        with pytest.raises(ZeroDivisionError), state.admit():
            raise ZeroDivisionError
