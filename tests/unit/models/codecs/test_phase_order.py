from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from isthmus.models.codecs.context_model import ANCHOR, NON_ANCHOR, PHASES
from isthmus.models.codecs.phase_order import MAX_SEEDED, PhaseOrders
from tests.unit.models.codecs.codec_tables import FIXED, fixed_tables, random_codec, random_integers

SEEDS = st.integers(0, 1 << 32)


@pytest.fixture
def orders() -> PhaseOrders:
    return PhaseOrders(fixed_tables(), 0, FIXED.shape)


@given(seed=SEEDS)
def test_positions_are_sorted_by_prior_and_coded_once(seed: int) -> None:
    codec = random_codec(seed)
    orders = PhaseOrders(codec.tables, 0, codec.shape_CHW)
    flat = orders.board.scatter(random_integers(codec, 0, seed))
    for phase in range(PHASES):
        order = orders.of(flat, phase)
        assert (np.diff(order.priors_N.astype(int)) >= 0).all()
        inside = np.flatnonzero(orders.board.phase(orders.board.inside, phase))
        assert sorted(order.positions_N.tolist()) == inside.tolist()


@given(seed=SEEDS)
def test_each_table_has_one_span(seed: int) -> None:
    codec = random_codec(seed)
    orders = PhaseOrders(codec.tables, 0, codec.shape_CHW)
    flat = orders.board.scatter(random_integers(codec, 0, seed))
    for phase in range(PHASES):
        order, start = orders.of(flat, phase), 0
        for table, end in enumerate(order.ends_T):
            assert set(codec.tables.table_E[order.priors_N[start:end]].tolist()) <= {table}
            start = end
        seeded = len(order.priors_N) - order.ends_T[-1]
        assert seeded == 0 if phase == ANCHOR else seeded <= MAX_SEEDED


def test_the_order_of_anchors_needs_no_integers(orders: PhaseOrders) -> None:
    assert orders.of(orders.board.scatter(FIXED), ANCHOR) is orders.of(orders.board.blank(), ANCHOR)


def test_the_order_of_non_anchors_follows_the_anchors(orders: PhaseOrders) -> None:
    known, unknown = orders.board.scatter(FIXED), orders.board.blank()
    assert orders.of(known, NON_ANCHOR).priors_N.tolist() != orders.of(unknown, NON_ANCHOR).priors_N.tolist()


@pytest.mark.parametrize(("channel", "value"), [(0, 3), (0, -3), (1, 0), (2, 2)])
def test_an_integer_outside_its_channels_range_is_found(orders: PhaseOrders, channel: int, value: int) -> None:
    integers_CHW = FIXED.copy()
    assert not orders.any_outside(integers_CHW)
    integers_CHW[channel, 0, 0] = value
    assert orders.any_outside(integers_CHW)


def test_a_phase_with_an_integer_out_of_range_is_found(orders: PhaseOrders) -> None:
    integers_CHW = FIXED.copy()
    integers_CHW[0, 0, 1] = 3
    flat = orders.board.scatter(integers_CHW)
    assert [orders.out_of_range(flat, phase) for phase in range(PHASES)] == [False, True]


def test_gather_restores_silent_channels(orders: PhaseOrders) -> None:
    np.testing.assert_array_equal(orders.gather(orders.board.scatter(FIXED)), FIXED)
