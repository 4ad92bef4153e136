from __future__ import annotations

import pytest
import torch

from isthmus.models.recipes.vision.crossing import Layout, Pack, Unpack, layouts_of, token_layout


def crossing(*layouts: Layout) -> tuple[Pack, Unpack]:
    return Pack(layouts), Unpack(layouts)


@pytest.mark.parametrize(
    ("layout", "shape", "packed"),
    [
        (Layout("map", (5, 4, 6)), (5, 4, 6), (5, 4, 6)),
        (Layout("last", (5, 4, 6)), (4, 6, 5), (5, 4, 6)),
        (token_layout(24, 5, "tokens", (32, 48)), (24, 5), (5, 4, 6)),
        (token_layout(24, 5, "columns", (32, 48)), (5, 24), (5, 4, 6)),
        (token_layout(17, 5, "tokens", (32, 32)), (17, 5), (5, 5, 4)),
        (token_layout(18, 5, "tokens", (64, 64)), (18, 5), (5, 5, 4)),
        (token_layout(23, 5, "tokens", (32, 48)), (23, 5), (5, 1, 23)),
    ],
    ids=["map", "last", "tokens", "columns", "a class token", "two of them", "no grid"],
)
def test_what_crosses_comes_back(layout: Layout, shape: tuple[int, ...], packed: tuple[int, ...]) -> None:
    pack, unpack = crossing(layout)
    given = torch.randn(2, *shape)
    map_BCHW = pack(given)
    assert map_BCHW.shape == (2, *packed) == (2, *pack.shape)
    (back,) = unpack(map_BCHW)
    assert torch.equal(back, given) and back.is_contiguous()
    assert pack.values == given[0].numel()


def test_maps_of_several_scales_share_the_middle_one_s_grid() -> None:
    maps = [torch.randn(2, channels, 2 * side, side) for channels, side in ((3, 16), (4, 8), (5, 4))]
    layouts = layouts_of(maps, [1, 1, None], (64, 32))
    assert layouts is not None
    pack, unpack = crossing(*layouts)
    map_BCHW = pack(*maps)
    assert map_BCHW.shape == (2, 4 * 3 + 4 + 5, 16, 8) and pack.factors == [2, 1, -2]
    for back, given in zip(unpack(map_BCHW), maps, strict=True):
        torch.testing.assert_close(back, given)


@pytest.mark.parametrize(
    ("shapes", "axes"),
    [([(3, 16, 16), (3, 12, 12)], [1, 1]), ([(3, 16, 16), (9, 4)], [1, 2]), ([(7,)], [1]), ([(9, 4)], [None])],
    ids=["no multiple", "a map and tokens", "a vector", "an unknown axis"],
)
def test_what_makes_no_map_is_no_cut(shapes: list[tuple[int, ...]], axes: list[int | None]) -> None:
    assert layouts_of([torch.zeros(2, *shape) for shape in shapes], axes, (32, 32)) is None
