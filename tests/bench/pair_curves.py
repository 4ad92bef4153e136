"""Curves of routers: what each threshold costs and recovers, with intervals over prompts.

A router's outcome is four tables over P prompts and T thresholds, from none to all by the cloud: what is right, how
often the cloud is called, which tokens it decides, and its FLOPs. All figures are ratios of their sums, so that
resampling prompts resamples all of them alike.

Source: RouteLLM (Ong et al., ICLR 2025) for APGR, the mean share of the quality gap that is recovered over all costs,
and CPT(x), the least cost that recovers x % of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

GRID = np.linspace(0, 1, 201)  # costs
TINY = 1e-9

Doubles = NDArray[np.float64]
Row = dict[str, Any]


@dataclass(frozen=True)
class Outcome:
    """Sums for each prompt at each threshold (P, T), whose first calls no cloud and whose last always calls it.

    weight_P: what `right` is a share of. cost: the table that curves are over, "calls" or "tokens".
    """

    right_PT: Doubles
    calls_PT: Doubles
    tokens_PT: Doubles
    flops_PT: Doubles
    weight_P: Doubles
    cost: str = "tokens"

    def curve(self, drawn_P: NDArray[np.int64] | None = None) -> dict[str, Doubles]:
        """Quality, calls a prompt or token, other costs as shares of the cloud's alone, at each threshold (T,)."""
        chosen = slice(None) if drawn_P is None else drawn_P
        weight = self.weight_P[chosen].sum()
        found = {"quality": self.right_PT[chosen].sum(0) / weight, "calls": self.calls_PT[chosen].sum(0) / weight}
        for name, table_PT in (("tokens", self.tokens_PT), ("flops", self.flops_PT)):
            found[name] = table_PT[chosen].sum(0) / max(float(table_PT[chosen, -1].sum()), TINY)
        return found


def figures(curve: Mapping[str, Doubles], cost: str) -> dict[str, float]:
    """APGR, CPT(50), CPT(80) and the share of the cost that is saved at no loss. NaN where the pair does not differ."""
    order = np.argsort(curve[cost], kind="stable")
    cost_T, quality_T = curve[cost][order], curve["quality"][order]
    weak, strong = float(curve["quality"][0]), float(curve["quality"][-1])
    gap = strong - weak
    if gap <= TINY:
        return dict.fromkeys(("apgr", "cpt50", "cpt80", "saved_at_no_loss"), float("nan"))
    recovered_G = (np.interp(GRID, cost_T, quality_T) - weak) / gap

    def least(share: float) -> float:
        return float(cost_T[np.argmax((quality_T - weak) / gap >= share - TINY)])

    return {
        "apgr": float(recovered_G.mean()),
        "cpt50": least(0.5),
        "cpt80": least(0.8),
        "saved_at_no_loss": 1 - least(1.0),
    }


def at_quality(curve: Mapping[str, Doubles], quality: float, cost: str) -> dict[str, float]:
    """All costs where a share of the cloud's quality is kept at the least `cost`."""
    kept_T = curve["quality"] >= quality * curve["quality"][-1] - TINY
    best = int(np.argmin(np.where(kept_T, curve[cost], np.inf)))
    return {name: float(curve[name][best]) for name in ("calls", "tokens", "flops")}


def measure(outcomes: Mapping[str, Outcome], qualities: tuple[float, ...], resamples: int, best: str) -> Row:
    """Figures of every router with 95 % intervals, and by how much the APGR of `best` is above the others'."""
    count = len(next(iter(outcomes.values())).weight_P)
    draws = np.random.default_rng(0).integers(0, count, (resamples, count))
    rows: Row = {}
    samples: dict[str, Doubles] = {}
    for name, outcome in outcomes.items():
        curve = outcome.curve()
        drawn = [figures(outcome.curve(drawn_P), outcome.cost) for drawn_P in draws]
        samples[name] = np.array([each["apgr"] for each in drawn])
        found = figures(curve, outcome.cost)
        rows[name] = {
            **{figure: finite(value) for figure, value in found.items()},
            "intervals": {figure: bounds(np.array([each[figure] for each in drawn])) for figure in found},
            "at": {f"{quality:g}": at_quality(curve, quality, outcome.cost) for quality in qualities},
            "curve": {key: values.round(5).tolist() for key, values in curve.items()},
        }
    above = {name: bounds(samples[best] - each) for name, each in samples.items() if name != best}
    return {"prompts": count, "routers": rows, "best": best, "apgr_above": above}


def bounds(values: Doubles) -> list[float] | None:
    """A 95 % interval; None where the figure does not exist."""
    known = values[np.isfinite(values)]
    return [float(np.quantile(known, edge)) for edge in (0.025, 0.975)] if len(known) else None


def finite(value: float) -> float | None:
    return value if np.isfinite(value) else None


def thresholds(score_N: Doubles, count: int = 51) -> Doubles:
    """Rising thresholds (T,): below the first is none of the scores, below the last are all."""
    inner = np.quantile(score_N, np.linspace(0, 1, count)[1:-1])
    return np.array([-np.inf, *np.unique(inner), np.inf])


def by_answer(
    score_P: Doubles, device_right_P: Doubles, cloud_right_P: Doubles, tokens_P: Doubles, flops_P: Doubles
) -> Outcome:
    """Whole answers: those whose score is below a threshold are the cloud's. tokens_P, flops_P: of the cloud's."""
    asked_PT = score_P[:, None] < thresholds(score_P)[None]
    right_PT = np.where(asked_PT, cloud_right_P[:, None], device_right_P[:, None])
    return Outcome(
        right_PT,
        asked_PT * 1.0,
        asked_PT * tokens_P[:, None],
        asked_PT * flops_P[:, None],
        np.ones(len(score_P)),
        "calls",
    )


def roc_auc(score_N: Doubles, positive_N: NDArray[np.bool_]) -> float:
    """The chance that a positive has a higher score than a negative; ties count half."""
    if positive_N.all() or not positive_N.any():
        return float("nan")
    order = np.argsort(score_N, kind="stable")
    ranks_N = np.empty(len(score_N))
    ranks_N[order] = np.arange(1, len(score_N) + 1)
    for value in np.unique(score_N):
        same_N = score_N == value
        ranks_N[same_N] = ranks_N[same_N].mean()
    positives = int(positive_N.sum())
    rank_sum = float(ranks_N[positive_N].sum()) - positives * (positives + 1) / 2
    return rank_sum / (positives * (len(score_N) - positives))


def auc_with_interval(score_N: Doubles, positive_N: NDArray[np.bool_], resamples: int) -> Row:
    """ROC-AUC with a 95 % interval over prompts."""
    draws = np.random.default_rng(0).integers(0, len(score_N), (resamples, len(score_N)))
    values = np.array([roc_auc(score_N[drawn], positive_N[drawn]) for drawn in draws])
    return {"value": finite(roc_auc(score_N, positive_N)), "interval": bounds(values), "prompts": len(score_N)}
