from __future__ import annotations

import pytest

from isthmus.cloud_service.byte_budget import ByteBudget
from isthmus.models.errors import Overloaded


def test_bytes_are_held_up_to_the_limit_and_can_be_taken_again_when_given_back() -> None:
    budget = ByteBudget(10)
    budget.take(6)
    budget.take(4)
    with pytest.raises(Overloaded, match="1 bytes do not fit: 10 of the 10 bytes"):
        budget.take(1)
    assert budget.held_bytes == 10
    budget.give(6)
    budget.take(5)
    assert budget.held_bytes == 9
