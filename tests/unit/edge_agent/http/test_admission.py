from __future__ import annotations

import pytest

from isthmus.edge_agent.http.admission import AdmissionSlots
from isthmus.models.errors import Overloaded


def test_admission_is_limited_and_slots_are_released() -> None:
    slots = AdmissionSlots(2)
    with slots.hold():
        with slots.hold():
            for refused in (slots.check, slots.hold().__enter__):
                with pytest.raises(Overloaded, match="limit of 2"):
                    refused()
        with slots.hold():
            pass
    slots.check()


def test_a_slot_is_released_after_an_error() -> None:
    slots = AdmissionSlots(1)
    for _ in range(2):
        with pytest.raises(ZeroDivisionError), slots.hold():
            raise ZeroDivisionError
