"""Choose the next token: greedily, or by sampling with noise that device and cloud share.

A sampled token is the argmax of logits / temperature + Gumbel noise (the Gumbel-max trick), where the noise is a
function of seed and position only. For a given seed the cloud's answer is therefore one fixed sequence, independent of
the drafts: a draft token is accepted exactly when it equals that token, and the distribution is the cloud's own. Drafts
sampled with the same noise are accepted nearly as often as under rejection sampling, without sending probabilities
(Daliri, Musco, Suresh, "Coupling without Communication and Drafter-Invariant Speculative Decoding", 2024).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from isthmus.models.messages import Sampling

Floats = NDArray[np.float32]


def choose(logits_V: Floats, sampling: Sampling, position: int) -> int:
    """The token at `position`, which counts from 0 at the start of the prompt. Ties go to the lowest id."""
    if sampling.temperature == 0:
        return int(logits_V.argmax())
    with np.errstate(over="ignore"):  # near temperature 0 all but the most likely become -inf
        scaled_V = (logits_V.astype(np.float64) - float(logits_V.max())) / sampling.temperature
    if sampling.top_p < 1:
        scaled_V = nucleus(scaled_V, sampling.top_p)
    return int((scaled_V + gumbel(len(scaled_V), sampling.seed, position)).argmax())


def gumbel(size: int, seed: int, position: int) -> NDArray[np.float64]:
    """Standard Gumbel noise (size,), the same on every machine, from the counter-based generator Philox."""
    bits = np.random.Philox(key=seed, counter=[0, 0, 0, position])
    uniform_V = np.random.Generator(bits).random(size)
    noise_V: NDArray[np.float64] = -np.log(-np.log(np.maximum(uniform_V, np.finfo(np.float64).tiny)))
    return noise_V


def nucleus(scaled_V: NDArray[np.float64], top_p: float) -> NDArray[np.float64]:
    """Set everything outside the smallest set with probability `top_p` to -inf (Holtzman et al., 2020)."""
    probabilities_V = np.exp(scaled_V - scaled_V.max())
    probabilities_V /= probabilities_V.sum()
    order_V = np.argsort(-probabilities_V, kind="stable")
    before_V = np.cumsum(probabilities_V[order_V]) - probabilities_V[order_V]
    inside = order_V[before_V < top_p]
    result_V = np.full_like(scaled_V, -np.inf)
    result_V[inside] = scaled_V[inside]
    return result_V


def log_softmax(logits_V: Floats) -> NDArray[np.float64]:
    """Natural logarithms of the probabilities at temperature 1."""
    shifted_V = logits_V.astype(np.float64) - float(logits_V.max())
    return shifted_V - float(np.log(np.exp(shifted_V).sum()))


def logprobs(logits_V: Floats, token: int, count: int) -> tuple[float, tuple[tuple[int, float], ...]]:
    """Log probability of `token`, and (id, log probability) of the `count` most likely tokens, in that order."""
    logs_V = log_softmax(logits_V)
    top = np.argsort(-logs_V, kind="stable")[:count]
    return float(logs_V[token]), tuple((int(id_), float(logs_V[id_])) for id_ in top)
