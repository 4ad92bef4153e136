from __future__ import annotations

import pytest
import torch
from torch import nn

from isthmus.models.errors import InvalidInput
from isthmus.models.recipes.vision import own_model
from isthmus.models.recipes.vision.cutting import Captured, capture
from tests.unit.models.recipes.vision.own_nets import SIDE, Own, factory

NETS = "tests.unit.models.recipes.vision.own_nets"


@pytest.fixture(scope="module")
def captured() -> Captured:
    return capture(factory(), (3, SIDE, SIDE))


def test_cuts_are_proposed_where_little_crosses_early(captured: Captured) -> None:
    assert [cut.name for cut in captured.cuts] == ["first", "second", "third"]
    assert own_model.proposed(captured) == ("first", "second")


def test_the_table_shows_where_less_crosses_and_what_was_chosen() -> None:
    wide = nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.Conv2d(4, 16, 3, 1, 1), nn.Conv2d(16, 2, 3, 2, 1), nn.Flatten())
    captured = capture(nn.Sequential(*wide, nn.Linear(128, 2)), (3, SIDE, SIDE))
    title, *rows, left_out = own_model.table(captured, ["2"], 3 * SIDE**2)
    assert "MMAC" in title and [row.split()[:2] for row in rows] == [["0", "4x16x16"], [">", "2"]]
    assert left_out.strip().startswith("and 1 more")
    chosen = own_model.table(captured, ["1"], 3 * SIDE**2)
    assert [row[:3] for row in chosen[1:]] == ["  0", "> 1", "  2"]


@torch.inference_mode()
@pytest.mark.parametrize("cuts", [("first",), ("first", "second"), ("third",)])
def test_blocks_after_the_last_cut_are_the_rest_of_the_model(captured: Captured, cuts: tuple[str, ...]) -> None:
    network = own_model.backbone(captured, cuts)
    images_B3HW = torch.randn(2, 3, SIDE, SIDE)
    torch.testing.assert_close(network(images_B3HW), factory()(images_B3HW))
    assert len(network.channels) == len(network.blocks) - 1
    assert network.channels[len(cuts) - 1] == {"first": 8, "second": 16, "third": 16}[cuts[-1]]


@pytest.mark.parametrize(
    ("reference", "words"),
    [
        ("nets", "expected package.module:factory"),
        ("folder/net.onnx", "ONNX files are not taken, give the torch.nn.Module"),
        ("no_such_package.nets:make", "ModuleNotFoundError"),
        ("{here}:missing", "AttributeError"),
        ("{here}:broken", "RuntimeError: .*no weights here"),
        ("{here}:nothing", "made a str, expected a torch.nn.Module"),
    ],
)
def test_a_model_that_cannot_be_had_is_one_clear_line(reference: str, words: str) -> None:
    with pytest.raises(InvalidInput, match=words) as caught:
        own_model.load_model(reference.format(here=NETS))
    assert "\n" not in str(caught.value)


def test_a_model_is_made_by_its_factory() -> None:
    model = own_model.load_model(f"{NETS}:factory")
    assert isinstance(model, Own) and not model.training
