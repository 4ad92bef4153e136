from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from isthmus.models.codecs.context_model import (
    ALL_CONTEXTS,
    OUTSIDE,
    PHASES,
    Checkerboard,
    ContextLookup,
    ContextWeights,
)

SHAPES = st.tuples(st.integers(1, 4), st.integers(1, 8), st.integers(1, 8))


def weights(channels: int, **changes: object) -> ContextWeights:
    """Every channel -3 .. 3; each neighbour is one context more; zeros have the middle context of non-anchors."""
    plain = ContextWeights(
        low_C=np.full(channels, -3, np.int8),
        high_C=np.full(channels, 3, np.int8),
        near_C2=np.ones((channels, 2), np.uint8),
        slope_C=np.full(channels, 16, np.int16),
        bias_C2=np.tile(np.array([0, 96], np.int16), (channels, 1)),
        ends_C24=np.zeros((channels, PHASES, 4), np.int8),
    )
    return dataclasses.replace(plain, **changes)  # type: ignore[arg-type]


def contexts_of(board: Checkerboard, chosen: ContextWeights) -> ContextLookup:
    """Lookups that say which context it is."""
    names = np.tile(np.arange(ALL_CONTEXTS, dtype=np.uint8), (len(chosen.low_C), 1))
    return ContextLookup(board, chosen, names)


def context_at(place: tuple[int, int], integers_HW: list[list[int]], **changes: object) -> int:
    """The context of one place of one channel."""
    integers_CHW = np.array([integers_HW], np.int32)
    board, phase = Checkerboard((1, len(integers_HW), len(integers_HW[0])), [0]), sum(place) % 2
    mark_CHW = np.zeros_like(integers_CHW)
    mark_CHW[0, *place] = 1
    found = contexts_of(board, weights(1, **changes)).priors(board.scatter(integers_CHW), phase)
    return int(found[board.phase(board.scatter(mark_CHW), phase) > 0].item())


@given(shape_CHW=SHAPES, seed=st.integers(0, 1 << 32))
def test_gather_undoes_scatter(shape_CHW: tuple[int, int, int], seed: int) -> None:
    integers_CHW = np.random.default_rng(seed).integers(-100, 100, shape_CHW).astype(np.int32)
    board = Checkerboard(shape_CHW, range(shape_CHW[0]))
    flat = board.scatter(integers_CHW)
    np.testing.assert_array_equal(board.gather(flat), integers_CHW)
    assert (flat[board.inside == 0] == 0).all()
    assert board.inside.sum() == integers_CHW.size


def test_channels_that_are_left_out_are_zero() -> None:
    board = Checkerboard((3, 2, 2), [1])
    assert board.gather(board.scatter(np.ones((3, 2, 2), np.int32))).tolist() == [
        [[0, 0]] * 2,
        [[1, 1]] * 2,
        [[0, 0]] * 2,
    ]


@given(shape_CHW=SHAPES, seed=st.integers(0, 1 << 32))
def test_phases_are_the_colours_of_a_checkerboard(shape_CHW: tuple[int, int, int], seed: int) -> None:
    board = Checkerboard(shape_CHW, range(shape_CHW[0]))
    colour_CHW = np.broadcast_to(np.indices(shape_CHW[1:]).sum(0) % 2 + 1, shape_CHW)
    flat = board.scatter(colour_CHW)
    for phase in range(PHASES):
        assert set(board.phase(flat, phase)[board.phase(board.inside, phase) > 0].tolist()) <= {phase + 1}


@given(shape_CHW=SHAPES, seed=st.integers(0, 1 << 32))
def test_neighbours_are_summed_and_zero_outside_the_image(shape_CHW: tuple[int, int, int], seed: int) -> None:
    integers_CHW = np.random.default_rng(seed).integers(-100, 100, shape_CHW).astype(np.int32)
    board = Checkerboard(shape_CHW, range(shape_CHW[0]))
    padded = np.pad(integers_CHW, ((0, 0), (1, 1), (1, 1)))
    expected = (padded[:, 1:-1, :-2] + padded[:, 1:-1, 2:], padded[:, :-2, 1:-1] + padded[:, 2:, 1:-1])
    inside = board.phase(board.inside, 1) > 0
    for sums, of_CHW in zip(board.neighbours(board.scatter(integers_CHW)), expected, strict=True):
        np.testing.assert_array_equal(sums[inside], board.phase(board.scatter(of_CHW), 1)[inside])


def test_several_latents_are_scattered_at_once() -> None:
    integers_NCHW = np.random.default_rng(0).integers(-3, 4, (5, 2, 3, 4)).astype(np.int32)
    board = Checkerboard((2, 3, 4), range(2))
    found = contexts_of(board, weights(2)).priors(board.scatter(integers_NCHW), 1)
    for flat, one_CHW in zip(found, integers_NCHW, strict=True):
        np.testing.assert_array_equal(flat, contexts_of(board, weights(2)).priors(board.scatter(one_CHW), 1))


@pytest.mark.parametrize(
    ("integers_HW", "context"),
    [
        ([[0, 0, 0], [0, 0, 0], [0, 0, 0]], 12),
        ([[0, 1, 0], [0, 0, 2], [0, 0, 0]], 15),
        ([[0, -1, 0], [0, 3, -2], [0, 0, 0]], 9),
        ([[3, 0, 3], [0, 3, 0], [3, 0, 3]], 12),
        ([[0, 3, 0], [3, 0, 3], [0, 3, 0]], 17),
        ([[0, -3, 0], [-3, 0, -3], [0, -3, 0]], 6),
    ],
)
def test_contexts_of_non_anchors_follow_the_sum_of_four_neighbours(integers_HW: list[list[int]], context: int) -> None:
    padded = [[0] * 5, [0, *integers_HW[0], 0], [0, *integers_HW[1], 0], [0, *integers_HW[2], 0]]  # middle at (2, 2)
    shifted = [row[1:] for row in padded]  # middle at (2, 1): a non-anchor
    assert context_at((2, 1), shifted) == context


def test_anchors_know_no_integers() -> None:
    assert {context_at((1, 1), [[n, n, n]] * 3) for n in (-3, 0, 3)} == {0}


@pytest.mark.parametrize(("place", "context"), [((0, 0), 5), ((1, 1), 0), ((2, 2), 0), ((0, 2), 3), ((2, 0), 2)])
def test_ends_of_the_image_have_biases(place: tuple[int, int], context: int) -> None:
    ends_C24 = np.array([[[48, -80, 40, 0], [0, 0, 0, 0]]], np.int8)
    ends_C24[0, 0, 1] = 0
    assert context_at(place, [[0] * 3] * 3, ends_C24=ends_C24) == context


def test_sums_across_and_down_are_weighted() -> None:
    integers_HW = [[0, 1, 0], [1, 0, 1], [0, 1, 0]]
    near_C2 = np.array([[3, 0]], np.uint8)
    assert context_at((0, 1), [[1, 0, 1], [0, 1, 0]], near_C2=near_C2) == 17  # 12 + 3 * 2, cut off
    assert context_at((1, 0), integers_HW, near_C2=near_C2) == 12
    assert context_at((1, 0), [[-1, 0, 0], [0, 0, 0], [-1, 0, 0]], near_C2=np.array([[0, 2]], np.uint8)) == 8


def test_a_guess_is_cut_downwards() -> None:
    bias_C2 = np.array([[0, 95]], np.int16)
    assert context_at((0, 1), [[0, 0, 0]], bias_C2=bias_C2) == 11


@given(shape_CHW=SHAPES, seed=st.integers(0, 1 << 32))
def test_places_outside_the_image_have_no_prior(shape_CHW: tuple[int, int, int], seed: int) -> None:
    integers_CHW = np.random.default_rng(seed).integers(-3, 4, shape_CHW).astype(np.int32)
    board = Checkerboard(shape_CHW, range(shape_CHW[0]))
    contexts = contexts_of(board, weights(shape_CHW[0], near_C2=np.full((shape_CHW[0], 2), 3, np.uint8)))
    for phase in range(PHASES):
        found = contexts.priors(board.scatter(integers_CHW), phase)
        np.testing.assert_array_equal(found == OUTSIDE, board.phase(board.inside, phase) == 0)


def test_lookups_of_many_channels_need_more_than_16_bits() -> None:
    channels = 200
    board = Checkerboard((channels, 3, 3), range(channels))
    wide = weights(channels, low_C=np.full(channels, -127, np.int8), high_C=np.full(channels, 127, np.int8))
    integers_CHW = np.random.default_rng(0).integers(-127, 128, (channels, 3, 3)).astype(np.int32)
    found = contexts_of(board, wide).priors(board.scatter(integers_CHW), 1)
    alone = Checkerboard((1, 3, 3), [0])
    for channel in (0, 57, 199):
        one = contexts_of(alone, weights(1, low_C=wide.low_C[:1], high_C=wide.high_C[:1]))
        places = board.channels() == channel
        np.testing.assert_array_equal(found[places], one.priors(alone.scatter(integers_CHW[[channel]]), 1))
