from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from isthmus.models.vision.architecture import Architecture, TapArchitecture

TAP: dict[str, Any] = {"after": 1, "latent_channels": 4, "decoder_channels": 16, "rates": 2}
IMAGE_TAP: dict[str, Any] = {**TAP, "after": 0, "blocks": 3, "widths": (0.5, 1.0)}


def architecture(**changes: Any) -> Architecture:
    fields: dict[str, Any] = {"builder": "b", "backbone": "n", "classes": (2,), "cuts": (2, 5), "taps": (TAP,)}
    return Architecture.model_validate({**fields, **changes})


def test_a_tap_on_the_image_has_blocks_and_widths() -> None:
    tap = TapArchitecture.model_validate(IMAGE_TAP)
    assert (tap.blocks, tap.widths, tap.rejoin, tap.own_tail) == (3, (0.5, 1.0), 0, False)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({**IMAGE_TAP, "blocks": 0}, "blocks must be above 0 for a tap on the image"),
        ({**TAP, "blocks": 1}, "blocks must be above 0 for a tap on the image"),
        ({**TAP, "widths": (0.5, 1.0)}, "only a tap on the image has several widths"),
        ({**IMAGE_TAP, "widths": (1.0, 0.5)}, "must rise strictly and end with 1"),
        ({**IMAGE_TAP, "widths": (0.5,)}, "must rise strictly and end with 1"),
    ],
)
def test_a_tap_that_cannot_be_built_is_refused(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        TapArchitecture.model_validate(fields)


def test_exits_may_be_made_of_later_blocks() -> None:
    assert architecture(exit_blocks=((2, 4), (5,))).exit_blocks == ((2, 4), (5,))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"cuts": (5, 2)}, "must rise strictly"),
        ({"cuts": (2, 2)}, "must rise strictly"),
        ({"taps": ({**TAP, "rejoin": 6},)}, "a tap rejoins at block 6, the tail starts at 5"),
        ({"exit_blocks": ((2,),)}, "exit_blocks has 1 exits for 2 cuts"),
        ({"exit_blocks": ((1, 2), (5,))}, "must rise, from the cut at 2 on"),
        ({"exit_blocks": ((4, 3), (5,))}, "must rise, from the cut at 2 on"),
    ],
)
def test_an_architecture_that_cannot_be_built_is_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        architecture(**changes)
