"""Train what scores whole answers of a device's model, and certify at which scores they will do.

    prompts --device--> answers, likelihoods --+
            --cloud---> answers ---------------+--> acceptable or not
        training prompts --> query head, verifier, thresholds
        test prompts     --> levels, certified over prompts by learn-then-test

An answer's score is the least of its running scores, as on the device. The cloud's model may be any, of any vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize

from isthmus.models.errors import InvalidInput
from isthmus.models.language.router.answers import QUERY_FEATURES, AnswerVerifier, LogisticHead, least_score
from isthmus.models.language.router.manifest import OffloadLevel
from isthmus.models.recipes.language.answered import AnsweredPrompt
from isthmus.models.recipes.language.router_levels import certified_levels, thresholds

DECAY = 0.01  # of squared weights, for features in standard deviations
# Offload rates of the levels
RATES = (0.0, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)

Doubles = NDArray[np.float64]


def train_verifier(prompts: Sequence[AnsweredPrompt]) -> AnswerVerifier:
    """Both heads. The verifier learns from every check, so that it may end an answer early; each prompt counts once."""
    right_P = np.array([each.acceptable for each in prompts])
    query_PE = np.array([each.device.checks[0][:QUERY_FEATURES] for each in prompts])
    counts_P = np.array([len(each.device.checks) for each in prompts])
    checks_NE = np.concatenate([np.array(each.device.checks) for each in prompts])
    return AnswerVerifier(
        fit_logistic(query_PE, right_P, np.ones(len(prompts))),
        fit_logistic(checks_NE, np.repeat(right_P, counts_P), np.repeat(1 / counts_P, counts_P)),
    )


def fit_logistic(features_NE: Doubles, right_N: NDArray[np.bool_], weight_N: Doubles) -> LogisticHead:
    """Logistic regression with weighted samples; the normalisation of its inputs is folded into the weights."""
    mean_E, deviation_E = features_NE.mean(0), features_NE.std(0) + 1e-3
    normal_NE, sign_N = (features_NE - mean_E) / deviation_E, np.where(right_N, 1.0, -1.0)
    share_N = weight_N / weight_N.sum()

    def loss(parameters: Doubles) -> tuple[float, Doubles]:
        weight_E, bias = parameters[:-1], parameters[-1]
        margin_N = sign_N * (normal_NE @ weight_E + bias)
        value = float(share_N @ np.logaddexp(0, -margin_N)) + DECAY * float(weight_E @ weight_E)
        slope_N = -share_N * sign_N / (1 + np.exp(margin_N))
        return value, np.append(slope_N @ normal_NE + 2 * DECAY * weight_E, slope_N.sum())

    found = minimize(loss, np.zeros(features_NE.shape[1] + 1), jac=True, method="L-BFGS-B").x
    weight_E = found[:-1] / deviation_E
    return LogisticHead(weight_E.astype(np.float32), float(found[-1] - weight_E @ mean_E))


def answer_scores(verifier: AnswerVerifier, prompts: Sequence[AnsweredPrompt]) -> Doubles:
    """The score of each answer (P,)."""
    checks = ([np.array(check, np.float32) for check in each.device.checks] for each in prompts)
    return np.array([least_score(verifier, each) for each in checks])


def query_scores(verifier: AnswerVerifier, prompts: Sequence[AnsweredPrompt]) -> Doubles:
    """The score of each prompt (P,)."""
    features_PE = np.array([each.device.checks[0][:QUERY_FEATURES] for each in prompts], np.float32)
    return verifier.query.predict(features_PE).astype(np.float64)


def answer_levels(
    training_P: Doubles, test_P: Doubles, acceptable_P: NDArray[np.bool_], seed: int
) -> list[OffloadLevel]:
    """Levels at thresholds from the scores of training prompts, certified on those of test prompts, in random order."""
    likely = thresholds(training_P, RATES)
    asked = [float((test_P < each).mean()) for each in likely]
    losses_LP = [((test_P >= each) & ~acceptable_P).astype(np.float64) for each in likely]
    return certified_levels(likely, asked, losses_LP, seed)


@dataclass(frozen=True)
class TrainedAnswers:
    """What a router bundle holds for whole answers."""

    verifier: AnswerVerifier
    answer_levels: list[OffloadLevel]
    query_levels: list[OffloadLevel]


def train_answers(training: Sequence[AnsweredPrompt], test: Sequence[AnsweredPrompt], seed: int) -> TrainedAnswers:
    """Heads from the training prompts, levels from the test prompts, which are in random order.

    Raises InvalidInput where all answers are alike: then there is nothing to route by.
    """
    if len({each.acceptable for each in training}) < 2:
        raise InvalidInput(f"all of the {len(training)} training answers are equally good: there is nothing to learn")
    verifier, acceptable_P = train_verifier(training), np.array([each.acceptable for each in test])
    levels = [
        answer_levels(score(verifier, training), score(verifier, test), acceptable_P, seed)
        for score in (answer_scores, query_scores)
    ]
    return TrainedAnswers(verifier, *levels)
