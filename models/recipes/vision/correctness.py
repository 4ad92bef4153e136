"""Correctness heads of exits: fitted, and taken only where they rank an exit's losses measurably better.

A loss: the exit is wrong where the cloud model is right.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.special import expit
from scipy.stats import rankdata

from isthmus.models.vision.exit_score import LEAST, exit_score, features
from isthmus.models.vision.manifest import CorrectnessHead, Exit

FOLDS = 5
RESAMPLES = 1000
QUANTILE = 0.05  # of the gain over resamples, which must be above 0
LEAST_LOSSES = 10  # of which fewer say nothing about ranks
RIDGE = 1.0  # penalty of a squared weight on standardised features, in samples

Bools = NDArray[np.bool_]
Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]
Integers = NDArray[np.int64]


def exit_losses(exits_ENK: Floats, labels_N: Integers, cloud_N: Integers) -> Bools:
    """Whether each exit loses each sample, (E, N)."""
    lost_EN: Bools = (exits_ENK.argmax(2) != labels_N) & (cloud_N == labels_N)
    return lost_EN


def scores_of(exits_ENK: Floats, scores: Sequence[CorrectnessHead | None]) -> Doubles:
    """`exit_score` of each exit and sample, (E, N)."""
    found_EN: Doubles = exits_ENK.max(2).astype(np.float64)
    for index, score in enumerate(scores):
        if score is not None:
            exit_ = Exit(name="exit", accuracy=0, agreement=0, score=score)
            found_EN[index] = [exit_score(list(row), exit_) for row in exits_ENK[: index + 1].transpose(1, 0, 2)]
    return found_EN


def choose_scores(exits_ENK: Floats, labels_N: Integers, cloud_N: Integers) -> tuple[CorrectnessHead | None, ...]:
    """For each exit a correctness head, or None where it ranks losses no better than the highest probability."""
    lost_EN = exit_losses(exits_ENK, labels_N, cloud_N)
    chosen: list[CorrectnessHead | None] = []
    for index, lost_N in enumerate(lost_EN):
        features_NF = np.array([features(list(row_EK)) for row_EK in exits_ENK[: index + 1].transpose(1, 0, 2)])
        better = is_better(features_NF.astype(np.float64), exits_ENK[index].max(1).astype(np.float64), lost_N)
        chosen.append(fit_head(features_NF.astype(np.float64), lost_N) if better else None)
    return tuple(chosen)


def is_better(features_NF: Doubles, probability_N: Doubles, lost_N: Bools) -> bool:
    """Whether a head, cross-validated, ranks losses better than the probability in most resamples of the samples."""
    if min(lost_N.sum(), (~lost_N).sum()) < LEAST_LOSSES:
        return False
    rng, score_N = np.random.default_rng(0), np.zeros(len(lost_N))
    fold_N = rng.permutation(len(lost_N)) % FOLDS
    for fold in range(FOLDS):
        head = fit_head(features_NF[fold_N != fold], lost_N[fold_N != fold])
        score_N[fold_N == fold] = head.bias + features_NF[fold_N == fold] @ np.array(head.weights)
    gains = []
    for _ in range(RESAMPLES):
        some_N = rng.integers(len(lost_N), size=len(lost_N))
        if 0 < lost_N[some_N].sum() < len(some_N):
            gains.append(area(score_N[some_N], lost_N[some_N]) - area(probability_N[some_N], lost_N[some_N]))
    return bool(np.quantile(gains, QUANTILE) > 0)


def area(score_N: Doubles, lost_N: Bools) -> float:
    """The chance that a loss has a lower score than another sample (the area under the ROC curve)."""
    losses, others = int(lost_N.sum()), int((~lost_N).sum())
    return float((rankdata(score_N)[~lost_N].sum() - others * (others + 1) / 2) / (losses * others))


def fit_head(features_NF: Doubles, lost_N: Bools) -> CorrectnessHead:
    """A logistic regression of "no loss", with a ridge on standardised features."""
    mean_F, deviation_F = features_NF.mean(0), features_NF.std(0)
    deviation_F[deviation_F < LEAST] = 1.0
    weights_F = logistic((features_NF - mean_F) / deviation_F, ~lost_N, RIDGE)
    scaled_F = weights_F[:-1] / deviation_F
    return CorrectnessHead(bias=float(weights_F[-1] - scaled_F @ mean_F), weights=tuple(map(float, scaled_F)))


def fit_platt(score_N: Doubles, lost_N: Bools) -> tuple[float, float]:
    """Bias and slope of the log-odds of a loss over the log-odds of the score (Platt, 1999)."""
    kept_N = score_N.clip(LEAST, 1 - LEAST)
    slope, bias = logistic(np.log(kept_N / (1 - kept_N))[:, None], lost_N, 1e-3)
    return float(bias), float(slope)


def logistic(inputs_NF: Doubles, true_N: Bools, ridge: float) -> Doubles:
    """Weights of a logistic regression, its bias last."""
    with_one_NG = np.hstack([inputs_NF, np.ones((len(inputs_NF), 1))])
    sign_N = np.where(true_N, 1.0, -1.0)

    def loss(weights_G: Doubles) -> tuple[float, Doubles]:
        margin_N = sign_N * (with_one_NG @ weights_G)
        kept_G = np.append(weights_G[:-1], 0.0)
        gradient_G = -(sign_N * expit(-margin_N)) @ with_one_NG + ridge * kept_G
        return float(np.logaddexp(0, -margin_N).sum() + ridge * kept_G @ kept_G / 2), gradient_G

    found: Doubles = minimize(loss, np.zeros(with_one_NG.shape[1]), jac=True, method="L-BFGS-B").x
    return found
