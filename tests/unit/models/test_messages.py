from __future__ import annotations

import dataclasses
import inspect

import pytest

from isthmus.models import messages as types
from isthmus.models.messages import Codec

VALUES = [kind for kind in vars(types).values() if inspect.isclass(kind) and dataclasses.is_dataclass(kind)]


@pytest.mark.parametrize("kind", VALUES)
def test_values_that_flow_are_frozen(kind: type) -> None:
    value = object.__new__(kind)
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(value, dataclasses.fields(kind)[0].name, None)


def test_codec_numbers_are_on_the_wire() -> None:
    assert {codec.name: int(codec) for codec in Codec} == {"BOTTLENECK": 1, "IMAGE": 2}
