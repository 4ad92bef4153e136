"""Distributions of sampled tokens, the shared noise, and what verification with it commits.

Chi-square tests have fixed seeds, so they pass or fail alike in every run; SIGNIFICANCE is the chance with which a
right implementation would have failed one when its seeds were picked.
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import scipy.special
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as nps
from numpy.typing import NDArray

from isthmus.models.errors import InvalidInput
from isthmus.models.language.sampling import choose, gumbel, log_softmax, nucleus
from isthmus.models.messages import GREEDY, MAX_SEED, Sampling

SIGNIFICANCE = 1e-4
DRAWS = 8000
Probabilities = NDArray[np.float64]
LOGITS = np.array([1.5, -0.5, 0.3, 2.0, -1.0, 0.9], np.float32)
finite_logits = nps.arrays(np.float32, st.integers(1, 40), elements=st.floats(-60, 60, width=32))


def fits(counts: NDArray[Any], expected: Probabilities) -> bool:
    """Chi-square of counts against probabilities; an outcome of probability 0 must not have happened."""
    counts, expected = counts.ravel(), expected.ravel()
    if counts[expected == 0].any():
        return False
    possible = expected > 0
    if possible.sum() == 1:
        return True
    wanted = expected[possible] * counts.sum()
    assert wanted.min() >= 5, "too few draws for the chi-square approximation"
    return bool(scipy.stats.chisquare(counts[possible], wanted).pvalue > SIGNIFICANCE)


def softmax(logits: NDArray[Any]) -> Probabilities:
    return np.asarray(scipy.special.softmax(np.asarray(logits, np.float64), axis=-1))


# Sampling


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": -0.1},
        {"temperature": 2.01},
        {"temperature": math.nan},
        {"temperature": math.inf},
        {"top_p": 0.0},
        {"top_p": -0.5},
        {"top_p": 1.01},
        {"top_p": math.nan},
        {"seed": -1},
        {"seed": MAX_SEED + 1},
        {"seed": math.nan},
        {"temperature": "warm"},
        {"top_p": None},
        {"seed": "x"},
        {"seed": 1.5},
    ],
)
def test_settings_out_of_range(settings: dict[str, Any]) -> None:
    with pytest.raises(InvalidInput, match=f"{next(iter(settings))} is .*, expected"):
        Sampling(**settings)


def test_settings_at_the_edges() -> None:
    for sampling in (Sampling(2.0, 1.0, MAX_SEED), Sampling(2.0, 5e-324, 0), Sampling(5e-324, 1.0, 1)):
        assert 0 <= choose(LOGITS, sampling, 0) < len(LOGITS)


# Greedy


@given(logits_V=finite_logits, seed=st.integers(0, MAX_SEED), position=st.integers(0, 1 << 20))
def test_greedy_is_the_lowest_of_the_likeliest(logits_V: NDArray[np.float32], seed: int, position: int) -> None:
    likeliest = min(index for index, logit in enumerate(logits_V) if logit == max(logits_V))
    assert choose(logits_V, Sampling(0.0, 0.5, seed), position) == likeliest


def test_greedy_ties() -> None:
    assert choose(np.array([1, 3, 3, 2, 3], np.float32), GREEDY, 7) == 1
    assert choose(np.zeros(5, np.float32), GREEDY, 0) == 0
    assert choose(np.array([-0.0, 0.0], np.float32), GREEDY, 0) == 0


# Sampled tokens


@pytest.mark.parametrize(("temperature", "top_p"), [(1, 1), (0.6, 1), (2, 1), (1, 0.9), (1, 0.5), (2, 0.8), (0.5, 0.5)])
@pytest.mark.parametrize("over", ["positions", "seeds"])
def test_tokens_are_distributed_as_the_softmax(temperature: float, top_p: float, over: str) -> None:
    """n = 8,000 draws over one seed's positions, or over seeds at one position."""
    counts = np.zeros(len(LOGITS))
    for draw in range(DRAWS):
        seed, position = (11, draw) if over == "positions" else (draw, 11)
        counts[choose(LOGITS, Sampling(temperature, top_p, seed), position)] += 1
    expected = softmax(LOGITS / temperature)
    order = np.argsort(-expected)
    kept = order[: 1 + int((np.cumsum(expected[order]) < top_p).sum())]
    inside = np.isin(np.arange(len(LOGITS)), kept) if top_p < 1 else np.ones(len(LOGITS), bool)
    assert inside.sum() < len(LOGITS) or top_p == 1
    assert fits(counts, np.where(inside, expected, 0) / expected[inside].sum())


def test_the_chi_square_sees_a_wrong_temperature() -> None:
    counts = np.bincount([choose(LOGITS, Sampling(0.85, 1.0, 11), position) for position in range(DRAWS)])
    assert not fits(counts, softmax(LOGITS))


def test_tokens_at_neighbouring_positions_and_seeds_are_independent() -> None:
    """n = 8,000 pairs each; the joint table is the product of the softmax with itself."""
    logits_V = np.array([0.4, 0.0, -0.6], np.float32)
    expected = np.outer(softmax(logits_V), softmax(logits_V))
    for step_seed, step_position in ((0, 1), (1, 0), (1 << 32, 0)):
        joint = np.zeros((3, 3))
        for draw in range(DRAWS):
            seed, position = 2 * draw, 4 * draw
            first = choose(logits_V, Sampling(1.0, 1.0, seed), position)
            joint[first, choose(logits_V, Sampling(1.0, 1.0, seed + step_seed), position + step_position)] += 1
        assert fits(joint, expected), (step_seed, step_position)


@pytest.mark.parametrize("top_p", [1.0, 0.7])
@pytest.mark.parametrize("temperature", [5e-324, 1e-300, 1e-30, 1e-6])
def test_almost_no_temperature_is_greedy(temperature: float, top_p: float) -> None:
    logits_V = np.array([-2.0, 1.0, 3.0, 2.999, -np.inf], np.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for position in range(50):
            assert choose(logits_V, Sampling(temperature, top_p, 5), position) == 2


@pytest.mark.parametrize("top_p", [1.0, 0.9])
def test_impossible_tokens_never_come(top_p: float) -> None:
    logits_V = np.array([-np.inf, 0.0, -np.inf, 0.1, -np.inf], np.float32)
    tokens = {choose(logits_V, Sampling(2.0, top_p, 3), position) for position in range(2000)}
    assert tokens == {1, 3}
    only = np.array([-np.inf, -5.0], np.float32)
    assert {choose(only, Sampling(1.0, top_p, 3), position) for position in range(200)} == {1}


@pytest.mark.parametrize("shift", [0.0, 3e38, -3e38])
def test_extreme_logits(shift: float) -> None:
    """No overflow on the way; float32 rounds the differences away, so only the extremes count."""
    logits_V = np.array([shift, -3.4e38, shift], np.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tokens = {choose(logits_V, Sampling(1.0, 0.9, 3), position) for position in range(100)}
    assert tokens == {0, 2}


# Nucleus


def test_nucleus_by_hand() -> None:
    scaled_V = np.log(np.array([0.15, 0.5, 0.05, 0.3]))
    for top_p, kept in ((0.01, [1]), (0.49, [1]), (0.51, [1, 3]), (0.79, [1, 3]), (0.81, [0, 1, 3]), (0.96, range(4))):
        result_V = nucleus(scaled_V, top_p)
        assert np.flatnonzero(np.isfinite(result_V)).tolist() == list(kept), top_p
        assert np.array_equal(result_V[list(kept)], scaled_V[list(kept)])


def test_nucleus_of_equals_keeps_the_lowest_ids() -> None:
    assert np.flatnonzero(np.isfinite(nucleus(np.zeros(1024), 0.25))).tolist() == list(range(256))


@given(scaled_V=finite_logits.map(lambda logits_V: logits_V.astype(np.float64)), top_p=st.floats(0.01, 0.99))
def test_nucleus_is_the_smallest_set(scaled_V: NDArray[np.float64], top_p: float) -> None:
    kept = np.isfinite(nucleus(scaled_V, top_p))
    expected = softmax(scaled_V)
    assert kept.any()
    assert expected[kept].sum() >= top_p - 1e-9
    assert expected[kept].sum() - expected[kept].min() < top_p + 1e-9
    assert kept.all() or expected[kept].min() >= expected[~kept].max()


# Noise


def test_noise_is_golden() -> None:
    """Device and cloud may run different versions; another noise would cost acceptance silently."""
    first = [-1.49545161157695, -0.3511371183614871, -0.7859067841514997, 0.5586754626449684]
    np.testing.assert_allclose(gumbel(4, 0, 0), first, rtol=1e-12)
    np.testing.assert_allclose(gumbel(2, MAX_SEED, 1 << 40), [0.969410161524256, -0.5301127974083444], rtol=1e-12)


@given(size=st.integers(1, 300), seed=st.integers(0, MAX_SEED), position=st.integers(0, 1 << 40))
def test_noise_is_a_function_of_seed_and_position(size: int, seed: int, position: int) -> None:
    noise_V = gumbel(size, seed, position)
    assert np.isfinite(noise_V).all() and noise_V.dtype == np.float64
    assert np.array_equal(noise_V, gumbel(size, seed, position))
    assert np.array_equal(noise_V, gumbel(size + 17, seed, position)[:size])  # a longer vocabulary begins alike


def test_noise_is_standard_gumbel() -> None:
    """n = 200,000 values, Kolmogorov-Smirnov."""
    assert scipy.stats.kstest(gumbel(200_000, 1, 2), "gumbel_r").pvalue > SIGNIFICANCE


def test_noise_of_other_positions_and_seeds_is_independent() -> None:
    """n = 50,000 values each: no correlation above five standard errors, and no value shared."""
    size = 50_000
    places = [(seed, position) for seed in (0, 1, 2, 1 << 32, MAX_SEED) for position in (0, 1, 2, 1 << 32)]
    noises = np.stack([gumbel(size, *place) for place in places])
    correlations = np.corrcoef(noises) - np.eye(len(places))
    assert np.abs(correlations).max() < 5 / math.sqrt(size)
    for one, other in itertools.combinations(noises, 2):
        assert not np.intersect1d(one, other).size


# Verification: a device drafts with q, the cloud decides with p, both with the noise of the same seed and position

COUPLES = {
    "close": ([1.0, 0.2, -0.5, 0.0], [0.8, 0.4, -0.7, 0.1]),
    "far": ([2.0, 0.0, 0.0, -0.5], [-0.5, 0.0, 0.5, 2.0]),
    "one-sided": ([0.0, 0.0, 0.0, 0.0], [4.0, -4.0, -4.0, -4.0]),
    "same": ([1.0, 0.2, -0.5, 0.0], [1.0, 0.2, -0.5, 0.0]),
}
Verify = Callable[
    [int, int, NDArray[Any]], int
]  # draft, the cloud's own token, the cloud's logits -> what is committed


def committed(draft: int, own: int, logits_V: NDArray[Any]) -> int:
    """The protocol's rule: a draft counts exactly when it is the cloud's own token."""
    return draft if draft == own else own


def lenient(draft: int, own: int, logits_V: NDArray[Any]) -> int:
    """A tempting wrong rule: a draft that is likely enough counts."""
    return draft if softmax(logits_V)[draft] > 0.2 else own


def speculate(p_VV: NDArray[Any], q_VV: NDArray[Any], seed: int, length: int, verify: Verify) -> list[int]:
    """`length` tokens of a chain whose logits depend on the token before, in rounds of drafts.

    How many are drafted depends on the drafts themselves and so on the noise, as on a device with a rule for when to
    stop; the cloud commits up to the first draft it would not have said.
    """
    text, sampling = [0], Sampling(1.0, 1.0, seed)
    while len(text) <= length:
        drafts: list[int] = []
        while len(drafts) < 3 and (not drafts or drafts[-1] != 1):
            last = drafts[-1] if drafts else text[-1]
            drafts.append(choose(q_VV[last], sampling, len(text) + len(drafts)))
        for draft in drafts:
            own = choose(p_VV[text[-1]], sampling, len(text))
            text.append(verify(draft, own, p_VV[text[-1]]))
            if text[-1] != draft:
                break
    return text[1 : length + 1]


def chain_counts(verify: Verify) -> tuple[NDArray[Any], Probabilities]:
    """How often each text of 3 tokens came in n = 8,000 seeds, and its probability under the cloud's model."""
    rng = np.random.default_rng(0)
    p_VV, q_VV = rng.normal(0, 0.8, (2, 3, 3)).astype(np.float32)
    counts = np.zeros((3, 3, 3))
    for seed in range(DRAWS):
        counts[tuple(speculate(p_VV, q_VV, seed, 3, verify))] += 1
    step = softmax(p_VV)
    return counts, step[0][:, None, None] * step[:, :, None] * step[None]


def test_whatever_the_draft_says_the_text_is_the_clouds() -> None:
    """n = 8,000 texts of 3 tokens: their joint distribution is the cloud model's own."""
    assert fits(*chain_counts(committed))


def test_a_rule_that_trusts_likely_drafts_is_found_out() -> None:
    assert not fits(*chain_counts(lenient))


@pytest.mark.parametrize("couple", COUPLES)
def test_shared_noise_commits_the_clouds_softmax_and_accepts_more_than_independent_draws(couple: str) -> None:
    """n = 8,000 seeds. The committed token is distributed as p whatever q is, and drafts are accepted with

        sum_i 1 / sum_j max(p_j / p_i, q_j / q_i)  >=  (1 - TV) / (1 + TV),  TV = sum_i |p_i - q_i| / 2

    (Daliri, Musco, Suresh 2024, theorem 3), where independent draws would agree with sum_i p_i q_i and rejection
    sampling, which needs q on the wire, with 1 - TV.
    """
    p_logits, q_logits = (np.array(logits, np.float32) for logits in COUPLES[couple])
    p, q = softmax(p_logits), softmax(q_logits)
    counts, accepted, independent = np.zeros(4), 0, 0
    for seed in range(DRAWS):
        sampling = Sampling(1.0, 1.0, seed)
        draft, own = choose(q_logits, sampling, 5), choose(p_logits, sampling, 5)
        counts[committed(draft, own, p_logits)] += 1
        accepted += draft == own
        independent += choose(q_logits, Sampling(1.0, 1.0, seed + DRAWS), 5) == own
    assert fits(counts, p)
    exact = float((1 / np.maximum(p[None] / p[:, None], q[None] / q[:, None]).sum(1)).sum())
    variation = float(np.abs(p - q).sum() / 2)
    bound = (1 - variation) / (1 + variation)
    error = 4 * math.sqrt(max(exact * (1 - exact), 1e-12) / DRAWS)
    assert abs(accepted / DRAWS - exact) <= error
    assert accepted / DRAWS >= bound - error
    assert accepted >= independent
    assert abs(independent / DRAWS - float(p @ q)) <= 4 * math.sqrt(0.25 / DRAWS)
    assert accepted == DRAWS or couple != "same"


# log_softmax


@given(logits_V=finite_logits)
def test_log_softmax_is_scipys(logits_V: NDArray[np.float32]) -> None:
    expected = scipy.special.log_softmax(logits_V.astype(np.float64))
    np.testing.assert_allclose(log_softmax(logits_V), expected, rtol=1e-12, atol=1e-12)


def test_log_softmax_of_extremes() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        wide = log_softmax(np.array([3e38, -3e38, -np.inf], np.float32))
        halves = log_softmax(np.array([1.0, -np.inf, 1.0], np.float32))
    np.testing.assert_allclose(wide, [0.0, -6e38, -math.inf], rtol=1e-6)
    np.testing.assert_allclose(halves, [-math.log(2), -math.inf, -math.log(2)], rtol=1e-12)
